"""Finding a checkpoint, in a folder or on the hub, and its weight files; torch is not needed."""

from dataclasses import dataclass
from pathlib import Path

from lpdeploy.errors import ArtifactError, quote_error
from lpdeploy.records import load_record

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_INDEX = "model.safetensors.index.json"
_FIX = "Copy the checkpoint anew."


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """Return the folder of a model: itself if local, else its snapshot from the hub.

    Args:
        model: Folder or hub name.
        weights: Whether weights are needed, or the config alone.

    Raises:
        ArtifactError: It is no folder with a ``config.json``, its weights are only pickled, or
            the hub has no such model or is out of reach.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _download(model, files=_HUB_FILES if weights else ["config.json"])
    if not (folder / "config.json").is_file():
        raise describe_no_config(model)
    if weights and not list_weight_files(folder):
        _refuse_without_safetensors(model, folder)
    return folder


def check_model(model: str) -> None:
    """Check what can be told of a model at once: a folder must hold one, a name be possible.

    Raises:
        ArtifactError: It is neither a folder that ``resolve_model`` takes nor a name on the hub.
    """
    if Path(model).is_dir():
        resolve_model(model)
    else:
        _check_hub_name(model)


def is_local(name: str) -> bool:
    """Tell whether a model was named by a path of this machine, not by a name on the hub."""
    return Path(name).is_absolute() or Path(name).is_dir()


def describe_no_config(model: str) -> ArtifactError:
    """Return the error for a folder without a config."""
    return ArtifactError(
        f"'{model}' is no Hugging Face model: it has no config.json. "
        "Give a folder that 'save_pretrained' wrote, or a hub name."
    )


def _check_hub_name(model: str) -> None:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:  # no name on the hub is like that
        raise ArtifactError(f"There is no folder '{model}'. Check the path, or give a hub name.")


def _download(model: str, *, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    _check_hub_name(model)
    try:
        return Path(snapshot_download(model, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"There is no folder '{model}' here, and the hub gives no model of that name "
            f"({quote_error(error)}). Check the path or the name, the network and 'hf auth login'."
        ) from error


def _refuse_without_safetensors(model: str, folder: Path) -> None:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        raise ArtifactError(
            f"'{model}' holds only pickled weights, which can run code when loaded. "
            "Convert it once with save_pretrained, which writes safetensors, and use the result."
        )
    raise ArtifactError(
        f"'{model}' has a config.json but no *.safetensors weights. Give a complete checkpoint."
    )


def list_weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint, in the order of their names.

    Where both a whole file and an index are there, the whole file counts, as in transformers.

    Raises:
        ArtifactError: Its index cannot be read, or names a file that does not lie beside it.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    files = sorted(set(load_record(_Index, index, fix=_FIX).weight_map.values()))
    if not files:
        raise ArtifactError(f"'{index}' names no weights. {_FIX}")
    for name in files:
        if Path(name).name != name:
            raise ArtifactError(
                f"'{index}' names {name!r}, which is no file beside it. {_FIX} Nothing outside its "
                "folder is read."
            )
    return [folder / name for name in files]


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]

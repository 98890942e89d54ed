"""Which files of a run go to the hub, and what they say there: no path of this machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.engines import ENGINES
from lpdeploy.engines.engine import Engine
from lpdeploy.engines.exports import find_export
from lpdeploy.errors import ArtifactError
from lpdeploy.evaluation.results import Evaluation, load_evaluation
from lpdeploy.models.card import build_hub_card
from lpdeploy.models.find import is_local
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.plan import PruningPlan
from lpdeploy.publish.evaluation import add_evaluation
from lpdeploy.records import format_json, load_json
from lpdeploy.run_folder import RunFolder

CARD = "README.md"
# Where files of ours, of transformers and of peft name a model or an adapter.
_NAMES_MODELS = ("base_model", "model", "adapter", "name_or_path", "_name_or_path")
# Large, and made of the vocabulary alone.
_LEFT_AS_IS = ("tokenizer.json", "vocab.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Upload:
    """A file on its way to the hub.

    Attributes:
        path: In the repository.
        source: Where it lies.
        content: What is uploaded in place of it; None for the file as it is.
    """

    path: str
    source: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that are uploaded."""
        return self.source.stat().st_size if self.content is None else len(self.content)


def list_uploads(run: RunFolder, *, repo: str) -> list[Upload]:
    """List what of a run belongs on the hub: checkpoint, card, plan and exports.

    The checkpoint lies at the top, so that ``from_pretrained(repo)`` loads it. Nothing of the
    training is among it: no adapter, no checkpoint of the optimizer, no log, no manifest.

    Args:
        run: What ``prune`` and ``compact`` wrote.
        repo: ``owner/name``, for the card.

    Raises:
        ArtifactError: The run is not complete, was not compacted, or an export is of another model.
    """
    plan, place = run.load_plan(), locate_model(run)
    model = place.folder
    found = {e: find_export(place, e.name) for e in ENGINES.values() if e.hub_card is not None}
    exports = {engine: folder for engine, folder in found.items() if folder is not None}
    files = [(path.name, path) for path in _list_files(model) if path.name != CARD]
    files.append((run.plan.name, run.plan))
    for engine, folder in exports.items():
        files += [(f"{engine.name}/{path.name}", path) for path in _list_files(folder)]
    card = _build_card(model, plan, repo=repo, exports=list(exports))
    evaluation = _load_evaluation(run, place)
    if evaluation is not None:
        card = add_evaluation(card, evaluation, repo=repo)
    return [
        Upload(CARD, model / CARD, card.encode()),
        *(Upload(path, source, _rewrite(source)) for path, source in sorted(files)),
    ]


def _load_evaluation(run: RunFolder, place: ModelPlace) -> Evaluation | None:
    """Load what was measured of the model that is there now; None if nothing was."""
    run.check_files(run.evaluation)
    found = load_evaluation(run.evaluation, fix="Delete it.")
    return found if found and found.model_sha256 == place.compute_sha256() else None


def _list_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _build_card(model: Path, plan: PruningPlan, *, repo: str, exports: list[Engine]) -> str:
    path = model / CARD
    if not path.is_file():
        raise ArtifactError(
            f"No {CARD} in '{model}', which is the page of a model on the hub. Write one, or run "
            f"'lpdeploy compact {model.parent} --overwrite'."
        )
    text = path.read_text(encoding="utf-8")
    described = [engine.hub_card for engine in exports if engine.hub_card]
    local = is_local(plan.base_model)
    return build_hub_card(text, repo=repo, exports=described, base_is_local=local)


def _rewrite(path: Path) -> bytes | None:
    """Return a JSON file with paths cut to their last part; None where it has none."""
    if path.suffix != ".json" or path.name in _LEFT_AS_IS:
        return None
    data = load_json(path, fix="Make it again.")
    cut = _cut_paths(data)
    return None if cut == data else format_json(cut).encode()


def _cut_paths(data: Any, key: str | None = None) -> Any:
    match data:
        case dict():
            return {name: _cut_paths(value, name) for name, value in data.items()}
        case list():
            return [_cut_paths(value, key) for value in data]
        case str() if key in _NAMES_MODELS and is_local(data):
            return Path(data).name
        case _:
            return data

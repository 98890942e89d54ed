"""What a generation config says: the tokens that start and end an answer."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from lpdeploy.records import load_record


@dataclass(frozen=True)
class GenerationSettings:
    """What lpdeploy uses of a generation_config.json.

    Attributes:
        eos_token_id: Tokens that end an answer; None to use those of the config.
        bos_token_id: Token that starts a text.
        pad_token_id: Token that fills rows of a batch.
    """

    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None


def load_generation_settings(folder: Path) -> GenerationSettings:
    """Read generation_config.json; the defaults if there is none.

    Raises:
        ArtifactError: It cannot be read.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationSettings()
    return load_record(GenerationSettings, path, fix="Copy the checkpoint anew.")


def list_stop_tokens(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """List the tokens that end an answer.

    A generation config says more than a config: chat models end a turn with another token.
    """
    own = load_generation_settings(folder).eos_token_id
    stops = config.eos_token_id if own is None else own
    return tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)

"""How the conversations were written that a model is tuned on, which it has to ship."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lpdeploy.artifacts import save_json
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.records import find_record

_TEMPLATE, _TOKENIZER, _GENERATION = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class ChatFormat:
    """What a server has to know to ask a model in the form in which it was tuned.

    Attributes:
        template: The chat template.
        end_of_turn: The special token that ends an answer; None if the template writes none.
    """

    template: str
    end_of_turn: int | None = None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        save_json(path, asdict(self))

    def apply(self, folder: Path, config: PretrainedConfig) -> None:
        """Put it beside a model: the template, and the token among those that end an answer."""
        (folder / _TEMPLATE).write_text(self.template, encoding="utf-8")
        settings = _load(folder / _TOKENIZER)
        # An older checkpoint has its template here, which some readers prefer.
        if settings.pop("chat_template", None) is not None:
            save_json(folder / _TOKENIZER, settings)
        # Templates by other names would be those of another form.
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        stops = list_stop_tokens(folder, config)
        if self.end_of_turn is not None and self.end_of_turn not in stops:
            path = folder / _GENERATION
            save_json(path, {**_load(path), "eos_token_id": [*stops, self.end_of_turn]})


def _load(path: Path) -> dict[str, Any]:
    return find_record(dict[str, Any], path, fix="Copy the checkpoint anew.") or {}

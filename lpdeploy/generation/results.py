"""What was written, and how fast."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt.

    Attributes:
        prompt: What was asked.
        text: The new text, without special tokens.
        prompt_tokens: Number of tokens of the prompt, with its template.
        tokens: Number of new tokens, the one that ended it included.
        reason: ``stop`` if the model ended it, ``length`` if there was no room for more.
        first_seconds: Time until the first token.
        seconds: Time until the last token.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    reason: str
    first_seconds: float
    seconds: float


@dataclass(frozen=True)
class Generated:
    """The answers of one model to all prompts.

    Attributes:
        model: Run, folder or hub name.
        engine: What ran it.
        precision: Of its activations.
        answers: One for each prompt.
    """

    model: str
    engine: str
    precision: str
    answers: tuple[Answer, ...]

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens per second after the first of each answer; None if there were no others."""
        tokens = sum(answer.tokens - 1 for answer in self.answers)
        seconds = sum(answer.seconds - answer.first_seconds for answer in self.answers)
        return tokens / seconds if tokens and seconds else None

    def to_json(self) -> dict[str, Any]:
        """Return what the command prints with ``--json``."""
        return {
            "model": self.model,
            "engine": self.engine,
            "precision": self.precision,
            "tokens_per_s": self.tokens_per_s,
            "answers": [asdict(answer) for answer in self.answers],
        }


def describe_speed(answers: Sequence[Generated]) -> str:
    """Say how much was written, how fast, and why it ended."""
    lines = []
    for each in answers:
        tokens = sum(answer.tokens for answer in each.answers)
        cut = sum(answer.reason == LENGTH for answer in each.answers)
        rate = f", {each.tokens_per_s:.1f} tokens/s" if each.tokens_per_s else ""
        ended = f"; {cut} of {len(each.answers)} ended by the limit of new tokens" if cut else ""
        lines.append(f"{each.model} on {each.engine}: {tokens} tokens{rate}{ended}.")
    return "\n".join(lines)

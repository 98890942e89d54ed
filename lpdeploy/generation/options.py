"""What is asked of a text, and how prompts are written. Standard library only."""

from dataclasses import dataclass, field

from lpdeploy.engines.sampling import Sampling
from lpdeploy.plan import PROMPT_FORMATS

DEFAULT_NEW_TOKENS = 256
AUTO = "auto"
RAW = "raw"
FORMATS = (AUTO, *PROMPT_FORMATS, RAW)
"""Ways to write a prompt; all but ``raw`` make it the turn of a user."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How texts are continued.

    Attributes:
        max_new_tokens: At most so many tokens are added to each prompt; None for 256, or as many
            as there is room for.
        sampling: How tokens are chosen.
        prompt_format: ``raw`` continues a prompt as it is. ``chat-template`` makes it the turn of a
            user, in the template of the tokenizer; ``instruction`` does so in a fixed template, and
            ``auto`` in that of the tokenizer if it has one, else in the fixed one. None is
            ``chat-template`` if the tokenizer has one, else ``raw``.
        system: A turn of the system before it; makes None ``auto``, and contradicts ``raw``.

    Raises:
        ValueError: A field is out of range, or two contradict each other.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    prompt_format: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}; it must be at least 1")
        if self.prompt_format not in (None, *FORMATS):
            known = " or ".join(FORMATS)
            raise ValueError(f"`prompt_format` is {self.prompt_format!r}; it must be {known}")
        if self.system is not None and self.prompt_format == RAW:
            raise ValueError(
                "`system` is a turn of a conversation; it contradicts `prompt_format='raw'`"
            )

"""Tokens to text, as they come."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns the tokens that continue a prompt into text, and looks for strings that end it.

    A token may hold a part of a character, and text may be the beginning of a stop string: such
    text is held back until it is known. Bytes that never become a character are left out.

    Args:
        tokenizer: Of transformers, backed by a ``tokenizers.Tokenizer``.
        prompt: Token ids before the first one; they decide whether it begins with a space.
        stop: Strings that end the text, and are no part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._held += self._stream.step(self._backend, token) or ""
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._count_possible())

    def finish(self) -> str:
        """Return what was held back, where no stop string came of it."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _count_possible(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max((len(text) - 1 for text in self._stop), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-count:]) for text in self._stop):
                return count
        return 0

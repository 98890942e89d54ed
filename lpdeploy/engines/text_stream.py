"""Tokens to text, as they come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_PENDING = "\ufffd"
"""What decoding gives for bytes that are no character, or not yet one."""
_CONTEXT = 4


class TextStream:
    """Turns the tokens that continue a prompt into text, and looks for strings that end it.

    A token may hold a part of a character, and text may be the beginning of a stop string: such
    text is held back until it is known. All pieces together are what decoding the prompt and the
    tokens at once adds to decoding the prompt alone; bytes that are no character give U+FFFD.

    Args:
        tokenizer: Of transformers, backed by a ``tokenizers.Tokenizer``.
        prompt: Token ids before the first one; they decide whether it begins with a space.
        stop: Strings that end the text, and are no part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        # Tokens whose text is known, and after them those whose text is not known yet.
        self._known = self._shorten(list(prompt))
        self._new: list[int] = []
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._new.append(token)
        text = self._read_new()
        if text and not text.endswith(_PENDING):
            self._accept(text)
        found = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._count_possible())

    def finish(self) -> str:
        """Return what was held back, where no stop string came of it."""
        if self.stopped:
            return ""
        self._accept(self._read_new())
        return self._release(len(self._held))

    def _read_new(self) -> str:
        """Return what the new tokens add to the text of the known ones."""
        before, after = self._decode(self._known), self._decode(self._known + self._new)
        # A byte that is no character may undo the character of the bytes before it, which was
        # given out already: the new tokens are then read by themselves.
        return after[len(before) :] if after.startswith(before) else self._decode(self._new)

    def _accept(self, text: str) -> None:
        self._held += text
        self._known, self._new = self._shorten(self._known + self._new), []

    def _shorten(self, tokens: list[int]) -> list[int]:
        """Keep as few of the last tokens as leave the text of what follows as it is.

        A decoder may treat the first token in another way, and puts the bytes of a character
        together: so the tokens that are kept begin with whole characters, and are not alone.
        """
        for count in range(_CONTEXT, len(tokens)):
            kept = tokens[-count:]
            if not self._decode(kept).startswith(_PENDING):
                return kept
        return tokens

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=True)
        return text

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

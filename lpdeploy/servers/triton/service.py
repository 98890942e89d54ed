"""Text in, text out, over an export: what a server's adapter calls."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.sampling import Sampling
from lpdeploy.engines.text_stream import TextStream
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.servers.triton.batcher import STOP, Batcher, Request

DEFAULT_MAX_TOKENS = 128
_BYTES_A_TOKEN = 32  # more than a prompt of any language takes; long runs of spaces may
_MAX_STOPS, _MAX_STOP = 16, 256


@dataclass(frozen=True)
class Question:
    """What a client asks for.

    Attributes:
        text: The prompt; special tokens in it count as such, and the tokenizer adds its own.
        max_tokens: At most so many are added; None for 128, or what there is room for.
        stop: Strings that end the text, and are no part of it.
        ignore_eos: Go on after the model's own stop tokens.
        sampling: How tokens are chosen.
    """

    text: str
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        text: New text; may be empty where a token holds a part of a character.
        tokens: The new tokens.
        reason: ``stop``, ``length`` or ``cancelled`` in the last piece, else None.
    """

    text: str
    tokens: list[int]
    reason: str | None


class TextService:
    """A model behind a batcher.

    Args:
        folder: What ``lpdeploy export`` wrote, with its tokenizer.
        engine: Name of the export's engine.
        device: ``cpu``, ``cuda:1``; None for where the engine runs everywhere.
        max_batch: Requests that decode at once; None for what the export was made for.

    Raises:
        ArtifactError: The export cannot be opened, or has no tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engine: str,
        device: str | None = None,
        max_batch: int | None = None,
    ) -> None:
        record = get_engine(engine)
        contract = load_contract(folder, record)
        self._tokenizer = load_tokenizer(folder, load_config(folder))
        self._stop_ids = set(contract.model.eos_token_ids)
        runner = record.load(folder, device=device)
        self._max_positions = runner.max_positions
        # The engine has its threads. Of what is left, only the choice of a token would be shared
        # among torch's, which wait by spinning and take time from the engine's.
        torch.set_num_threads(1)
        self._batcher = Batcher(runner, max_batch=max_batch or contract.max_batch)

    def ask(
        self,
        question: Question,
        *,
        on_piece: Callable[[Piece], None],
        on_error: Callable[[Exception], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Answer a question piece by piece, a token each.

        Args:
            question: What is asked.
            on_piece: Is told each piece, from another thread.
            on_error: Is told instead where the engine fails.
            is_cancelled: Whether nobody waits for the answer any more.

        Raises:
            ValueError: The question cannot be answered; the sentence says why.
            BusyError: Too many requests wait.
        """
        self._batcher.check_room()
        self._check(question)  # before any work is done for it
        prompt: list[int] = self._tokenizer(question.text).input_ids
        stream = TextStream(self._tokenizer, prompt, question.stop)

        def tell(token: int | None, reason: str | None) -> bool:
            text = "" if token is None else stream.push(token)
            if stream.stopped:
                reason = STOP
            if reason:
                text += stream.finish()
            on_piece(Piece(text, [] if token is None else [token], reason))
            return stream.stopped

        self._batcher.submit(
            Request(
                prompt=prompt,
                max_new_tokens=self._resolve_max_tokens(question.max_tokens, len(prompt)),
                on_token=tell,
                on_error=on_error,
                stop_ids=() if question.ignore_eos else self._stop_ids,
                is_cancelled=is_cancelled,
                sampling=question.sampling,
            )
        )

    def _check(self, question: Question) -> None:
        limit = _BYTES_A_TOKEN * self._max_positions
        if (size := len(question.text.encode(errors="replace"))) > limit:
            raise ValueError(
                f"the prompt has {size} bytes, more than {self._max_positions} positions can hold; "
                f"send at most {limit}"
            )
        if len(question.stop) > _MAX_STOPS or any(len(text) > _MAX_STOP for text in question.stop):
            raise ValueError(
                f"there may be at most {_MAX_STOPS} stop strings, of {_MAX_STOP} characters each"
            )
        asked = question.max_tokens
        if asked is not None and not 1 <= asked <= self._max_positions:
            raise ValueError(f"max_tokens is {asked}; it must be 1 to {self._max_positions}")

    def _resolve_max_tokens(self, asked: int | None, prompt: int) -> int:
        if asked is not None:
            return asked
        return max(1, min(DEFAULT_MAX_TOKENS, self._max_positions - prompt))

    def close(self, timeout: float | None = None) -> None:
        """Answer what was asked, for so many seconds at most, and end."""
        self._batcher.close(timeout)

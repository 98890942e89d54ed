"""Text in, text out, over an export: what a server's adapter calls."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from lpdeploy.data.chat import encode_chat, get_chat_template
from lpdeploy.data.rows import USER, Message, read_turns
from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.sampling import Sampling
from lpdeploy.engines.text_stream import TextStream
from lpdeploy.errors import DataError, quote_error
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
        messages: A conversation to answer in place of a prompt: a JSON list of turns with ``role``
            and ``content``, the last of them a user's.
        max_tokens: At most so many are added; None for 128, or what there is room for.
        stop: Strings that end the text, and are no part of it.
        ignore_eos: Go on after the model's own stop tokens.
        sampling: How tokens are chosen.
    """

    text: str = ""
    messages: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)


def _read_messages(text: str) -> list[Message]:
    try:
        turns = read_turns(json.loads(text), "messages")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"messages is no JSON ({quote_error(error)})") from error
    except DataError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if not turns or turns[-1].role != USER:
        raise ValueError("the last of messages must be of the role user")
    return turns


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
        prompt = self._encode(question)
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
        asked = question.text if question.messages is None else question.messages
        if (size := len(asked.encode(errors="replace"))) > limit:
            raise ValueError(
                f"the prompt has {size} bytes, more than {self._max_positions} positions can hold; "
                f"send at most {limit}"
            )
        if len(question.stop) > _MAX_STOPS or any(len(text) > _MAX_STOP for text in question.stop):
            raise ValueError(
                f"there may be at most {_MAX_STOPS} stop strings, of {_MAX_STOP} characters each"
            )
        tokens = question.max_tokens
        if tokens is not None and not 1 <= tokens <= self._max_positions:
            raise ValueError(f"max_tokens is {tokens}; it must be 1 to {self._max_positions}")

    def _encode(self, question: Question) -> list[int]:
        """Return the tokens of a prompt, or of a conversation up to where its answer begins."""
        if question.messages is None:
            tokens: list[int] = self._tokenizer(question.text).input_ids
            return tokens
        template = get_chat_template(self._tokenizer)
        if template is None:
            raise ValueError("the model has no chat template; send text_input")
        messages = _read_messages(question.messages)
        try:
            return encode_chat(messages, self._tokenizer, template)
        except DataError as error:
            reason = quote_error(error.__cause__ or error)
            raise ValueError(f"the chat template refuses these messages ({reason})") from error

    def _resolve_max_tokens(self, asked: int | None, prompt: int) -> int:
        if asked is not None:
            return asked
        return max(1, min(DEFAULT_MAX_TOKENS, self._max_positions - prompt))

    def close(self, timeout: float | None = None) -> None:
        """Answer what was asked, for so many seconds at most, and end."""
        self._batcher.close(timeout)

"""A model on an engine with its tokenizer: prompts and conversations in, text out."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lpdeploy.data.chat import encode_chat, find_chat_template, get_chat_template
from lpdeploy.data.rows import SYSTEM, USER, Message, check_text
from lpdeploy.engines.exports import load_place
from lpdeploy.engines.generation import generate
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.text_stream import TextStream
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import LpdeployError
from lpdeploy.generation.options import AUTO, DEFAULT_NEW_TOKENS, RAW, GenerateOptions
from lpdeploy.generation.results import LENGTH, STOP, Answer
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.models.place import ModelPlace

OnText = Callable[[str], None]
"""Called with each new piece of a text."""

_EMPTY = "The prompt is empty. Give it at least one character."


class Writer:
    """Continues prompts, and answers conversations.

    Args:
        runner: The model on its engine.
        folder: Its Hugging Face folder, for tokenizer and settings.

    Raises:
        ArtifactError: There is no tokenizer.
    """

    def __init__(self, runner: Runner, folder: Path) -> None:
        self.runner = runner
        config = load_config(folder)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder, config)
        self._stop_ids = set(list_stop_tokens(folder, config))

    def encode(self, prompt: str, options: GenerateOptions) -> list[int]:
        """Return the tokens of a prompt, as it is or as the turn of a user.

        Raises:
            DataError: The tokenizer has no chat template, and one is asked for, or it fails.
            LpdeployError: The prompt is empty.
        """
        if not prompt:
            raise LpdeployError(_EMPTY)
        if self._makes_turn(options):
            system = [] if options.system is None else [Message(SYSTEM, options.system)]
            return self.encode_chat([*system, Message(USER, prompt)], options)
        check_text(prompt, "The prompt")
        tokens: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        if not tokens:  # the tokenizer drops all of it
            raise LpdeployError(_EMPTY)
        return tokens

    def _makes_turn(self, options: GenerateOptions) -> bool:
        if options.prompt_format is None and options.system is None:
            return get_chat_template(self.tokenizer) is not None
        return options.prompt_format != RAW

    def encode_chat(self, messages: Sequence[Message], options: GenerateOptions) -> list[int]:
        """Return the tokens of a conversation, up to where the next answer begins.

        Raises:
            DataError: The tokenizer has no chat template, and one is asked for, or it fails.
        """
        for message in messages:
            check_text(message.content, f"What the {message.role} says")
        asked = None if options.prompt_format == AUTO else options.prompt_format
        return encode_chat(messages, self.tokenizer, find_chat_template(self.tokenizer, asked))

    def count_room(self, prompt: list[int], options: GenerateOptions) -> int:
        """Return how many tokens may be added to a prompt; below 1 where it is too long."""
        room = self.runner.max_positions - len(prompt)
        return min(DEFAULT_NEW_TOKENS, room) if options.max_new_tokens is None else room

    def write(
        self,
        prompt: list[int],
        options: GenerateOptions,
        *,
        asked: str,
        on_text: OnText = lambda _: None,
    ) -> Answer:
        """Continue a prompt.

        Args:
            prompt: Its tokens.
            options: How to go on.
            asked: What the answer calls the prompt.
            on_text: Is told each piece of text when it is certain.

        Raises:
            LpdeployError: There is no room for the new tokens.
        """
        room = self.count_room(prompt, options)
        wanted = options.max_new_tokens or max(room, 1)
        if wanted > room:
            raise LpdeployError(
                f"A prompt of {len(prompt):,} tokens and {wanted:,} new tokens need more than the "
                f"{self.runner.max_positions:,} positions of the model. Shorten the prompt, or use "
                "a smaller `max_new_tokens`."
            )
        stream, pieces, times = TextStream(self.tokenizer, prompt), [], [time.perf_counter()]

        def hear(_: int, token: int) -> None:
            times.append(time.perf_counter())
            pieces.append("" if token in self._stop_ids else stream.push(token))
            on_text(pieces[-1])

        (tokens,) = generate(
            self.runner,
            [prompt],
            max_new_tokens=wanted,
            eos_ids=self._stop_ids,
            sampling=options.sampling,
            on_token=hear,
        )
        pieces.append(stream.finish())
        on_text(pieces[-1])
        return Answer(
            prompt=asked,
            text="".join(pieces),
            prompt_tokens=len(prompt),
            tokens=len(tokens),
            reason=STOP if tokens[-1] in self._stop_ids else LENGTH,
            first_seconds=times[1] - times[0],
            seconds=times[-1] - times[0],
        )


def load_writer(place: ModelPlace, engine: str, *, device: str) -> Writer:
    """Open a model on an engine.

    Raises:
        ArtifactError: There is no such export, or no tokenizer.
    """
    return Writer(load_place(place, engine, device=device), place.folder)


def load_base_writer(folder: Path, *, device: str) -> Writer:
    """Open an unpruned model, which runs in torch.

    Raises:
        ArtifactError: It cannot be loaded, or has no tokenizer.
    """
    return Writer(load_torch_runner(folder, device=device), folder)

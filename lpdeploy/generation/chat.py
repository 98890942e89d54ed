"""A conversation with a model, which forgets its oldest turns when there is no room for them."""

from lpdeploy.data.rows import ASSISTANT, SYSTEM, USER, Message
from lpdeploy.errors import LpdeployError
from lpdeploy.generation.options import DEFAULT_NEW_TOKENS, GenerateOptions
from lpdeploy.generation.results import Answer
from lpdeploy.generation.writer import OnText, Writer


class Conversation:
    """The turns so far.

    Attributes:
        messages: What was said and is remembered.
        num_forgotten: Number of questions that were forgotten, with their answers.

    Args:
        writer: The model.
        options: How to answer.
    """

    def __init__(self, writer: Writer, options: GenerateOptions) -> None:
        self._writer, self._options = writer, options
        self.messages: list[Message] = []
        self.num_forgotten = 0
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        system = self._options.system
        self.messages = [] if system is None else [Message(SYSTEM, system)]
        self.num_forgotten = 0

    def ask(self, text: str, *, on_text: OnText = lambda _: None) -> Answer:
        """Say something, and return the answer.

        Raises:
            DataError: The tokenizer has no chat template, or it fails.
            LpdeployError: There is no room for the question alone. The conversation stays as it is.
        """
        messages, forgotten = [*self.messages, Message(USER, text)], 0
        prompt = self._writer.encode_chat(messages, self._options)
        first = 0 if self._options.system is None else 1
        while not self._fits(prompt) and len(messages) > first + 1:
            del messages[first : first + 2]  # the oldest question and its answer
            forgotten += 1
            prompt = self._writer.encode_chat(messages, self._options)
        answer = self._writer.write(prompt, self._options, asked=text, on_text=on_text)
        self.messages = [*messages, Message(ASSISTANT, answer.text)]
        self.num_forgotten += forgotten
        return answer

    def _fits(self, prompt: list[int]) -> bool:
        """Tell whether there is room for an answer: by default for one of a fair length."""
        positions = self._writer.runner.max_positions
        fair = min(DEFAULT_NEW_TOKENS, positions // 4)
        return positions - len(prompt) >= (self._options.max_new_tokens or fair)


def check_chat(writer: Writer, options: GenerateOptions) -> None:
    """Check that a model can take part in a conversation, before anything is typed.

    Raises:
        LpdeployError: It has no chat template, or that fails for a question.
    """
    try:
        writer.encode_chat([Message(USER, "?")], options)
    except LpdeployError as error:
        raise LpdeployError(
            f"{error} 'lpdeploy generate' continues texts without a template."
        ) from error

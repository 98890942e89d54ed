"""Conversations as text: through the chat template of a tokenizer, or a fixed one for base models.

A template is Jinja, as transformers runs it: https://huggingface.co/docs/transformers/chat_templating
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from lpdeploy.data.rows import ASSISTANT, USER, Message
from lpdeploy.errors import DataError, quote_error
from lpdeploy.plan import CHAT_TEMPLATE, INSTRUCTION

# Most instruction-tuned models without a template of their own know these headings.
INSTRUCTION_TEMPLATE = """\
{{- bos_token }}A task is given below. Answer it.

{% for message in messages %}
{%- if message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}
{%- elif message['role'] == 'assistant' %}
{{- message['content'] }}{{ eos_token }}{{ '' if loop.last else '\\n\\n' }}
{%- else %}
{{- message['content'] + '\\n\\n' }}
{%- endif %}
{%- endfor %}"""
"""The template of a model that has none: a line, then a heading for each question and answer."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as a model reads it.

    Attributes:
        text: All of it, special tokens included.
        answers: Where each answer begins and ends, in characters; the token that ends a turn is
            part of the answer.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def find_chat_template(tokenizer: PreTrainedTokenizerBase, prompt_format: str | None = None) -> str:
    """Return the template to write conversations with.

    Args:
        tokenizer: Of the model.
        prompt_format: ``chat-template``, that of the tokenizer; ``instruction``, the fixed one; or
            None, that of the tokenizer if it has one.

    Raises:
        DataError: A template of the tokenizer is asked for, and there is none, or several.
    """
    own = get_chat_template(tokenizer)
    if own is not None and prompt_format != INSTRUCTION:
        return own
    if prompt_format == CHAT_TEMPLATE:
        raise DataError(
            "The tokenizer has no chat template. Add a chat_template.jinja to the model, or use "
            f"`prompt_format='{INSTRUCTION}'`."
        )
    return INSTRUCTION_TEMPLATE


def get_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template that a tokenizer uses where none is named; None if it has none."""
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # there are several, by name
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(
            f"The tokenizer has several chat templates ({names}), and none is called default. "
            "Rename the one that is to be used."
        ) from error


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """Return the special token that ends an answer; None if the template writes none.

    It need not be the model's own end of text: a base model that is tuned on conversations has yet
    to learn it, and servers have to stop there.
    """
    question, answer = Message(USER, "a"), Message(ASSISTANT, "b")
    try:
        rendered = render_chat((question, answer), tokenizer, template)
    except DataError:  # the template wants more than that
        return None
    ((first, last),) = rendered.answers
    tail = rendered.text[first:last].partition(answer.content)[2]
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in found if token in special), None)


def render_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> RenderedChat:
    """Write a conversation, and find its answers in it.

    Raises:
        DataError: The template fails, or writes earlier turns differently once a conversation goes
            on, so that an answer cannot be found.
    """
    text = write_chat(messages, tokenizer, template)
    answers: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message.role == ASSISTANT:
            prompt = write_chat(messages[:index], tokenizer, template, answer_next=True)
            answered = write_chat(messages[: index + 1], tokenizer, template)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise DataError(
                    "The chat template writes a turn differently once the conversation goes on, "
                    f"so answer {len(answers) + 1} of {_quote(messages)} cannot be found. Split "
                    f"conversations after each answer, or use `prompt_format='{INSTRUCTION}'`."
                )
            answers.append((len(prompt), len(answered)))
    return RenderedChat(text, tuple(answers))


def write_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    *,
    answer_next: bool = False,
) -> str:
    """Write a conversation as text, up to where an answer begins if ``answer_next``.

    Raises:
        DataError: The template fails.
    """
    try:
        written = tokenizer.apply_chat_template(
            [asdict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answer_next,
        )
    except Exception as error:  # a template is a program, which can fail in any way
        raise DataError(
            f"The chat template fails for {_quote(messages)} ({quote_error(error)}). Correct the "
            f"conversation, or use `prompt_format='{INSTRUCTION}'`."
        ) from error
    assert isinstance(written, str)
    return written


def encode_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[int]:
    """Return the tokens of a conversation, up to where the next answer begins.

    Raises:
        DataError: The template fails.
    """
    text = write_chat(messages, tokenizer, template, answer_next=True)
    # A template writes the special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _quote(messages: Sequence[Message]) -> str:
    roles = ", ".join(message.role for message in messages)
    return f"the conversation ({roles}) that begins with '{messages[0].content[:40]}'"

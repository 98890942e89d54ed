"""One row of a data set: a document, or a conversation in one of the forms that are in use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpdeploy.errors import DataError, quote_error

SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")
_ALIASES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}
_TURNS = ("messages", "conversations")
_QUESTIONS = ("instruction", "prompt", "question")
_ANSWERS = ("response", "output", "completion", "answer")
_SYSTEMS = ("system", "system_prompt")
FIELDS = ("text", "input", *_TURNS, *_QUESTIONS, *_ANSWERS, *_SYSTEMS)
"""Names of all columns that are read."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: What was said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One document, or one conversation.

    Attributes:
        text: The document; empty if it is a conversation.
        messages: The turns of the conversation, the last of them an answer; none for a document.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to train on."""
        answers = (each.content for each in self.messages if each.role == ASSISTANT)
        return not self.text.strip() and not any(answer.strip() for answer in answers)


def parse_row(row: Any, where: str) -> Example:
    """Turn one row into an example.

    The first of these forms that a row has counts, so that a conversation that a data set also
    holds as a formatted ``text`` is a conversation:

    - ``messages`` or ``conversations``: a list of turns, each with ``role`` and ``content``, or
      with ``from`` and ``value``. What follows the last answer is left out.
    - A question (``instruction``, ``prompt`` or ``question``) with its answer (``response``,
      ``output``, ``completion`` or ``answer``). ``input`` is added to the question after an empty
      line. Question and answer may each be a list of turns.
    - ``text``: a document.

    ``system`` or ``system_prompt`` comes before a conversation that has no such turn. A field that
    is None counts as absent where another has its place.

    Args:
        row: A mapping from the names of its fields. None counts as an empty text.
        where: File and line, for the error.

    Raises:
        DataError: The row is no object, lacks these fields, has values that are not text, or is a
            conversation that cannot be trained on: with a role that is not known, without an
            answer, or with an answer before the first question.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}. Give an object with named fields.")
    turns = _find(row, _TURNS)
    if turns and row[turns] is not None:
        said = read_turns(row[turns], _join(where, turns))
        return Example(messages=_check_turns([*_read_system(row, said, where), *said], where))
    question, answer = _find(row, _QUESTIONS), _find(row, _ANSWERS)
    if question and answer and (row[answer] is not None or row.get("text") is None):
        return Example(messages=_read_pair(row, question, answer, where))
    if "text" in row:
        return Example(_get_text(row, "text", where))
    raise DataError(
        f"{where} has the fields {', '.join(map(str, row)) or '(none)'}. Rename them to 'text', to "
        "'messages', or to 'instruction' (and 'input') with 'response' or 'output'."
    )


def _find(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first name that a row has a value for, or at least has; None if it has none.

    Columns that only other rows have are null where data sets are joined.
    """
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def _read_pair(
    row: Mapping[str, Any], question: str, answer: str, where: str
) -> tuple[Message, ...]:
    turns = []
    if isinstance(row[question], list):
        turns += read_turns(row[question], _join(where, question))
    else:
        parts = (_get_text(row, question, where), _get_text(row, "input", where))
        turns.append(Message(USER, "\n\n".join(part for part in parts if part)))
    if isinstance(row[answer], list):
        turns += read_turns(row[answer], _join(where, answer))
    else:
        turns.append(Message(ASSISTANT, _get_text(row, answer, where)))
    return _check_turns([*_read_system(row, turns, where), *turns], where)


def _read_system(row: Mapping[str, Any], turns: list[Message], where: str) -> list[Message]:
    """Return the system turn that stands in a field of its own, if the turns have none."""
    name = _find(row, _SYSTEMS)
    text = _get_text(row, name, where) if name else ""
    has_one = any(turn.role == SYSTEM for turn in turns)
    return [Message(SYSTEM, text)] if text and not has_one else []


def read_turns(turns: Any, where: str) -> list[Message]:
    """Turn a list of turns, as ``parse_row`` describes them, into messages.

    Raises:
        DataError: It is no such list.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where} is no list of turns. Give each turn as {{'role', 'content'}}.")
    return [
        _read_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)
    ]


def _read_turn(turn: Mapping[str, Any], where: str) -> Message:
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    if role not in turn or content not in turn:
        raise DataError(
            f"{where} has the fields {', '.join(map(str, turn)) or '(none)'}. Give it 'role' and "
            "'content', or 'from' and 'value'."
        )
    name = _ALIASES.get(turn[role], turn[role]) if isinstance(turn[role], str) else turn[role]
    if name not in ROLES:
        raise DataError(f"{where} is of the role {turn[role]!r}. Use {', '.join(ROLES)}.")
    parts = turn[content]
    if isinstance(parts, list):  # as the chat completions API has it
        return Message(name, _join_parts(parts, _join(where, content)))
    return Message(name, _get_text(turn, content, where))


def _join_parts(parts: list[Any], where: str) -> str:
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and "text" in part):
            raise DataError(
                f"{where} has a part that is no text. Give parts of {{'type': 'text', 'text'}} "
                "alone, or a string."
            )
    return "".join(_get_text(part, "text", where) for part in parts)


def _check_turns(turns: list[Message], where: str) -> tuple[Message, ...]:
    roles = [turn.role for turn in turns]
    if ASSISTANT not in roles:
        raise DataError(
            f"{where} is a conversation without an answer. Give it a turn of the assistant, or "
            "leave it out."
        )
    if USER not in roles[: roles.index(ASSISTANT)]:
        raise DataError(
            f"{where} is a conversation that begins with an answer. Begin it with a turn of the "
            "user, or leave it out."
        )
    last = len(roles) - roles[::-1].index(ASSISTANT)
    return tuple(turns[:last])


def _get_text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = "" if row.get(name) is None else row[name]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{_join(where, name)} is of type {kind}. Make it a string.")
    check_text(value, _join(where, name))
    return value


def _join(where: str, name: str) -> str:
    return f"{where.rstrip(',')}: '{name}'"  # a place ends in a comma where a verb may follow


def check_text(value: str, name: str) -> None:
    """Refuse what is no text: half of a pair that JSON can escape, or bytes that are no UTF-8.

    Raises:
        DataError: It cannot be encoded.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not text ({quote_error(error)}). Write it as UTF-8.") from error

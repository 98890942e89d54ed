"""Tasks of the paper, what its average takes, and tasks in local files.

The average is the paper's: the mean over BoolQ, PIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and
OBQA. The paper does not say which of lm-eval's two accuracies a column shows. Its dense LLaMA-7B
row is that of LLM-Pruner (arXiv:2305.11627), and fits ``acc`` for ARC-e and ``acc_norm`` for
HellaSwag, ARC-c and OBQA, as lm-eval of that time measured them; BoolQ and WinoGrande have only
``acc``, and of PIQA, whose two are close, ``acc`` is taken. ``PAPER_METRICS`` in
``evaluation.results`` says so in code. We differ in that today's lm-eval starts its prompts with
the bos that the tokenizer adds, and has changed some of them since, so the paper's figures are not
met to the digit. MMLU is not in the average, there or here.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lpdeploy.data.sources import read_json_rows
from lpdeploy.errors import DataError

_MMLU = "mmlu"
_SHOTS = ".shots"
_FIELDS = {
    "query": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Tasks whose prompt ends with "Answer:" in lm-eval; the others' is the query itself.
_ANSWERED = {"boolq", "piqa", "arc_easy", "arc_challenge"}
# Where a choice is a letter, or stands in the context, its length says nothing.
_PLAIN_ACCURACY = {"boolq", _MMLU}


@dataclass(frozen=True)
class TaskFile:
    """The items of one file.

    Attributes:
        name: ``piqa``; of a folder of subjects, ``mmlu_anatomy``.
        task: The task whose prompt it takes: ``piqa``, ``mmlu``.
        path: The file.
        form: ``query`` (one context, several continuations) or ``contexts`` (the reverse).
        rows: Its items, only with the fields of their form.
        shots: Items to show before a question; empty where they come from ``rows``.
    """

    name: str
    task: str
    path: Path
    form: str
    rows: list[dict[str, Any]]
    shots: list[dict[str, Any]]


def get_default_shots(name: str) -> int:
    """Return how many examples a task shows by default: 5 for MMLU, as in the paper, else 0."""
    return 5 if name == _MMLU or name.startswith(f"{_MMLU}_") else 0


def load_task_files(name: str, folder: Path) -> list[TaskFile]:
    """Read ``folder/NAME.jsonl``, or all subjects of ``folder/NAME/``.

    A line is an object with ``query``, ``choices`` and ``gold``, the index of the right choice; or
    with ``context_options``, ``continuation`` and ``gold``. ``NAME.shots.jsonl`` beside a file
    holds the examples for ``--num-fewshot``, which are taken in its order.

    Raises:
        DataError: There is no such file, or a line of it is not such an object.
    """
    path = folder / f"{name}.jsonl"
    if path.is_file():
        return [_load_file(path, name=name, task=name)]
    subjects = _list_files(folder / name)
    if not subjects:
        _refuse_unknown(name, folder)
    return [_load_file(path, name=f"{name}_{path.stem}", task=name) for path in subjects]


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.jsonl") if not path.stem.endswith(_SHOTS))


def _refuse_unknown(name: str, folder: Path) -> NoReturn:
    known = [path.stem for path in _list_files(folder)]
    known += sorted(path.name for path in folder.glob("*/") if _list_files(path))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(
        f"No '{name}.jsonl' in '{folder}', which holds {', '.join(known) or 'no task'}.{hint} "
        "Give one of these, or put the file there."
    )


def _load_file(path: Path, *, name: str, task: str) -> TaskFile:
    rows = list(read_json_rows(path))
    if not rows:
        raise DataError(f"'{path}' holds no items. Put one object per line into it.")
    first = rows[0][1]
    form = "contexts" if isinstance(first, dict) and "context_options" in first else "query"
    shots_path = path.with_name(f"{path.stem}{_SHOTS}.jsonl")
    shots = list(read_json_rows(shots_path)) if shots_path.is_file() else []
    checked = [[_check_row(row, where, form) for where, row in part] for part in (rows, shots)]
    return TaskFile(name, task, path, form, checked[0], checked[1])


def _check_row(row: Any, where: str, form: str) -> dict[str, Any]:
    fields = _FIELDS[form]
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}. Give an object with named fields.")
    for field in fields:
        if field not in row:
            raise DataError(f"{where} has no '{field}'. Give it {', '.join(fields)}.")
    options, text = ("choices", "query") if form == "query" else ("context_options", "continuation")
    if not isinstance(row[text], str) or not row[text].strip():
        raise DataError(f"{where}: '{text}' is {row[text]!r}. Make it a text that is not empty.")
    values = row[options]
    if (
        not isinstance(values, list)
        or len(values) < 2
        or not all(isinstance(value, str) and value.strip() for value in values)
    ):
        raise DataError(f"{where}: '{options}' is {values!r}. Make it a list of two or more texts.")
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < len(values):
        raise DataError(
            f"{where}: 'gold' is {gold!r}. Make it the index of the right one of the "
            f"{len(values)} {options}, 0 to {len(values) - 1}."
        )
    return {field: row[field] for field in fields}


def build_config(file: TaskFile, *, num_fewshot: int) -> dict[str, Any]:
    """Describe a task to lm-eval, with the prompt of its own task as far as the data allow.

    ======================== ================================ =============================
    task                     context                          continuations
    ======================== ================================ =============================
    arc_*, piqa, boolq       query, newline, ``Answer:``      space, choice
    mmlu                     query, ``A. ...`` a line each,   space, letter
                             ``Answer:``
    any other                query                            space, choice
    with context_options     each of them                     space, the continuation
    ======================== ================================ =============================

    A query that ends with ``Answer:`` already, or whose choices are already letters, is not
    given them again.

    Raises:
        DataError: There are fewer examples than ``num_fewshot``.
    """
    _check_shots(file, num_fewshot)
    accuracies = ["acc"]
    if file.form == "query" and file.task not in _PLAIN_ACCURACY:
        accuracies.append("acc_norm")
    return {
        "task": file.name,
        "custom_dataset": lambda **_: _build_dataset(file),
        "output_type": "multiple_choice",
        "test_split": "test",
        # Taken from the questions themselves, the question asked is left out by lm-eval.
        "fewshot_split": "shots" if file.shots else "test",
        "fewshot_config": {"sampler": "first_n" if file.shots else "default"},
        "num_fewshot": num_fewshot,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in accuracies
        ],
        "doc_to_target": "gold",
        **_list_prompt_options(file),
    }


def _check_shots(file: TaskFile, num_fewshot: int) -> None:
    # Without its own file, the question asked, and copies of it, cannot be an example.
    available = len(file.shots) or len({json.dumps(row) for row in file.rows}) - 1
    if num_fewshot > available:
        raise DataError(
            f"'{file.path}' has {available} examples for {num_fewshot} shots. "
            f"Use `num_fewshot={available}` or less, or give more in "
            f"'{file.path.stem}{_SHOTS}.jsonl'."
        )


def _build_dataset(file: TaskFile) -> dict[str, Any]:
    from datasets import Dataset

    splits = {"test": file.rows, "shots": file.shots}
    return {name: Dataset.from_list(rows) for name, rows in splits.items() if rows}


def _list_prompt_options(file: TaskFile) -> dict[str, Any]:
    if file.form == "contexts":
        return {
            # lm-eval's own way to vary the context: its text is the index of the right one.
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        }
    if file.task == _MMLU:
        about = "" if file.name == _MMLU else f" about {file.path.stem.replace('_', ' ')}"
        return {
            "description": "The following are multiple choice questions "
            f"(with answers){about}.\n\n",
            "doc_to_text": _ask_with_letters,
            "doc_to_choice": _list_letters,
        }
    ask: Callable[..., str] | str = _ask if file.task in _ANSWERED else "query"
    return {"doc_to_text": ask, "doc_to_choice": "choices"}


def _ask(row: Mapping[str, Any]) -> str:
    query: str = row["query"]
    if query.rstrip().endswith("Answer:"):
        return query.rstrip()
    return query.removesuffix("\n") + "\nAnswer:"


def _ask_with_letters(row: Mapping[str, Any]) -> str:
    query, choices, letters = row["query"].strip(), row["choices"], _list_letters(row)
    if choices == letters:
        return _ask({"query": query})
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([query, *lines, "Answer:"])


def _list_letters(row: Mapping[str, Sequence[str]]) -> list[str]:
    return list(_LETTERS[: len(row["choices"])])

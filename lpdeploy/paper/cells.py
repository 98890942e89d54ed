"""What a cell of a table is: the commands that make it, and the key that identifies it."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import compute_sha256
from lpdeploy.errors import OptionError
from lpdeploy.fields import RENAMED
from lpdeploy.paper.tables import Row, Table

# Options of prune that do not change a result.
_WITHOUT_EFFECT = ("checkpoint_every", "ignore_memory", "eval_every", "eval_samples")
# Keys are made of the names that options had when the first cells were run.
_FORMER_NAMES = {name: former for former, name in RENAMED.items()}
# How peft starts LoRA, and how the first cells did: their keys do not name it.
_FIRST_INIT = "peft"
# One run scores all groups. The ratio that it then prunes to does not matter.
_SIMILARITY_RATIO = 0.5


@dataclass(frozen=True)
class Source:
    """Data or a model that a command reads.

    Attributes:
        given: Path or hub name, as the user gave it.
        name: Name that is shown: the last part of a path, or the hub name.
        identity: SHA-256 of a file or folder, or the hub name.
    """

    given: str
    name: str
    identity: str


def identify_source(given: str) -> Source:
    """Hash a local file or folder, so that cells of different data have different keys."""
    path = Path(given)
    if path.is_file():
        return Source(given, path.name, compute_sha256(path))
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)} {compute_sha256(file)}\n".encode())
        return Source(given, name_path(path), digest.hexdigest())
    return Source(given, given, given)


def name_path(path: Path) -> str:
    """Return the last part of a path, or the folder's name for ``.``."""
    return path.name or path.resolve().name


@dataclass(frozen=True)
class EvalSettings:
    """What each pruned model is measured on; nothing if there are neither texts nor tasks.

    Attributes:
        perplexity: Texts.
        seq_len: Number of tokens per segment of a text.
        tasks: Names of tasks.
        task_data: Folder with the data of the tasks; None for the hub.
        max_segments: Number of segments of each text that are measured; None for all.
        limit: Number of documents of each task that are run; None for all.
        examples: Whether the models answer the instructions of Table 9.
    """

    perplexity: tuple[Source, ...] = ()
    seq_len: int = 2048
    tasks: tuple[str, ...] = ()
    task_data: Source | None = None
    max_segments: int | None = None
    limit: int | None = None
    examples: bool = False

    def __bool__(self) -> bool:
        return bool(self.perplexity or self.tasks or self.examples)

    def to_json(self) -> dict[str, Any]:
        """Return what determines the result, without paths."""
        parts = {
            "max_segments": self.max_segments,
            "limit": self.limit,
            "examples": self.examples or None,
        }
        return {
            "perplexity": {s.name: s.identity for s in self.perplexity},
            "seq_len": self.seq_len if self.perplexity else None,
            "tasks": ",".join(self.tasks) or None,
            "task_data": self.task_data.identity if self.task_data else None,
        } | {name: number for name, number in parts.items() if number is not None}

    def list_words(self, *, seq_len: str) -> list[str]:
        """Return the options of a command whose option for the segments is ``seq_len``."""
        words = [word for source in self.perplexity for word in ("--perplexity", source.given)]
        words += [seq_len, str(self.seq_len)] if self.perplexity else []
        words += ["--max-segments", str(self.max_segments)] if self.max_segments else []
        words += ["--tasks", ",".join(self.tasks)] if self.tasks else []
        words += ["--task-data", self.task_data.given] if self.task_data else []
        return words + (["--limit", str(self.limit)] if self.limit else [])


@dataclass(frozen=True)
class Study:
    """What all cells share.

    Attributes:
        model: The model to prune.
        data: Data to prune and fine-tune with.
        prune_words: Options of ``prune`` as the user typed them.
        prune_options: Option -> value: these words, a recipe and the defaults, parsed.
        evaluation: What is measured.
    """

    model: Source
    data: Source
    prune_words: tuple[str, ...]
    prune_options: Mapping[str, Any]
    evaluation: EvalSettings


@dataclass(frozen=True)
class Cell:
    """One run of one row.

    Attributes:
        row: The row.
        ratio: Share of groups to remove; 0 for the unpruned model.
        seed: None for the unpruned model.
        own: Options of ``prune`` that the cell sets.
        options: All options of ``prune``; empty for the unpruned model.
        evaluation: What is measured.
        key: Readable words, and a hash of everything that determines the result.
    """

    row: Row
    ratio: float
    seed: int | None
    own: Mapping[str, Any]
    options: Mapping[str, Any]
    evaluation: EvalSettings
    key: str


@dataclass(frozen=True)
class Selection:
    """The part of a table to run.

    Attributes:
        table: The table.
        rows: Rows of it.
        ratios: Shares of groups to remove.
        seeds: Number of seeds: 0, 1, ...
    """

    table: Table
    rows: tuple[Row, ...]
    ratios: tuple[float, ...]
    seeds: int


def select(
    table: Table, *, rows: Sequence[str] = (), ratios: Sequence[float] = (), seeds: int = 3
) -> Selection:
    """Choose rows and ratios of a table; all rows and the paper's ratios by default.

    Raises:
        OptionError: There is no such row, or nothing is left to compare.
    """
    known = {row.name: row for row in table.rows}
    for name in rows:
        if name not in known:
            raise OptionError(
                f"{table.heading} has no row '{name}'. Choose from {', '.join(known)}."
            )
    chosen = tuple(row for row in table.rows if not rows or row.name in rows)
    if table.kind == "similarity" and len(chosen) < 2:
        raise OptionError(f"{table.heading} compares two rows. Leave --rows out.")
    if table.kind == "texts":  # the texts of several seeds have no mean
        seeds = 1
    return Selection(table, chosen, tuple(ratios) or table.ratios, seeds)


def list_cells(selection: Selection, study: Study) -> list[Cell]:
    """List the cells in the order in which they run: seed 0 of all rows first.

    Raises:
        OptionError: A row scales the steps, but the options of ``prune`` have none.
    """
    table = selection.table
    dense = [_build_dense(row, study) for row in selection.rows if row.dense]
    pruned = [row for row in selection.rows if not row.dense]
    if any(row.step_factor is not None for row in pruned) and not study.prune_options.get("steps"):
        raise OptionError(
            f"{table.heading} varies the steps, so it needs to know them. "
            "Give --steps N among the options of prune, after '--'."
        )
    ratios = (_SIMILARITY_RATIO,) if table.kind == "similarity" else selection.ratios
    return dense + [
        build_cell(row, study, ratio=ratio, seed=seed, measured=table.kind != "similarity")
        for seed in range(selection.seeds)
        for ratio in ratios
        for row in pruned
    ]


def build_cell(row: Row, study: Study, *, ratio: float, seed: int, measured: bool = True) -> Cell:
    """Return one cell of a row; ``measured`` says whether its model is evaluated."""
    own = dict(row.options)
    if study.prune_options.get("lora_init") is None:
        own = {"lora_init": _FIRST_INIT, **own}
    if row.step_factor is not None:
        own["steps"] = max(1, round(row.step_factor * study.prune_options["steps"]))
    own |= {"ratio": ratio, "seed": seed}
    options = {**study.prune_options, **own}
    schedule = options.get("schedule", "joint")
    parts = [options.get("criterion", "lora"), *([] if schedule == "joint" else [schedule])]
    parts += [f"{ratio:g}", f"seed{seed}"]
    evaluation = study.evaluation if measured else EvalSettings()
    key = _compute_key(parts, study, options=options, evaluation=evaluation)
    return Cell(row, ratio, seed, own, options, evaluation, key)


def _build_dense(row: Row, study: Study) -> Cell:
    # Of the options of prune, only the device matters to the unpruned model.
    options = {"device": study.prune_options.get("device", "auto")}
    key = _compute_key(["dense"], study, options=options, evaluation=study.evaluation)
    return Cell(row, 0.0, None, {}, {}, study.evaluation, key)


def _compute_key(
    parts: Sequence[str], study: Study, *, options: Mapping[str, Any], evaluation: EvalSettings
) -> str:
    identity = {
        "model": study.model.identity,
        "data": study.data.identity if len(options) > 1 else None,
        # An option that is None or False was not given. Leaving it out lets a later version, which
        # may have more options, find the cells of this one.
        "options": {
            _FORMER_NAMES.get(name, name): value
            for name, value in options.items()
            if value is not None
            and value is not False
            and name not in _WITHOUT_EFFECT
            and (name, value) != ("lora_init", _FIRST_INIT)
        },
        "evaluation": evaluation.to_json() if evaluation else None,
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return "-".join([*parts, hashlib.sha256(text.encode()).hexdigest()[:10]])


def list_prune_words(cell: Cell, study: Study, *, run: Path) -> list[str]:
    """Return the words of a cell's ``prune`` command."""
    words = ["prune", study.model.given, "--data", study.data.given, "--output", str(run)]
    return [*words, *study.prune_words, *_list_options(cell.own)]


def list_eval_words(cell: Cell, study: Study, *, model: str) -> list[str]:
    """Return the words of a cell's ``eval`` command."""
    words = ["eval", model, *cell.evaluation.list_words(seq_len="--seq-len")]
    return [*words, *_list_device_words(study)]


def list_generate_words(study: Study, *, model: str) -> list[str]:
    """Return the words of a cell's ``generate`` command."""
    return ["generate", model, "--examples", *_list_device_words(study)]


def _list_device_words(study: Study) -> list[str]:
    device = study.prune_options.get("device", "auto")
    return [] if device == "auto" else ["--device", device]


def _list_options(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):  # a flag, which is off unless it is given
            words += [flag] if value else []
        else:
            words += [flag, str(value)]
    return words


def show_command(words: Iterable[str]) -> str:
    """Write a command for readers, with each path cut to its last part."""
    return shlex.join(["lpdeploy", *show_words(words)])


def show_words(words: Iterable[str]) -> list[str]:
    """Cut each word that is a path, or an option with one, to its last part."""
    return [_cut_path(word) for word in words]


def _cut_path(word: str) -> str:
    option, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not value or not Path(value).exists():
        return word
    return f"{option}{mark}{name_path(Path(value))}"

"""The dense and the pruned model in every form that was measured: its size, quality and speed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.engines import TORCH
from lpdeploy.evaluation.results import Evaluation, Figures, Perplexity
from lpdeploy.models.record import ModelRecord

ExportSizes = Mapping[tuple[str, str], int]
"""(engine, precision) -> bytes of the export of a run."""
FULL = ("fp32", "fp16", "bf16")
"""Precisions that round no weight of a checkpoint by more than its own format does."""


@dataclass(frozen=True, order=True)
class Text:
    """What a perplexity was measured on; only figures on the same one can be compared.

    Attributes:
        name: Last part of its source.
        seq_len: Tokens in a segment.
        tokens: Number of predicted tokens.
    """

    name: str
    seq_len: int
    tokens: int


@dataclass(frozen=True)
class Form:
    """A model as it can be run.

    Attributes:
        pruned: Whether it is the pruned model; otherwise the dense one.
        engine: What runs it.
        precision: What it computes in; empty where it is not known.
        parameters: Of the model; None where it is not known.
        bytes: Of its weights on disk, likewise.
        perplexity: On each text.
        accuracy: Mean accuracy over ``tasks``; None over nothing.
        tasks: Names of tasks.
        documents: Number of their documents.
        times: Phase -> the row of the benchmark, LoRA merged.
    """

    pruned: bool
    engine: str
    precision: str
    parameters: int | None = None
    bytes: int | None = None
    perplexity: Mapping[Text, Perplexity] = field(default_factory=dict)
    accuracy: float | None = None
    tasks: tuple[str, ...] = ()
    documents: int = 0
    times: Mapping[str, LatencyRow] = field(default_factory=dict)

    @property
    def runs_on(self) -> str:
        """Its engine and precision."""
        return f"{self.engine} {self.precision}".strip()

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return f"{'pruned' if self.pruned else 'dense'}, {self.runs_on}"

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are rounded to fewer bits than a checkpoint has."""
        return bool(self.precision) and self.precision not in FULL


def list_forms(
    record: ModelRecord | None,
    evaluations: Sequence[Evaluation],
    bench: LatencyResult | None,
    exports: ExportSizes,
) -> tuple[Form, ...]:
    """List the dense model, then the pruned one, in each form that something is known of.

    Rows of the benchmark that are of other models, or of an unmerged adapter, are left out.

    Args:
        record: Of the pruned model; without one there is none.
        evaluations: Of the pruned model.
        bench: The benchmark, or None.
        exports: What lies in the run.
    """
    if record is None:
        return ()
    rows = list(_list_rows(record, bench))
    plain = _find_plain_precision(evaluations, rows)
    keys = [(False, TORCH.name, plain), (True, TORCH.name, plain)]
    keys += [(True, part.engine, part.precision) for part in evaluations]
    keys += [(row.ratio > 0, row.engine, row.precision) for row in rows]
    keys += [(True, *key) for key in exports]
    return tuple(
        _build_form(key, record, evaluations, rows, exports)
        for key in sorted(dict.fromkeys(keys), key=lambda key: key[0])
    )


def _list_rows(record: ModelRecord, bench: LatencyResult | None) -> Iterator[LatencyRow]:
    """Yield the merged rows of this run and of its base, of the first batch size."""
    for row in bench.rows if bench else ():
        expected = record.parameters["after" if row.ratio > 0 else "before"]
        first = bench.rows[0].batch if bench else 0
        if row.merged and row.batch == first and row.parameters == expected:
            yield row


def _find_plain_precision(evaluations: Sequence[Evaluation], rows: Sequence[LatencyRow]) -> str:
    """Return what torch computes in: the precision of the checkpoint."""
    found = [(part.engine, part.precision) for part in evaluations]
    found += [(row.engine, row.precision) for row in rows]
    return next((precision for engine, precision in found if engine == TORCH.name), "")


def _build_form(
    key: tuple[bool, str, str],
    record: ModelRecord,
    evaluations: Sequence[Evaluation],
    rows: Sequence[LatencyRow],
    exports: ExportSizes,
) -> Form:
    pruned, engine, precision = key
    times = {row.phase: row for row in rows if (row.ratio > 0, row.engine, row.precision) == key}
    side = "after" if pruned else "before"
    size = next((row.bytes for row in times.values()), None)
    if size is None and engine == TORCH.name:
        size = record.bytes[side]
    if size is None and pruned:
        size = exports.get((engine, precision))
    found = list(_list_figures(key, evaluations))
    answered = next((figures for _, figures in found if figures.average is not None), Figures())
    return Form(
        *key,
        parameters=record.parameters[side],
        bytes=size,
        perplexity=_collect_perplexity(found),
        accuracy=answered.average,
        tasks=tuple(answered.average_over),
        documents=int(sum(answered.tasks[name].get("n") or 0 for name in answered.average_over)),
        times=times,
    )


def _list_figures(
    key: tuple[bool, str, str], evaluations: Sequence[Evaluation]
) -> Iterator[tuple[int, Figures]]:
    """Yield the tokens in a segment, and what was measured of a form."""
    pruned, engine, _ = key
    for part in evaluations:
        figures = part.figures if pruned else _find_base(part, engine)
        if figures is not None and (not pruned or (part.engine, part.precision) == key[1:]):
            yield part.seq_len, figures


def _collect_perplexity(found: Sequence[tuple[int, Figures]]) -> dict[Text, Perplexity]:
    perplexity: dict[Text, Perplexity] = {}
    for seq_len, figures in found:
        for source, measured in figures.perplexity.items():
            name = PurePath(source).name or source
            perplexity.setdefault(Text(name, seq_len, measured.tokens), measured)
    return perplexity


def _find_base(part: Evaluation, engine: str) -> Figures | None:
    return part.base if engine == TORCH.name else None  # `eval` runs the base on torch


def get_dense(forms: Sequence[Form]) -> Form | None:
    """Return the dense model on torch; None if there is no model yet."""
    return next((form for form in forms if not form.pruned and form.engine == TORCH.name), None)


def get_plain(forms: Sequence[Form]) -> Form | None:
    """Return the pruned model whose figures stand for it.

    That is on torch where its quality was measured there, else the least rounded form with a
    quality; None if there is no model yet.
    """
    pruned = [form for form in forms if form.pruned]
    if not pruned:
        return None
    return min(
        pruned,
        key=lambda form: (
            not (form.perplexity or form.tasks),
            form.is_quantized,
            form.engine != TORCH.name,
        ),
    )


def choose_text(forms: Sequence[Form]) -> Text | None:
    """Return the text that a plot shows: one that most forms, and the dense one, have."""
    texts = list(dict.fromkeys(text for form in forms for text in form.perplexity))
    counts = {text: sum(text in form.perplexity for form in forms) for text in texts}
    dense = get_dense(forms)
    known = dense.perplexity if dense else {}
    return max(texts, key=lambda text: (text in known, counts[text]), default=None)

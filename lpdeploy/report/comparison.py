"""Several runs of one model side by side, with what none of the others beats."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from lpdeploy.benchmark.results import LatencyRow
from lpdeploy.errors import ArtifactError
from lpdeploy.manifest import StageRecord
from lpdeploy.report.facts import Facts
from lpdeploy.report.forms import Form, Text, get_dense, get_plain
from lpdeploy.report.front import find_front
from lpdeploy.report.origin import name_source
from lpdeploy.report.verdict import judge


@dataclass(frozen=True, order=True)
class Work:
    """What a latency was measured of; only times of the same work can be compared.

    Attributes:
        engine: What ran the model.
        precision: What it computed in.
        phase: ``prefill`` or ``decode``.
        tokens: Prompt tokens.
        batch: Rows.
        machine: GPU or CPU, and threads.
    """

    engine: str
    precision: str
    phase: str
    tokens: int
    batch: int
    machine: str

    @property
    def name(self) -> str:
        """What its column is called."""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.engine} {self.precision}, {self.phase} at {self.tokens} tokens{batch}"


@dataclass(frozen=True)
class Contender:
    """The dense model, a run, or a rounded export of one, in a comparison.

    Attributes:
        name: What it is called.
        run: The run as it was given; None for the dense model.
        parameters: Of the model; None where it has not been compacted.
        bytes: Of its weights on disk, likewise.
        removed: Share of parameters, heads, channels and layers that went.
        criterion: How groups were chosen; None for the dense model, and where it is not recorded.
        schedule: When they were removed, likewise.
        method: Both in words, with what else was done; None for the dense model.
        verdict: What the page of the run says, likewise.
        perplexity: On each text.
        accuracy: Mean over the tasks, or None.
        times: Of each work.
    """

    name: str
    run: str | None
    parameters: int | None
    bytes: int | None
    removed: Mapping[str, float] = field(default_factory=dict)
    criterion: str | None = None
    schedule: str | None = None
    method: str | None = None
    verdict: str | None = None
    perplexity: Mapping[Text, float] = field(default_factory=dict)
    accuracy: float | None = None
    times: Mapping[Work, LatencyRow] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs of one model side by side.

    Attributes:
        base: The dense model.
        contenders: It, the runs, and their rounded exports.
        texts: What perplexities were measured on.
        tasks: What accuracies are the mean of.
        works: What latencies were measured of.
        measure: What quality is on the fronts: a text, ``accuracy``, or None if nothing was
            measured.
        size_front: Indices of the contenders that no other beats in quality and bytes.
        work: The work of the other front; None if no time can be compared.
        time_front: Likewise in quality, and in time over that of the dense model.
    """

    base: str
    contenders: tuple[Contender, ...]
    texts: tuple[Text, ...]
    tasks: tuple[str, ...]
    works: tuple[Work, ...]
    measure: Text | str | None
    size_front: tuple[int, ...]
    work: Work | None
    time_front: tuple[int, ...]

    def get_quality(self, contender: Contender) -> float | None:
        """Return the quality that the fronts take, lower is better; None if it is not known."""
        if isinstance(self.measure, Text):
            return contender.perplexity.get(self.measure)
        return None if contender.accuracy is None else 1 - contender.accuracy

    def to_json(self) -> dict[str, Any]:
        """Return what the command prints with ``--json``."""
        rows = [
            {
                **{name: getattr(own, name) for name in _PLAIN},
                "perplexity": {text.name: value for text, value in own.perplexity.items()},
                "latency": [
                    {**asdict(work), "median_ms": row.median_ms, "relative": row.relative}
                    for work, row in own.times.items()
                ],
                "on_size_front": index in self.size_front,
                "on_time_front": index in self.time_front,
            }
            for index, own in enumerate(self.contenders)
        ]
        measure = self.measure.name if isinstance(self.measure, Text) else self.measure
        return {
            "base": self.base,
            "quality": measure,
            "work": asdict(self.work) if self.work else None,
            "texts": [asdict(text) for text in self.texts],
            "tasks": list(self.tasks),
            "rows": rows,
        }


_PLAIN = (
    *("name", "run", "parameters", "bytes", "removed"),
    *("criterion", "schedule", "method", "verdict", "accuracy"),
)


def build_comparison(known: Sequence[tuple[str, Facts]]) -> Comparison:
    """Put runs side by side.

    Args:
        known: Each run as it was given, and what is known of it.

    Raises:
        ArtifactError: The runs are of different models, or were measured on different things.
    """
    _check_same_base(known)
    _check_same_measures(known)
    names = _name_runs(known)
    contenders = [_describe_dense(known)]
    for name, (given, facts) in zip(names, known, strict=True):
        contenders += _describe_run(name, given, facts)
    texts = dict.fromkeys(text for own in contenders for text in own.perplexity)
    works = sorted({work for own in contenders for work in own.times})
    tasks = next((f.tasks for _, facts in known for f in facts.forms if f.tasks), ())
    plain = Comparison(
        base=name_source(known[0][1].plan.base_model),
        contenders=tuple(contenders),
        texts=tuple(texts),
        tasks=tasks,
        works=tuple(works),
        measure=_choose_measure(contenders, list(texts)),
        size_front=(),
        work=None,
        time_front=(),
    )
    return _find_fronts(plain)


def _check_same_base(known: Sequence[tuple[str, Facts]]) -> None:
    first, facts = known[0]
    for given, other in known[1:]:
        if other.plan.base_sha256 != facts.plan.base_sha256:
            names = [name_source(each.plan.base_model) for each in (facts, other)]
            raise ArtifactError(
                f"'{first}' and '{given}' were pruned from different models ({names[0]} and "
                f"{names[1]}), so that their figures do not compare. Give runs of one model."
            )


def _check_same_measures(known: Sequence[tuple[str, Facts]]) -> None:
    """Refuse figures that look alike and were measured on different things."""
    for (one, a), (other, b) in combinations(known, 2):
        texts = _list_texts(a)
        for name, text in _list_texts(b).items():
            if texts.get(name, text) != text:
                raise ArtifactError(
                    f"{name} was measured on other segments in '{one}' ({_write_text(texts[name])})"
                    f" than in '{other}' ({_write_text(text)}). Run 'lpdeploy eval' on both with "
                    "the same options."
                )
        left, right = _find_answered(a), _find_answered(b)
        if left and right and (left.tasks, left.documents) != (right.tasks, right.documents):
            raise ArtifactError(
                f"Accuracy was measured on other questions in '{one}' ({_write_tasks(left)}) than "
                f"in '{other}' ({_write_tasks(right)}). Run 'lpdeploy eval' on both with the same "
                "tasks."
            )


def _list_texts(facts: Facts) -> dict[str, Text]:
    """Return what each text is to a run: as the model itself was measured, if it was."""
    pruned = [form for form in facts.forms if form.pruned]
    pruned.sort(key=lambda form: form != get_plain(pruned), reverse=True)
    return {text.name: text for form in pruned for text in form.perplexity}


def _find_answered(facts: Facts) -> Form | None:
    return next((form for form in facts.forms if form.pruned and form.tasks), None)


def _write_text(text: Text) -> str:
    return f"{text.tokens:,} tokens in segments of {text.seq_len:,}"


def _write_tasks(form: Form) -> str:
    return f"{form.documents:,} of {', '.join(form.tasks)}"


def _name_runs(known: Sequence[tuple[str, Facts]]) -> list[str]:
    """Name each run by its folder, or as it was given where two folders have one name."""
    names = [facts.name for _, facts in known]
    return [
        name if names.count(name) == 1 else given
        for name, (given, _) in zip(names, known, strict=True)
    ]


def _describe_dense(known: Sequence[tuple[str, Facts]]) -> Contender:
    """Describe the model that all runs were pruned from, by what any of them knows of it."""
    forms = [form for _, facts in known for form in facts.forms if not form.pruned]
    figures = [dense for _, facts in known if (dense := get_dense(facts.forms))]
    perplexity = {t: m.perplexity for form in figures for t, m in form.perplexity.items()}
    times: dict[Work, LatencyRow] = {}
    for _, facts in known:
        own = [form for form in facts.forms if not form.pruned]
        times = dict(_list_times(facts, own)) | times  # of the first run that timed it
    return Contender(
        name="dense",
        run=None,
        parameters=next((form.parameters for form in forms), None),
        bytes=next((form.bytes for form in figures), None),
        perplexity=perplexity,
        accuracy=next((form.accuracy for form in figures if form.accuracy is not None), None),
        times=times,
    )


def _describe_run(name: str, given: str, facts: Facts) -> Iterator[Contender]:
    """Yield a run, and each rounded form of it whose quality was measured."""
    options = facts.stages.get("prune", StageRecord()).options
    full = [form for form in facts.forms if form.pruned and not form.is_quantized]
    shown: dict[str, tuple[Form | None, list[Form]]] = {name: (get_plain(full), full)}
    for form in facts.forms:
        if form.pruned and form.is_quantized and (form.perplexity or form.tasks):
            shown[f"{name}, {form.runs_on}"] = form, [form]
    for title, (own, timed) in shown.items():
        yield Contender(
            name=title,
            run=given,
            parameters=own.parameters if own else None,
            bytes=own.bytes if own else None,
            removed=dict(facts.plan.achieved),
            criterion=options.get("criterion"),
            schedule=options.get("schedule"),
            method=facts.method,
            verdict=judge(facts).word,
            perplexity={t: m.perplexity for t, m in (own.perplexity if own else {}).items()},
            accuracy=own.accuracy if own else None,
            times=dict(_list_times(facts, timed)),
        )


def _list_times(facts: Facts, forms: Sequence[Form]) -> Iterator[tuple[Work, LatencyRow]]:
    if facts.bench is None:
        return
    machine = facts.bench.machine
    where = f"{machine.gpu or machine.cpu}, {machine.threads} threads"
    for form in forms:
        for phase, row in form.times.items():
            yield Work(row.engine, row.precision, phase, row.tokens, row.batch, where), row


def _choose_measure(contenders: Sequence[Contender], texts: Sequence[Text]) -> Text | str | None:
    """Return the text that most have a perplexity on, or ``accuracy`` where more have one."""
    counts: dict[Text | str, int] = {
        text: sum(text in own.perplexity for own in contenders) for text in texts
    }
    counts["accuracy"] = sum(own.accuracy is not None for own in contenders)
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


def _find_fronts(plain: Comparison) -> Comparison:
    qualities = [plain.get_quality(own) for own in plain.contenders]
    by_size = [
        None if quality is None or own.bytes is None else (float(own.bytes), quality)
        for own, quality in zip(plain.contenders, qualities, strict=True)
    ]
    by_time: dict[Work, list[tuple[float, float] | None]] = {
        work: [
            None if quality is None or (time := _get_relative(own, work)) is None
            else (time, quality)
            for own, quality in zip(plain.contenders, qualities, strict=True)
        ]
        for work in plain.works
    }  # fmt: skip
    counts = {work: len(points) - points.count(None) for work, points in by_time.items()}
    work = max(counts, key=lambda name: (counts[name], name.phase == "decode"), default=None)
    if work is not None and counts[work] < 2:
        work = None
    return replace(
        plain,
        size_front=find_front(by_size),
        work=work,
        time_front=find_front(by_time[work]) if work else (),
    )


def _get_relative(own: Contender, work: Work) -> float | None:
    row = own.times.get(work)
    return row.relative if row else None

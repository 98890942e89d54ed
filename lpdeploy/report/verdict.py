"""The verdict on a run: one line, a level, and the sentences that it rests on."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lpdeploy.benchmark.results import LatencyRow
from lpdeploy.engines.verification import VerifyResult
from lpdeploy.plan import PruningPlan
from lpdeploy.report.facts import Facts
from lpdeploy.report.forms import Form, Text, get_dense, get_plain

GOOD, LOSS, OPEN, BAD = "good", "loss", "open", "bad"
WORDS = {GOOD: "Good", LOSS: "With losses", OPEN: "Not complete", BAD: "Problem"}
"""Level -> what is said of a run."""

# The paper loses 34 % of LLaMA-7B's perplexity on WikiText2 and 2.6 points of accuracy at 20 %, and
# 104 % and 10.5 points at 50 % (its Table 2). Less than the former is good, and half of the latter
# perplexity, or all of these points, is more than a user expects of a model that still works.
_LOSS_GROWTH, _BAD_GROWTH = 0.20, 0.50
_LOSS_POINTS, _BAD_POINTS = 0.03, 0.10
# Where the slowest tenth takes half as long again as the fastest, something else was running.
_UNSTEADY = 1.5


@dataclass(frozen=True)
class Finding:
    """One thing that a verdict rests on.

    Attributes:
        level: What it makes of the run.
        sentence: What was found.
    """

    level: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """What a run is worth, as far as it is known.

    Attributes:
        level: ``good`` only if everything was looked at and nothing is wrong, ``loss``, ``open``
            where something was not measured, or ``bad``.
        headline: Size, speed and quality in one line.
        findings: Why, the worst first.
    """

    level: str
    headline: str
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """The level in words."""
        return WORDS[self.level]


def judge(facts: Facts) -> Verdict:
    """Say what a run is worth."""
    found = [
        *_judge_verification(facts.verification),
        *_judge_quality(facts),
        *_judge_speed(facts.forms),
    ]
    order = [BAD, LOSS, OPEN, GOOD]
    found.sort(key=lambda finding: order.index(finding.level))
    level = found[0].level if found else GOOD
    return Verdict(level, write_headline(facts), tuple(found))


def write_headline(facts: Facts) -> str:
    """Write size, speed and quality in one line, as far as they are known."""
    parts = [
        f"{100 * count_removed(facts.plan):.0f} % fewer parameters",
        describe_speed(facts.forms),
        describe_quality(facts.forms),
    ]
    return ", ".join(part for part in parts if part)


def count_removed(plan: PruningPlan) -> float:
    """Return the share of the parameters that went; 0 for a plan that does not say."""
    return plan.achieved.get("parameters", 0.0)


def _judge_verification(found: VerifyResult | None) -> Iterator[Finding]:
    if found is None:
        yield Finding(OPEN, "It has not been verified that all stages compute the same.")
        return
    for pair in found.pairs:
        if not pair.ok:
            yield Finding(
                BAD, f"{pair.a} and {pair.b} do not compute the same: logits differ by "
                f"{pair.max_abs_diff:.1e}, more than {pair.tolerance or 0:.1e}.",
            )  # fmt: skip
    for check in found.weights:
        if not check.ok:
            count = f"{len(check.wrong)} of the {check.num_weights}"
            yield Finding(BAD, f"{count} weights of {check.b} are not those of {check.a}.")
    if found.ok:
        but = f"; {', '.join(found.quantized)} is rounded" if found.quantized else ""
        yield Finding(GOOD, f"Every stage that was compared computes the same{but}.")


def _judge_quality(facts: Facts) -> Iterator[Finding]:
    dense = get_dense(facts.forms)
    if dense is None:
        yield Finding(OPEN, "The smaller model has not been written yet ('lpdeploy compact').")
        return
    pruned = [form for form in facts.forms if form.pruned]
    found = [item for form in pruned for item in _compare(form, dense)]
    if not found:
        yield Finding(
            OPEN, "Its quality has not been compared with that of the unpruned model "
            "('lpdeploy eval RUN --perplexity SOURCE --with-base').",
        )  # fmt: skip
    yield from found


def _compare(form: Form, dense: Form) -> Iterator[Finding]:
    for text, measured in form.perplexity.items():
        if text in dense.perplexity:
            before = dense.perplexity[text].perplexity
            growth = measured.perplexity / before - 1
            level = _grade(growth, _LOSS_GROWTH, _BAD_GROWTH)
            yield Finding(
                level, f"On {form.runs_on}, perplexity on {text.name} is "
                f"{write_change(growth)} the dense model's.",
            )  # fmt: skip
    if form.accuracy is not None and dense.accuracy is not None and form.tasks == dense.tasks:
        lost = dense.accuracy - form.accuracy
        yield Finding(
            _grade(lost, _LOSS_POINTS, _BAD_POINTS),
            f"On {form.runs_on}, accuracy is {abs(100 * lost):.1f} points "
            f"{'below' if lost > 0 else 'above'} the dense model's.",
        )


def write_change(growth: float) -> str:
    """Write a growth as the words before ``the dense model's``."""
    if not math.isfinite(growth):
        return "not a finite number, unlike"
    return f"{abs(100 * growth):.0f} % {'above' if growth >= 0 else 'below'}"


def _grade(loss: float, some: float, much: float) -> str:
    if not math.isfinite(loss) or loss > much:
        return BAD
    return LOSS if loss > some else GOOD


def _judge_speed(forms: Sequence[Form]) -> Iterator[Finding]:
    for form in forms:
        for phase, row in form.times.items():
            if form.pruned and _is_slower(row):
                yield Finding(
                    LOSS, f"On {form.runs_on}, {phase} takes {100 * ((row.relative or 1) - 1):.0f} "
                    "% longer than with the dense model.",
                )  # fmt: skip
    if list_unsteady([row for form in forms for row in form.times.values()]):
        yield Finding(GOOD, "The times are not steady, so the factors above are rough.")


def _is_slower(row: LatencyRow) -> bool:
    """Tell whether even the fastest tenth takes longer than the dense model does."""
    return bool(row.relative) and row.p10_ms > row.median_ms / (row.relative or 1)


def list_unsteady(rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """List the rows whose times vary so much that the machine must have done other work."""
    return [row for row in rows if row.spread > _UNSTEADY]


def describe_speed(forms: Sequence[Form]) -> str:
    """Say how fast the pruned model is on the engine that decodes it, or reads it, fastest."""
    timed = [
        form for form in forms if form.pruned and any(row.relative for row in form.times.values())
    ]
    if not timed:
        return ""
    fastest = min(timed, key=lambda form: [form.times[p].median_ms for p in sorted(form.times)])
    factors = {phase: row.relative for phase, row in fastest.times.items() if row.relative}
    parts = [f"{phase} {1 / relative:.2g}" for phase, relative in factors.items()]
    return f"{' and '.join(parts)} times as fast on {fastest.runs_on}"


def describe_quality(forms: Sequence[Form]) -> str:
    """Say what pruning made of perplexity and accuracy, or what they are."""
    dense, plain = get_dense(forms), get_plain(forms)
    if dense is None or plain is None:
        return ""
    both = [text for text in plain.perplexity if text in dense.perplexity]
    parts = [
        f"perplexity {_write_step(text, dense, plain)} on {text.name}"
        for text in both or plain.perplexity
    ]
    if plain.accuracy is not None:
        known = dense.accuracy is not None and dense.tasks == plain.tasks
        before = f"{100 * (dense.accuracy or 0):.1f} to " if known else ""
        count = f"{len(plain.tasks)} task{'s' if len(plain.tasks) > 1 else ''}"
        parts.append(f"accuracy {before}{100 * plain.accuracy:.1f} % over {count}")
    return ", ".join(parts)


def _write_step(text: Text, dense: Form, plain: Form) -> str:
    after = f"{plain.perplexity[text].perplexity:.2f}"
    if text not in dense.perplexity:
        return after
    return f"{dense.perplexity[text].perplexity:.2f} to {after}"

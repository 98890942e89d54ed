"""Plots as SVG text, for files and for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from lpdeploy.benchmark.pruning_table import name_variant
from lpdeploy.benchmark.results import LatencyResult, LatencyRow, PruningResult
from lpdeploy.plotting import COLORS, INK, make_panels, to_svg

_MERGED, _UNMERGED = COLORS[:2]


def draw_latency(bench: LatencyResult) -> str:
    """Draw medians with their p10 to p90, a panel an engine and phase, merged beside unmerged.

    Of several batch sizes the first is drawn.

    Args:
        bench: The result.

    Returns:
        SVG.
    """
    first = bench.rows[0]
    chosen: dict[tuple[str, ...], list[LatencyRow]] = {}
    for row in bench.rows:
        if row.batch == first.batch:
            key = (row.phase, row.engine, row.precision)
            chosen.setdefault(key, []).append(row)
    phases = {phase for phase, *_ in chosen}
    figure, panels = make_panels(len(chosen), rows=len(phases))
    for panel, ((phase, *engine), rows) in zip(panels, chosen.items(), strict=True):
        _draw_engine(panel, rows)
        what = f"{first.tokens} tokens" if phase == "prefill" else "a token"
        panel.set_title(f"{' '.join(engine)}, {phase} of {what}, ms", loc="left", color=INK)
    fullest = max(panels, key=lambda panel: len(panel.containers))
    fullest.legend(frameon=False, loc="upper right")
    _share_scales(dict(zip(panels, (phase for phase, *_ in chosen), strict=True)))
    return to_svg(figure)


def _share_scales(phases: Mapping[Any, str]) -> None:
    """Give the panels of a phase one scale, so that engines can be compared by eye."""
    for phase in set(phases.values()):
        panels = [panel for panel, own in phases.items() if own == phase]
        top = max(panel.get_ylim()[1] for panel in panels)
        for panel in panels:
            panel.set_ylim(0, top)


def _draw_engine(panel: Any, rows: Sequence[LatencyRow]) -> None:
    ratios = sorted({row.ratio for row in rows})
    forms = [form for form in (True, False) if any(row.merged == form for row in rows)]
    width = 0.76 / len(forms)
    for place, merged in enumerate(forms):
        chosen = [row for row in rows if row.merged == merged]
        shift = (place - (len(forms) - 1) / 2) * width
        medians = [row.median_ms for row in chosen]
        low = [row.median_ms - row.p10_ms for row in chosen]
        high = [row.p90_ms - row.median_ms for row in chosen]
        bars = panel.bar(
            [ratios.index(row.ratio) + shift for row in chosen],
            medians,
            width * 0.95,
            color=_MERGED if merged else _UNMERGED,
            label="LoRA merged" if merged else "LoRA unmerged",
            yerr=[low, high],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
        )
        panel.bar_label(bars, fmt="%.3g", padding=3, color=INK, fontsize=9)
    panel.set_xticks(range(len(ratios)), [f"{ratio:.0%} pruned" for ratio in ratios])
    panel.set_xlim(-0.6, len(ratios) - 0.4)
    panel.margins(y=0.2)


def draw_training(steps: Sequence[int], *, losses: Sequence[float], ratios: Sequence[float]) -> str:
    """Draw loss, and the share of groups removed, over the steps of a run.

    Args:
        steps: Numbers of the steps.
        losses: Loss of each step, in nats per token.
        ratios: Share of groups that are gone after each step.

    Returns:
        SVG.
    """
    figure, (loss, ratio) = make_panels(2)
    loss.plot(steps, losses, color=_MERGED, linewidth=1.2)
    loss.set_title("loss, nats a token", loc="left", color=INK)
    ratio.step(steps, [100 * share for share in ratios], where="post", color=_UNMERGED)
    ratio.set_title("groups removed, %", loc="left", color=INK)
    for panel in (loss, ratio):
        panel.set_xlabel("step")
    return to_svg(figure)


def draw_pruning(bench: PruningResult) -> str:
    """Draw what a step costs by criterion: its time, and memory above the weights.

    Args:
        bench: The result.

    Returns:
        SVG.
    """
    rows = bench.rows
    names = [name_variant(row) for row in rows]
    figure, (time, memory) = make_panels(2)
    training = [(row.step_ms - row.scoring_ms) / 1e3 for row in rows]
    _stack(time, names, {"training": training, "scoring": [r.scoring_ms / 1e3 for r in rows]})
    time.set_title("a step, s", loc="left", color=INK)
    weights = [row.weight_bytes / 1e9 for row in rows]
    beside = [(row.beside_bytes or 0) / 1e9 for row in rows]
    _stack(memory, names, {"weights": weights, "beside them": beside})
    memory.set_title("memory at its peak, GB", loc="left", color=INK)
    return to_svg(figure)


def _stack(panel: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    bottom = [0.0] * len(names)
    for color, (label, values) in zip(COLORS, parts.items(), strict=False):
        panel.bar(range(len(names)), values, 0.7, bottom=bottom, color=color, label=label)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    for place, top in enumerate(bottom):
        panel.annotate(
            f"{top:.3g}", (place, top), xytext=(0, 3), textcoords="offset points", ha="center",
            color=INK, fontsize=9,
        )  # fmt: skip
    panel.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    panel.margins(y=0.25)
    panel.legend(frameon=False, loc="upper left")


def draw_run_costs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw seconds and memory of each step over whole runs.

    Args:
        runs: Name -> its steps, with ``seconds``, ``peak_bytes`` and ``ratio``.

    Returns:
        SVG.
    """
    figure, (time, memory, ratio) = make_panels(3)
    for color, (name, steps) in zip(COLORS, runs.items(), strict=False):
        places = range(1, len(steps) + 1)
        own = {"color": color, "label": name, "linewidth": 1.4}
        time.plot(places, [step["seconds"] for step in steps], **own)
        memory.plot(places, [(step["peak_bytes"] or 0) / 1e9 for step in steps], **own)
        ratio.step(places, [100 * step["ratio"] for step in steps], where="post", **own)
    titles = ("a step, s", "memory in it at its peak, GB", "groups removed, %")
    for panel, title in zip((time, memory, ratio), titles, strict=True):
        panel.set_title(title, loc="left", color=INK)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
    time.legend(frameon=False, loc="lower left")
    return to_svg(figure)

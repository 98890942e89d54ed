"""Plots as SVG text, for files and for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from lpdeploy.benchmark.pruning_table import name_variant
from lpdeploy.benchmark.results import LatencyResult, LatencyRow, PruningResult
from lpdeploy.plotting import COLORS, GRID, INK, make_panels, to_svg
from lpdeploy.pruning.log import StepInfo

_MERGED, _UNMERGED = COLORS[:2]
_ROOM = 1.25  # of the longest bar, so that its label has room behind it


def draw_latency(bench: LatencyResult) -> str:
    """Draw medians with their p10 to p90, a panel an engine and phase.

    Of several batch sizes the first is drawn.

    Args:
        bench: The result.

    Returns:
        SVG.
    """
    chosen = _group_rows(bench)
    phases = {phase for phase, _ in chosen}
    most = max(len(rows) for rows in chosen.values())
    figure, panels = make_panels(len(chosen), rows=len(phases), height=_measure_height(most))
    for panel, ((phase, engine), rows) in zip(panels, chosen.items(), strict=True):
        _draw_engine(panel, rows)
        panel.set_title(f"{engine}, {_name_work(phase, rows)}, ms", loc="left", color=INK)
    _share_scales(dict(zip(panels, (phase for phase, _ in chosen), strict=True)))
    return to_svg(figure)


def draw_latency_panels(bench: LatencyResult) -> dict[str, str]:
    """Draw the same as ``draw_latency``, each panel as a picture of its own.

    Returns:
        What a panel shows -> SVG.
    """
    chosen = _group_rows(bench)
    tops = {
        phase: max(row.p90_ms for (own, _), rows in chosen.items() if own == phase for row in rows)
        for phase, _ in chosen
    }
    drawn = {}
    for (phase, engine), rows in chosen.items():
        figure, (panel,) = make_panels(1, height=_measure_height(len(rows)))
        _draw_engine(panel, rows)
        panel.set_xlim(0, _ROOM * tops[phase])
        drawn[f"{engine}, {_name_work(phase, rows)}, ms"] = to_svg(figure)
    return drawn


def _group_rows(bench: LatencyResult) -> dict[tuple[str, str], list[LatencyRow]]:
    chosen: dict[tuple[str, str], list[LatencyRow]] = {}
    for row in bench.rows:
        if row.batch == bench.rows[0].batch:
            chosen.setdefault((row.phase, f"{row.engine} {row.precision}"), []).append(row)
    return chosen


def _measure_height(bars: int) -> float:
    return 0.9 + 0.42 * bars  # inches


def _name_work(phase: str, rows: Sequence[LatencyRow]) -> str:
    return f"{phase} of {rows[0].tokens} tokens" if phase == "prefill" else f"{phase} of a token"


def _share_scales(phases: Mapping[Any, str]) -> None:
    """Give the panels of a phase one scale, so that engines can be compared by eye."""
    for phase in set(phases.values()):
        panels = [panel for panel, own in phases.items() if own == phase]
        top = max(panel.get_xlim()[1] for panel in panels)
        for panel in panels:
            panel.set_xlim(0, top)


def _draw_engine(panel: Any, rows: Sequence[LatencyRow]) -> None:
    medians = [row.median_ms for row in rows]
    low = [row.median_ms - row.p10_ms for row in rows]
    high = [row.p90_ms - row.median_ms for row in rows]
    bars = panel.barh(
        range(len(rows)),
        medians,
        0.62,
        color=[_MERGED if row.merged else _UNMERGED for row in rows],
        xerr=[low, high],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
    )
    panel.bar_label(bars, fmt="%.3g", padding=4, color=INK, fontsize=9)
    panel.set_yticks(range(len(rows)), name_models(rows), fontsize=9)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, _ROOM * max(row.p90_ms for row in rows))
    panel.grid(axis="y", visible=False)
    panel.grid(axis="x", color=GRID, linewidth=0.8)


def name_models(rows: Sequence[LatencyRow]) -> list[str]:
    """Name the model of each row by the parameters that it has, which a ratio does not tell.

    Args:
        rows: Rows of one benchmark.

    Returns:
        Such as ``dense`` and ``47 % fewer parameters, LoRA unmerged``.
    """
    dense = next((row.parameters for row in rows if row.ratio == 0 and row.merged), None)
    dense = dense or next((row.parameters for row in rows if row.ratio == 0), None)
    several = len({row.merged for row in rows}) > 1
    names = []
    for row in rows:
        if row.ratio == 0:
            name = "dense"
        elif dense is None:
            name = f"{row.parameters / 1e6:,.4g} M parameters"
        else:
            name = f"{100 * (1 - row.parameters / dense):.0f} % fewer parameters"
        form = "LoRA merged" if row.merged else "LoRA unmerged"
        names.append(f"{name}, {form}" if several else name)
    return names


def draw_training(log: Sequence[StepInfo]) -> dict[str, str]:
    """Draw the loss, with the events and the held-out loss, and the share of groups removed.

    Args:
        log: What each step did.

    Returns:
        What a picture shows -> SVG.
    """
    steps = [info.step for info in log]
    figure, (loss,) = make_panels(1)
    loss.plot(steps, [info.loss for info in log], color=_MERGED, linewidth=1.2, label="training")
    _draw_events(loss, [info for info in log if info.removed])
    _draw_valid(loss, [info for info in log if info.valid_loss is not None])
    loss.set_xlabel("step")
    loss.legend(frameon=False, fontsize=8)
    shares, (ratio,) = make_panels(1)
    ratio.step(steps, [100 * count_gone(info) for info in log], where="post", color=_UNMERGED)
    ratio.set_xlabel("step")
    return {
        "loss, nats a token": to_svg(figure),
        "groups removed, %": to_svg(shares),
    }


def count_gone(info: StepInfo) -> float:
    """Return the share of groups that is gone after a step; of older logs, what was to go."""
    return info.ratio if info.achieved is None else info.achieved["groups"]


def _draw_events(panel: Any, events: Sequence[StepInfo]) -> None:
    for place, info in enumerate(events):
        label = "groups removed" if place == 0 else None
        panel.axvline(info.step, color=INK, linestyle=":", linewidth=0.8, label=label)


def _draw_valid(panel: Any, measured: Sequence[StepInfo]) -> None:
    if measured:
        losses = [info.valid_loss for info in measured]
        own = {"color": _UNMERGED, "linewidth": 1.4, "marker": "o", "markersize": 3}
        panel.plot([info.step for info in measured], losses, label="held out", **own)


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

"""Plots as SVG text, for files and for the report."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

_MERGED, _UNMERGED = "#1f6f8b", "#e08e45"
_INK, _GRID = "#333333", "#dddddd"


def draw_latency(bench: Mapping[str, Any]) -> str:
    """Draw prefill medians with their p10 to p90, a panel an engine, merged beside unmerged.

    Args:
        bench: What ``bench.json`` holds.

    Returns:
        SVG.
    """
    rows = [row for row in bench["rows"] if row["phase"] == "prefill"]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, panels = _make_panels(len(engines))
    for panel, engine in zip(panels, engines, strict=True):
        _draw_engine(panel, [row for row in rows if row["engine"] == engine])
        panel.set_title(engine, loc="left", color=_INK)
    panels[0].set_ylabel(f"prefill of {rows[0]['tokens']} tokens, ms", labelpad=10)
    panels[-1].legend(frameon=False, loc="upper right")
    return _to_svg(figure)


def _draw_engine(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    ratios = sorted({row["ratio"] for row in rows})
    width = 0.38
    for merged, color, shift in ((True, _MERGED, -width / 2), (False, _UNMERGED, width / 2)):
        chosen = [row for row in rows if row["merged"] == merged]
        if not chosen:
            continue
        places = [ratios.index(row["ratio"]) + shift for row in chosen]
        medians = [row["median_ms"] for row in chosen]
        low = [row["median_ms"] - row["p10_ms"] for row in chosen]
        high = [row["p90_ms"] - row["median_ms"] for row in chosen]
        label = "LoRA merged" if merged else "LoRA unmerged"
        bars = panel.bar(
            places, medians, width * 0.95, color=color, label=label, yerr=[low, high],
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 3},
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.3g", padding=3, color=_INK, fontsize=9)
    panel.set_xticks(range(len(ratios)), [f"{ratio:.0%} pruned" for ratio in ratios])
    panel.margins(y=0.2)


def draw_training(log: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss, and the share of groups removed, over the steps of a run.

    Args:
        log: Lines of ``log.jsonl``.

    Returns:
        SVG.
    """
    figure, (loss, ratio) = _make_panels(2)
    steps = [line["step"] for line in log]
    loss.plot(steps, [line["loss"] for line in log], color=_MERGED, linewidth=1.2)
    loss.set_title("loss, nats a token", loc="left", color=_INK)
    ratio.step(steps, [100 * line["ratio"] for line in log], where="post", color=_UNMERGED)
    ratio.set_title("groups removed, %", loc="left", color=_INK)
    for panel in (loss, ratio):
        panel.set_xlabel("step")
    return _to_svg(figure)


def _make_panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "lpdeploy"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(4.6 * count, 3.2), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_INK)
    return figure, panels


def _to_svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()

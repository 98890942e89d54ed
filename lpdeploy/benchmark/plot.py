"""Plots as SVG text, for files and for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from lpdeploy.plotting import COLORS, INK, make_panels, to_svg

_MERGED, _UNMERGED = COLORS[:2]


def draw_latency(bench: Mapping[str, Any]) -> str:
    """Draw prefill medians with their p10 to p90, a panel an engine, merged beside unmerged.

    Args:
        bench: What ``bench.json`` holds.

    Returns:
        SVG.
    """
    first = bench["rows"][0]
    rows = [r for r in bench["rows"] if r["phase"] == "prefill" and r["batch"] == first["batch"]]
    engines = list(dict.fromkeys((row["engine"], row["precision"]) for row in rows))
    figure, panels = make_panels(len(engines))
    for panel, engine in zip(panels, engines, strict=True):
        _draw_engine(panel, [r for r in rows if (r["engine"], r["precision"]) == engine])
        panel.set_title(" ".join(engine), loc="left", color=INK)
    panels[0].set_ylabel(f"prefill of {rows[0]['tokens']} tokens, ms", labelpad=10)
    panels[-1].legend(frameon=False, loc="upper right")
    return to_svg(figure)


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
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.3g", padding=3, color=INK, fontsize=9)
    panel.set_xticks(range(len(ratios)), [f"{ratio:.0%} pruned" for ratio in ratios])
    panel.margins(y=0.2)


def draw_training(log: Sequence[Mapping[str, Any]]) -> str:
    """Draw loss, and the share of groups removed, over the steps of a run.

    Args:
        log: Lines of ``log.jsonl``.

    Returns:
        SVG.
    """
    figure, (loss, ratio) = make_panels(2)
    steps = [line["step"] for line in log]
    loss.plot(steps, [line["loss"] for line in log], color=_MERGED, linewidth=1.2)
    loss.set_title("loss, nats a token", loc="left", color=INK)
    ratio.step(steps, [100 * line["ratio"] for line in log], where="post", color=_UNMERGED)
    ratio.set_title("groups removed, %", loc="left", color=INK)
    for panel in (loss, ratio):
        panel.set_xlabel("step")
    return to_svg(figure)

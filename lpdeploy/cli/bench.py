"""`lpdeploy bench`: how fast models are."""

import os
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import CONTEXT_SETTINGS, FOLDER, log, print_result, shared_options

_FORMS = {"merged": (True,), "unmerged": (False,), "both": (True, False)}


@click.group("bench", context_settings=CONTEXT_SETTINGS)
def command() -> None:
    """Measure what pruning gains."""


@command.command("latency")
@click.argument("targets", nargs=-1, required=True, metavar="RUN|MODEL...")
@click.option("--engine", default="torch,onnx", help="torch, onnx, or both.")
@click.option("--merged", "form", flag_value="merged", help="Only models with LoRA merged.")
@click.option("--unmerged", "form", flag_value="unmerged", help="Only models with LoRA apart.")
@click.option("--both", "form", flag_value="both", default="both", help="The two of them.")
@click.option("--tokens", type=click.IntRange(min=1), default=2048, help="Prompt tokens.")
@click.option("--decode", type=click.IntRange(min=0), default=0, help="Tokens to decode.")
@click.option("--batch", type=click.IntRange(min=1), default=1)
@click.option("--repeats", type=click.IntRange(min=1), default=100)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--output", type=FOLDER, help="Where bench.json goes. [default: the first RUN]")
@shared_options()
def latency(  # noqa: PLR0913 - one parameter an option
    *,
    targets: tuple[str, ...],
    engine: str,
    form: str,
    tokens: int,
    decode: int,
    batch: int,
    repeats: int,
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Time dense and pruned, merged and unmerged models (the paper's Table 3).

    A RUN stands for its pruned model and its base. All variants are interleaved in one process;
    % is against the merged dense model on the same engine.
    """
    # Before torch is imported. A waiting OpenMP thread that spins takes a core from the engine that
    # is timed next. Not for training: there, waking the threads at each operation costs more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lpdeploy.benchmark.stage import bench_latency
    from lpdeploy.cli.progress import counting_progress

    with counting_progress("bench") as on_progress:
        result, folder = bench_latency(
            targets,
            engines=_parse_engines(engine),
            forms=_FORMS[form],
            workload={"tokens": tokens, "decode": decode, "batch": batch, "repeats": repeats},
            device=device,
            output=output,
            on_progress=on_progress,
            log=log,
        )
    log(f"Written: {folder / 'bench.json'}, {folder / 'bench.svg'}")
    print_result(result, _format_table(result), as_json=as_json)


def _parse_engines(text: str) -> tuple[str, ...]:
    engines = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in engines if name not in ("torch", "onnx")]
    if unknown or not engines:
        raise click.UsageError(f"--engine {text!r}: choose torch, onnx, or torch,onnx.")
    return engines


def _format_table(result: dict[str, Any]) -> str:
    header = ("engine", "phase", "ratio", "LoRA", "median ms", "p10..p90", "%", "parameters")
    rows = [
        (
            row["engine"],
            row["phase"],
            f"{row['ratio']:.0%}",
            "merged" if row["merged"] else "unmerged",
            f"{row['median_ms']:.2f}",
            f"{row['p10_ms']:.2f}..{row['p90_ms']:.2f}",
            "" if row["relative"] is None else f"{row['relative'] - 1:+.1%}",
            f"{row['parameters']:,}",
        )
        for row in result["rows"]
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [header, *rows]
    )

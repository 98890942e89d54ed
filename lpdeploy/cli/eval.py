"""`lpdeploy eval`: how good a model is."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import print_result, shared_options


@click.command("eval")
@click.argument("model", metavar="RUN|MODEL")
@click.option(
    "--perplexity",
    multiple=True,
    required=True,
    metavar="SOURCE",
    help="File, folder or hub name (wikitext2, ptb); may be given several times.",
)
@click.option("--seq-len", type=click.IntRange(min=2), default=2048, help="Tokens a segment.")
@click.option("--engine", type=click.Choice(["torch", "onnx"]), default="torch")
@click.option("--with-base", is_flag=True, help="Of a RUN, measure its unpruned base too.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@shared_options()
def command(
    *,
    model: str,
    perplexity: tuple[str, ...],
    seq_len: int,
    engine: str,
    with_base: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of a MODEL, or of a RUN's compacted model."""
    from lpdeploy.cli.progress import counting_progress
    from lpdeploy.evaluation.evaluate import evaluate

    with counting_progress("eval") as progress:
        result = evaluate(
            model,
            perplexity,
            seq_len=seq_len,
            engine=engine,
            with_base=with_base,
            device=device,
            on_progress=lambda _, done, total: progress(done, total),
        )
    print_result(result, _describe(result), as_json=as_json)


def _describe(result: dict[str, Any]) -> str:
    lines = _list_lines(result["model"], result["perplexity"])
    if "base" in result:
        lines += _list_lines("its base", result["base"]["perplexity"])
    return "\n".join(lines)


def _list_lines(name: str, measured: dict[str, Any]) -> list[str]:
    return [
        f"{name} on {Path(source).name}: perplexity {m['perplexity']:.2f}, "
        f"{m['bits_per_byte']:.3f} bits per byte, {m['tokens']:,} tokens"
        for source, m in measured.items()
    ]

"""`lpdeploy verify`: compare the logits of all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lpdeploy.cli.common import ENGINE, base_option, log, print_result, say_next, shared_options
from lpdeploy.cli.types import RUN, Number
from lpdeploy.engines import ENGINES, ORT, list_exporting
from lpdeploy.run_folder import RunFolder

if TYPE_CHECKING:
    from lpdeploy.engines.verification import Pair


@click.command("verify")
@click.argument("model", type=RUN, metavar="RUN|MODEL")
@click.option("--engine", type=ENGINE, default="onnx", help="Compare the export of this engine.")
@base_option
@click.option(
    "--atol",
    type=Number(0),
    help="Absolute tolerance for every pair.  [default: depends on the precision]",
)
@click.option(
    "--integrity",
    is_flag=True,
    help="Hash every file of the run, its models and its exports, even if size and time are "
    "unchanged.",
)
@shared_options()
def command(*, model: Path, engine: str, as_json: bool, **options: Any) -> None:
    """Compare the logits of all stages of a RUN or MODEL.

    The stages of a RUN are the masked, cut, unmerged, merged and exported model; those of a MODEL
    are the model and its export. Compares the full logits of prefill and cached decoding, with left
    padding and a batch size above 1. The exit code is 1 if any pair differs by more than its
    tolerance. With --engine torch, no export is compared.
    """
    from lpdeploy.engines.verify import verify

    result = verify(model, engine=engine, **options)
    lines = [f"{'logits':36} {'max diff':>10} {'tolerance':>10} {'same top-1':>10}"]
    lines += [
        f"{p.a + ' = ' + p.b:36} {p.max_abs_diff:10.2e} {_write_tolerance(p)} "
        f"{p.top1_agreement:10.1%} {_VERDICTS[p.verdict]}"
        for p in result.pairs
    ]
    lines += [
        f"{check.a + ' = ' + check.b:36} {check.num_weights} weights, one by one "
        f"{'ok' if check.ok else 'DIFFERENT'}"
        for check in result.weights
    ]
    lines += [
        f"{name} is quantized: it ranks the same token first after {share:.1%} of the tokens, and "
        "is not equal. lpdeploy eval --perplexity measures what that costs."
        for name, share in result.quantized.items()
    ]
    print_result(result.to_json(), "\n".join(lines), as_json=as_json)
    asked = ENGINES[engine]
    for other in list_exporting():
        if asked.export and other is not asked and (model / other.name).is_dir():
            log(f"'{model / other.name}' was not compared. Use --engine {other.name} for that.")
    result.check()
    if RunFolder(model).is_complete:
        following = ("bench", "latency") if asked.export else ("export",)
        say_next(*following, model, "--engine", (asked if asked.export else ORT).name)


_VERDICTS = {"equal": "ok", "rounded": "rounded", "different": "DIFFERENT"}


def _write_tolerance(pair: Pair) -> str:
    return f"{'rounding':>10}" if pair.tolerance is None else f"{pair.tolerance:10.2e}"

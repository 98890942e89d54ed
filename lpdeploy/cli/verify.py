"""`lpdeploy verify`: compare the logits of all stages."""

from pathlib import Path

import click

from lpdeploy.cli.common import ENGINE, RUN, log, print_result, shared_options
from lpdeploy.engines import ENGINES, list_exporting
from lpdeploy.errors import ParityError


@click.command("verify")
@click.argument("model", type=RUN, metavar="RUN|MODEL")
@click.option("--engine", type=ENGINE, default="onnx", help="Compare the export of this engine.")
@click.option(
    "--atol",
    type=click.FloatRange(0),
    help="Absolute tolerance for every pair.  [default: depends on the precision]",
)
@click.option(
    "--integrity", is_flag=True, help="Hash every file, even if its size and time are unchanged."
)
@shared_options()
def command(
    *, model: Path, engine: str, atol: float | None, integrity: bool, as_json: bool
) -> None:
    """Compare the logits of all stages of a RUN or MODEL.

    The stages of a RUN are the masked, cut, unmerged, merged and exported model; those of a MODEL
    are the model and its export. Compares the full logits of prefill and cached decoding, with left
    padding and a batch size above 1. The exit code is 1 if any pair differs by more than its
    tolerance. With --engine torch, no export is compared.
    """
    from lpdeploy.engines.verify import verify

    result = verify(model, engine=engine, atol=atol, integrity=integrity)
    lines = [f"{'pair':36} {'max diff':>10} {'tolerance':>10} {'same top-1':>10}"]
    lines += [
        f"{p.a + ' = ' + p.b:36} {p.max_abs_diff:10.2e} {p.tolerance:10.2e} "
        f"{p.top1_agreement:10.1%} {'ok' if p.ok else 'DIFFERENT'}"
        for p in result.pairs
    ]
    print_result(result.to_json(), "\n".join(lines), as_json=as_json)
    asked = ENGINES[engine]
    for other in list_exporting():
        if asked.export and other is not asked and (model / other.name).is_dir():
            log(f"'{model / other.name}' was not compared. Use --engine {other.name} for that.")
    wrong = [pair for pair in result.pairs if not pair.ok]
    if wrong:
        worst = wrong[0]
        raise ParityError(
            f"{worst.a} and {worst.b} differ by {worst.max_abs_diff:.2e}, more than "
            f"{worst.tolerance:.2e}. Write the second one again; if they still differ, please "
            "report it."
        )

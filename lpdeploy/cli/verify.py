"""`lpdeploy verify`: every stage computes the same."""

from pathlib import Path

import click

from lpdeploy.cli.common import ENGINE, RUN, log, print_result, shared_options
from lpdeploy.engines import ENGINES, list_exporting
from lpdeploy.errors import ParityError


@click.command("verify")
@click.argument("target", type=RUN, metavar="RUN|MODEL")
@click.option("--engine", type=ENGINE, default="onnx")
@click.option("--atol", type=click.FloatRange(0), help="Tolerance for every pair.")
@shared_options()
def command(*, target: Path, engine: str, atol: float | None, as_json: bool) -> None:
    """Compare full logits of all stages of a RUN, or of a MODEL and its export.

    Prefill and cached decoding, left padding, batch > 1. Exits 1 where a pair differs by more
    than its tolerance. With --engine torch, exports are left out.
    """
    from lpdeploy.engines.verify import verify

    result = verify(target, engine=engine, atol=atol)
    lines = [f"{'pair':36} {'max diff':>10} {'tolerance':>10} {'same first':>10}"]
    lines += [
        f"{p.a + ' = ' + p.b:36} {p.max_abs_diff:10.2e} {p.tolerance:10.2e} "
        f"{p.top1_agreement:10.1%} "
        f"{'ok' if p.ok else 'DIFFERENT'}"
        for p in result.pairs
    ]
    print_result(result.to_json(), "\n".join(lines), as_json=as_json)
    asked = ENGINES[engine]
    for other in list_exporting():
        if asked.export and other is not asked and (target / other.name).is_dir():
            log(f"'{target / other.name}' was not compared; --engine {other.name} does that")
    wrong = [pair for pair in result.pairs if not pair.ok]
    if wrong:
        worst = wrong[0]
        raise ParityError(
            f"{worst.a} and {worst.b} differ by {worst.max_abs_diff:.2e}, more than "
            f"{worst.tolerance:.2e}. Make the later of the two again; if that does not help, "
            "please report it."
        )

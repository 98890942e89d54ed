"""`lpdeploy demo`: the whole workflow on the small model that comes with the package."""

from pathlib import Path

import click

from lpdeploy.cli.common import FOLDER, overwrite_option, print_result, shared_options


@click.command("demo")
@click.option(
    "--output", type=FOLDER, default=Path("lpdeploy-demo"), help="Write everything to this folder."
)
@overwrite_option
@shared_options()
def command(*, output: Path, overwrite: bool, as_json: bool) -> None:
    """Run the whole workflow on a small built-in model.

    Prunes the model by 20 % and 50 %, exports and verifies it, measures quality and latency, and
    writes an HTML page. It needs no network, and takes a few minutes on two cores.
    """
    from lpdeploy.demo.run import run_demo

    result = run_demo(output, overwrite=overwrite)
    print_result(result.to_json(), result.summary, as_json=as_json)

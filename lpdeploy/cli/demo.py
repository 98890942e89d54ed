"""`lpdeploy demo`: the whole workflow on the small model that comes with the package."""

from pathlib import Path

import click

from lpdeploy.cli.common import overwrite_option, print_result, shared_options
from lpdeploy.cli.types import FOLDER


@click.command("demo")
@click.option(
    "--output", type=FOLDER, default=Path("lpdeploy-demo"), help="Write everything to this folder."
)
@overwrite_option
@shared_options()
def command(*, output: Path, overwrite: bool, as_json: bool) -> None:
    """Run the whole workflow on a small built-in model.

    Prunes the model by 20 % and 50 %, exports and verifies it, measures its quality, and writes an
    HTML page. Latency is measured on a larger shape with random weights, which shows what pruning
    gains. The demo needs no network, and takes a few minutes on two cores.
    """
    from lpdeploy.cli.progress import part_progress
    from lpdeploy.demo.run import run_demo

    with part_progress() as on_progress:
        result = run_demo(output, overwrite=overwrite, on_progress=on_progress)
    print_result(result.to_json(), result.summary, as_json=as_json)

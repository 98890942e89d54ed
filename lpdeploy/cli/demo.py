"""`lpdeploy demo`: the whole line on the model that the package carries."""

from pathlib import Path

import click

from lpdeploy.cli.common import FOLDER, log, print_result, shared_options


@click.command("demo")
@click.option("--output", type=FOLDER, default=Path("lpdeploy-demo"))
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@shared_options()
def command(*, output: Path, overwrite: bool, as_json: bool) -> None:
    """Prune a small trained model by 20 and 50 %, ship it, prove it, time it, and show it.

    Needs no network and no data; takes a few minutes on two cores.
    """
    from lpdeploy.demo.run import run_demo

    result = run_demo(output, overwrite=overwrite, log=log)
    print_result(result.to_json(), result.summary, as_json=as_json)

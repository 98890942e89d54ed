"""`lpdeploy report`: write one page about a run."""

from pathlib import Path

import click

from lpdeploy.cli.common import print_result, shared_options
from lpdeploy.cli.types import RUN


@click.command("report")
@click.argument("run", type=RUN)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the page to this file.  [default: RUN/report.html]",
)
@shared_options(recipe=False)
def command(*, run: Path, output: Path | None, as_json: bool) -> None:
    """Write an HTML page with the results of all stages of RUN."""
    from lpdeploy.report.page import save_report

    path = save_report(run, output=output)
    print_result({"report": str(path)}, f"{path}", as_json=as_json)

"""`lpdeploy compare`: several runs of one model side by side."""

from pathlib import Path

import click

from lpdeploy.cli.common import log, print_result, shared_options
from lpdeploy.cli.types import RUN


@click.command("compare")
@click.argument("runs", type=RUN, nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an HTML page with the comparison to this file, too.",
)
@shared_options(recipe=False)
def command(*, runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Compare several RUNs of a model in size, quality and speed.

    What eval and bench latency measured is shown, and which runs no other beats.
    """
    from lpdeploy.report.compare import check_runs, compare, format_comparison

    try:
        check_runs(runs)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    found = compare(runs, output=output)
    if output is not None:
        log(f"Wrote {output}")
    page = None if output is None else str(output)
    data = {**found.to_json(), "page": page}
    print_result(data, format_comparison(found), as_json=as_json)

"""`lpdeploy doctor`: what this machine and environment can do."""

import click

from lpdeploy.cli.common import print_result, shared_options
from lpdeploy.extras import EXTRAS


@click.command("doctor")
@shared_options(recipe=False)
def command(*, as_json: bool) -> None:
    """Show devices, libraries and extras, and what is missing."""
    import torch

    from lpdeploy.machine import describe_machine

    machine = describe_machine()
    found = {extra: extra.find_version() for extra in EXTRAS}
    lines = [
        f"cpu           {machine.cpu}, {machine.cores} cores",
        f"gpu           {machine.gpu or 'none that torch can use'}",
        f"system        {machine.system}",
        *[f"{name:13} {version}" for name, version in machine.versions.items()],
        "",
        "Extras, each for one purpose:",
        *[
            f"{extra.name:8} {extra.packages[0]:18} {version or 'missing':12} {extra.purpose}"
            for extra, version in found.items()
        ],
    ]
    missing = [
        extra
        for extra, version in found.items()
        if version is None and (machine.gpu or not extra.needs_gpu)
    ]
    if missing:
        lines += ["", "To install what is missing:", *[extra.install for extra in missing]]
    data = {
        "machine": {**machine.to_json(), "cuda": torch.cuda.is_available()},
        "extras": [extra.to_json() for extra in EXTRAS],
        "missing": {extra.packages[0]: extra.install for extra in missing},
    }
    print_result(data, "\n".join(lines), as_json=as_json)

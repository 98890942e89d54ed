"""Pages as files: templates, and the check of what a page may replace."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lpdeploy.artifacts import atomic_file
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import recorded_files

_GENERATOR = '<meta name="generator" content="lpdeploy">'


def check_page(path: Path) -> None:
    """Refuse to replace what is not a page of ours.

    Raises:
        ArtifactError: The file is something else.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        head = stream.read(1024)
    if _GENERATOR.encode() not in head:
        raise ArtifactError(
            f"'{path}' is not a page that lpdeploy wrote, so it is not replaced. Use another "
            "`output`."
        )


def save_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Render a template to a file that needs no other."""
    environment = Environment(
        loader=PackageLoader("lpdeploy.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    with recorded_files(path.parent, path), atomic_file(path) as temporary:
        # The name of a file may hold bytes that are no text.
        temporary.write_text(page, encoding="utf-8", errors="replace")

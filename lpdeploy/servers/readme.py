"""The README.md of a package: which command opens the folder, filled from a template."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def save_readme(folder: Path, template: str, **values: Any) -> None:
    """Write ``folder/README.md`` from ``templates/TEMPLATE.md.j2``.

    Args:
        folder: Of the package.
        template: Name of the template, without its ending.
        values: What it shows; one that it names and does not get is an error.
    """
    text = render(f"{template}.md.j2", **values)
    (folder / "README.md").write_text(text, encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; nothing is escaped, since none is HTML."""
    environment = Environment(
        loader=PackageLoader("lpdeploy.servers"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown and configs, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)

"""Write the generated parts of the documents: commands, the Python API, and tables from JSON.

`python tools/update_docs.py` writes them. With `--check` it changes nothing, and fails if a
document is out of date. A measured table stands between `<!-- table: KIND FILE -->` and
`<!-- end -->`, a computed one between `<!-- servers -->` or `<!-- travel -->` and `<!-- end -->`.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from transformers import LlamaConfig

from lpdeploy.cli.main import main as root
from lpdeploy.config import PruneConfig
from lpdeploy.pruning.travel import compute_travel
from lpdeploy.servers.verdicts import SERVERS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # it runs as a script, and the others are modules of `tools`

from tools.api_docs import render_api  # noqa: E402
from tools.doc_tables import RENDERERS  # noqa: E402
from tools.doc_text import write_table  # noqa: E402

CLI, API = ROOT / "docs" / "cli.md", ROOT / "docs" / "api.md"
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in (CLI, API)),
]
_CLI_INTRODUCTION = """\
# Commands

`tools/update_docs.py` makes this page from the commands themselves. A recipe is a YAML file with
one top-level key for each command (`prune`, `bench latency`) and option names with underscores
below it. Options on the command line override the recipe.

Exit codes: 0 means done; 1 means that the command failed, or that `verify` found a difference; 2
means that an option or a value is wrong; 130 means that the command was interrupted. Unless it is
0, a sentence on stderr says what happened.

To complete commands, options, names and paths with the Tab key, add the line of your shell to the
file that it names, and open a new terminal:

```
eval "$(_LPDEPLOY_COMPLETE=bash_source lpdeploy)"      # bash 4.4 or newer: ~/.bashrc
eval "$(_LPDEPLOY_COMPLETE=zsh_source lpdeploy)"       # zsh: ~/.zshrc, after compinit
_LPDEPLOY_COMPLETE=fish_source lpdeploy | source       # fish: ~/.config/fish/config.fish
```
"""
_TABLE = re.compile(
    r"(<!-- (?:table: (\w+) (\S+)|(servers|travel)) -->\n).*?(<!-- end -->)", re.DOTALL
)


def render_cli() -> str:
    """Return the reference of all commands as Markdown."""
    parts = [_CLI_INTRODUCTION]
    settings = {**root.context_settings, "terminal_width": 100, "max_content_width": 100}
    with click.Context(root, info_name="lpdeploy", **settings) as context:
        for name, command in walk_commands(root, context):
            own = click.Context(command, info_name=name.split(" ", 1)[1], parent=context)
            parts.append(f"## {name}\n\n```\n{command.get_help(own)}\n```\n")
    return "\n".join(parts)


def walk_commands(
    group: click.Group, context: click.Context, prefix: str = "lpdeploy"
) -> Iterator[tuple[str, click.Command]]:
    """Yield (full name, command) of all commands that are not groups, in their order."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from walk_commands(command, context, f"{prefix} {name}")
        elif command is not None:
            yield f"{prefix} {name}", command


# Shapes for the table of messages: LLaMA (arXiv:2302.13971), Llama 3 (arXiv:2407.21783).
LARGE = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "LLaMA-65B": {
        "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama-3-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip


def render_travel() -> str:
    """Show how much eight ranks send to each other, computed from the shapes of large models."""
    rows = []
    for name, shape in LARGE.items():
        plain, sharded = (
            compute_travel(LlamaConfig(**shape), options, ranks=8, itemsize=2)
            for options in (PruneConfig(), PruneConfig(shard=True, removal="mask"))
        )
        summed = [f"{count / 1e6:,.0f} MB" for count in (plain.gradients, plain.count_sent(8))]
        gathered = [f"{count / 1e9:,.0f} GB" for count in (sharded.weights, sharded.count_sent(8))]
        rows.append((name, *summed, *gathered))
    sent = "sent by a rank"
    return write_table(("base", "LoRA's gradients", sent, "gathered with `--shard`", sent), rows)


def render_servers() -> str:
    """List the servers, what each is given, and what its rules were checked against."""
    rows = []
    for server in SERVERS:
        documented = (inspect.getdoc(rule) or "" for rule in server.rules)
        objections = "; ".join(text.split("\n")[0].removesuffix(".") for text in documented)
        checked = " ".join(part for part in (server.version, f"({server.checked})") if part)
        rows.append((server.name, server.how, objections, checked))
    return write_table(("server", "give it", "objects to", "checked"), rows)


def fill_tables(text: str) -> str:
    """Replace the text between the markers of a document."""
    computed = {"servers": render_servers, "travel": render_travel}

    def fill(match: re.Match[str]) -> str:
        start, kind, file, name, end = match.groups()
        if kind is None:
            return f"{start}{computed[name]()}\n{end}"
        data = json.loads((ROOT / file).read_text(encoding="utf-8"))
        return f"{start}{RENDERERS[kind](data)}\n{end}"

    return _TABLE.sub(fill, text)


def main() -> None:
    """Write the documents, or check them."""
    wanted = {CLI: render_cli(), API: render_api()}
    wanted |= {path: fill_tables(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"Stale: {names}. Run 'python tools/update_docs.py'." if stale else 0)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")


if __name__ == "__main__":
    main()

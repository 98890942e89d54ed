"""Write what documents take from elsewhere: docs/cli.md from the commands, tables from JSON.

`python tools/update_docs.py` writes; with `--check` it changes nothing and fails where a document
is not what it would write. A table stands between `<!-- table: KIND FILE -->` and `<!-- end -->`,
that of servers between `<!-- servers -->` and `<!-- end -->`.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from cost_tables import render_memory, render_pruning, render_run, render_scaling
from transformers import LlamaConfig

from lpdeploy.benchmark.table import render_latency as render_latency_table
from lpdeploy.cli.main import main as root
from lpdeploy.config import PruneConfig
from lpdeploy.paper.render import render_markdown
from lpdeploy.pruning.travel import compute_travel
from lpdeploy.servers.verdicts import SERVERS

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "docs" / "cli.md"
DOCUMENTS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("results", "engines", "scaling", "serving", "triton", "costs")
    ),
]
_CLI_INTRODUCTION = """\
# Commands

Made by `tools/update_docs.py` from the commands themselves. A recipe is YAML with one top-level key
a command (`prune`, `bench latency`) and option names with underscores below it; the command line
wins over it.

Exit codes: 0, done; 1, it cannot be done or was interrupted, or `verify` found a difference; 2, an
option or a value is wrong. With 1 and 2 one sentence on stderr says what to do.
"""
_SERVERS = re.compile(r"(<!-- servers -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    """Yield (full name, command) of all leaves, in their order."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from walk_commands(command, context, f"{prefix} {name}")
        elif command is not None:
            yield f"{prefix} {name}", command


def render_latency(data: dict[str, Any]) -> str:
    """Return the paper's Table 3 as measured here."""
    lines = [
        "| engine | pruned | unmerged, ms | merged, ms | merged against dense |",
        "|---|---|---|---|---|",
    ]
    rows = [row for row in data["latency"] if row["phase"] == "prefill"]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        for ratio in sorted({row["ratio"] for row in rows}):
            pair = {
                row["merged"]: row
                for row in rows
                if row["engine"] == engine and row["ratio"] == ratio
            }
            lines.append(
                f"| {engine} {pair[True]['precision']} | {ratio:.0%} | {show(pair[False])} "
                f"| {show(pair[True])} | {pair[True]['relative'] - 1:+.1%} |"
            )
    about = (
        f"Prefill of {rows[0]['tokens']} tokens, batch {rows[0]['batch']}, median of "
        f"{rows[0]['repeats']} interleaved trials (p10 to p90)."
    )
    return "\n".join([*lines, "", about, describe(data)])


def show(row: dict[str, Any]) -> str:
    """Write a median with its spread."""
    return f"{row['median_ms']:.2f} ({row['p10_ms']:.2f} to {row['p90_ms']:.2f})"


def describe(data: dict[str, Any]) -> str:
    """Say on what, with what and when something was measured."""
    machine = data["machine"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "onnxruntime")
    )
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {versions}, "
        f"{machine['date'][:10]}: `{data['command']}`"
    )


def render_paper(data: dict[str, Any]) -> str:
    """Return a table that `lpdeploy paper` wrote, without its heading."""
    return render_markdown(data).split("\n", 2)[2].rstrip()


def render_bench(data: dict[str, Any]) -> str:
    """Return a table of `lpdeploy bench latency`, without its heading."""
    return render_latency_table(data).split("\n", 2)[2].rstrip()


# (name, config) of what docs/scaling.md plans for: LLaMA (arXiv:2302.13971), Llama 3
# (arXiv:2407.21783).
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


def render_travel(data: dict[str, Any]) -> str:  # noqa: ARG001 - from shapes, not from the file
    """Return what travels between eight ranks, for the shapes of large models."""
    lines = [
        "| base | LoRA's gradients | a rank sends | gathered with `--shard` | a rank sends |",
        "|---|---|---|---|---|",
    ]
    for name, shape in LARGE.items():
        plain, sharded = (
            compute_travel(LlamaConfig(**shape), options, ranks=8, itemsize=2)
            for options in (PruneConfig(), PruneConfig(shard=True, removal="mask"))
        )
        lines.append(
            f"| {name} | {plain.gradients / 1e6:,.0f} MB | {plain.count_sent(8) / 1e6:,.0f} MB "
            f"| {sharded.weights / 1e9:,.0f} GB | {sharded.count_sent(8) / 1e9:,.0f} GB |"
        )
    return "\n".join(lines)


def render_messages(data: dict[str, Any]) -> str:
    """Return what was put into messages in a step, beside what is counted from shapes."""
    lines = [
        "| criterion | summed, counted from shapes | summed | gathered, counted | gathered |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["messages"].items():
        computed = row["computed"]
        lines.append(
            f"| {name} | {computed['gradients'] + computed['scores']:,} | {row['summed']:,} "
            f"| {computed['weights']:,} | {row['gathered']:,} |"
        )
    about = "Bytes; what is summed beyond is the ranks' agreement about how to go on."
    return "\n".join([*lines, "", about, describe(data)])


def render_load(data: dict[str, Any]) -> str:
    """Return the memory of a rank that loads its share of a base."""
    load = data["load"]
    names = {
        "the whole base": "weight_bytes",
        "what the rank keeps of it": "own_bytes",
        "memory after loading": "held_bytes",
        "most memory while loading": "peak_bytes",
    }
    rows = [f"| {name} | {load[key] / 1e6:.0f} |" for name, key in names.items()]
    return "\n".join(["| | MB |", "|---|---|", *rows, "", describe(data)])


def render_triton(data: dict[str, Any]) -> str:
    """Return what Triton gives to many clients, beside the runner alone."""
    options, rounds = data["options"], data["rounds"]
    shares = [f"{each['relative']:.2f}" for each in rounds]
    alone, served = (sorted(each[name] for each in rounds) for name in ("alone", "served"))
    lines = ["| | p50 | p95 | p99 |", "|---|---|---|---|"]
    for name, key in (("first token", "first_token"), ("each next token", "next_token")):
        cells = (f"{data[key][f'p{cut}_ms']:.0f}" for cut in (50, 95, 99))
        lines.append(f"| {name}, ms | {' | '.join(cells)} |")
    about = (
        f"{options['clients']} clients, prompts of {options['prompt']} tokens and "
        f"{options['tokens']} new ones, {options['precision']}, {data['answers']} answers in "
        f"{len(rounds)} rounds. Triton: {served[0]:.0f} to {served[-1]:.0f} tokens/s; the same "
        f"runner in one process with the same batch: {alone[0]:.0f} to {alone[-1]:.0f}; a round's "
        f"ratio: {', '.join(shares)}, their median {data['relative']:.2f}."
    )
    machine = f"Triton {data['triton']}, {describe(data | {'command': data['machine']['command']})}"
    return "\n".join([*lines, "", about, machine])


def render_served(data: dict[str, Any]) -> str:
    """Return what the optional job found of real servers."""
    lines = ["| server | version | shape | gives | date |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['server']} | {row['version']} | {row['shape']} | {row['result']} "
        f"| {row['date'][:10]} |"
        for row in data["rows"]
    ]
    commands = ", ".join(f"`{name}`" for name in sorted({row["command"] for row in data["rows"]}))
    machine = data["machine"]
    return "\n".join([*lines, "", f"{machine['cpu']}, {machine['cores']} cores: {commands}"])


RENDERERS = {
    "served": render_served,
    "triton": render_triton,
    "bench": render_bench,
    "load": render_load,
    "memory": render_memory,
    "pruning": render_pruning,
    "run": render_run,
    "scaling": render_scaling,
    "messages": render_messages,
    "travel": render_travel,
    "latency": render_latency,
    "paper": render_paper,
}


def render_servers() -> str:
    """Return the servers, what each is given, and what its rules were checked against."""
    lines = ["| server | give it | objects to | checked |", "|---|---|---|---|"]
    for server in SERVERS:
        objections = "; ".join(summarise(rule) for rule in server.rules)
        checked = " ".join(part for part in (server.version, f"({server.checked})") if part)
        lines.append(f"| {server.name} | {server.how} | {objections} | {checked} |")
    return "\n".join(lines)


def summarise(function: Any) -> str:
    """Return the first line of a docstring, without its full stop."""
    return inspect.getdoc(function).split("\n")[0].removesuffix(".")


def fill_tables(text: str) -> str:
    """Replace what stands between the markers of a document."""

    def fill(match: re.Match[str]) -> str:
        data = json.loads((ROOT / match[3]).read_text(encoding="utf-8"))
        return f"{match[1]}{RENDERERS[match[2]](data)}\n{match[4]}"

    return _SERVERS.sub(
        lambda match: f"{match[1]}{render_servers()}\n{match[2]}", _TABLE.sub(fill, text)
    )


def main() -> None:
    """Write the documents, or check them."""
    wanted = {CLI: render_cli()}
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

"""Write the tables of the documents from the JSON that tools and `lpdeploy` measured."""

import itertools
from collections.abc import Callable
from typing import Any

from lpdeploy.benchmark.pruning_table import render_pruning as render_pruning_table
from lpdeploy.benchmark.results import LatencyResult, PruningResult
from lpdeploy.benchmark.table import render_latency as render_latency_table
from lpdeploy.machine import format_bytes
from lpdeploy.paper.render import render_markdown
from lpdeploy.paper.results import TableResult
from lpdeploy.records import read_record
from tools.doc_models import render_answers, render_formats, render_int4
from tools.doc_text import describe, find_command, write_table

_PARTS = ("training", "scoring", "cutting")


def strip_heading(text: str) -> str:
    """Remove the heading from a table that lpdeploy wrote."""
    return text.split("\n", 2)[2].rstrip()


def render_memory(data: dict[str, Any]) -> str:
    """Compare planned with measured memory."""

    def name(option: str, value: object) -> str:
        return option.replace("_", " ") + ("" if value is True else f" {value}")

    rows = [
        (
            row["shape"],
            ", ".join(name(*item) for item in row["options"].items()) or "the defaults below",
            f"{row['planned_bytes']['total'] / 1e6:,.0f}",
            f"{row['measured_bytes'] / 1e6:,.0f}",
            f"{row['error']:+.1%}",
        )
        for row in data["rows"]
    ]
    header = ("model", "options", "planned, MB", "measured, MB", "error")
    about = (
        "Defaults: criterion lora, two micro-batches of 1 x 512 tokens per step, LoRA of rank 8 "
        "with dropout, fp32. Measured is the peak of the process, including its libraries."
    )
    return write_table(header, rows, about, describe(data, "peft"))


def render_refit(data: dict[str, Any]) -> str:
    """Say what the events of a run cost with a refit, and what one layer of a 7B does."""
    rows = [
        (
            f"event after step {event['step']}, {criterion}",
            f"{event['seconds']:.2f}",
            f"{event['steps_worth']:.1f}",
        )
        for criterion, events in data["events"].items()
        for event in events
    ]
    layer = data["layer"]
    rows += [
        ("down_proj of a 7B: sums over the tokens", f"{layer['sums_seconds']:.1f}", ""),
        ("down_proj of a 7B: ridges and solution", f"{layer['solve_seconds']:.1f}", ""),
    ]
    about = (
        "Events of a joint run of 100 steps of 16 x 256 tokens; an event may remove nothing, where "
        f"counts are rounded. The layer keeps {layer['kept']:,} columns, has "
        f"{layer['tokens']:,} tokens (sums over fewer are scaled up) and a Gram matrix of "
        f"{layer['gram_bytes'] / 1e6:.0f} MB. The process peaked at "
        f"{layer['peak_bytes'] / 1e9:.2f} GB, libraries included."
    )
    return write_table(("work", "s", "in steps"), rows, about, describe(data, "peft"))


def render_refit_memory(data: dict[str, Any]) -> str:
    """Compare the peak memory of a run with that of one with a refit."""
    rows = [
        (
            name,
            f"{data[key]['planned']['total'] / 1e6:,.0f}",
            f"{data[key]['peak_bytes'] / 1e6:,.0f}",
        )
        for key, name in {"plain": "without a refit", "refit": "with a refit"}.items()
    ]
    options = data["options"]
    about = (
        f"{data['model']}, {options['steps']} steps of {options['batch_size']} x "
        f"{options['seq_len']} tokens, criterion {options['criterion']}, fp32, in a process of its "
        "own, libraries included."
    )
    return write_table(("run", "planned, MB", "measured, MB"), rows, about, describe(data, "peft"))


def render_distill(data: dict[str, Any]) -> str:
    """Say what distillation costs a step, and before the steps."""
    ratio, options = data["step_ratio"], data["options"]
    low, high = ratio["quartiles"]
    rows = [
        ("a step, against one without", f"{ratio['median']:.3f} (quartiles {low:.3f}, {high:.3f})"),
        ("the pass of the unpruned model, against all steps", f"{data['teacher_share']:.2f}"),
        ("its cache", f"{data['teacher_bytes'] / 1e6:,.0f} MB"),
    ]
    about = (
        f"{data['model']}, {options['steps']} steps of {options['batch_size']} x "
        f"{options['seq_len']} tokens to 50 %, each row seen once. The two runs take turns step by "
        f"step; the ratio is that of {ratio['steps']} steps after the last event."
    )
    return write_table(("what", "cost"), rows, about, describe(data, "peft"))


def render_stages(data: dict[str, Any]) -> str:
    """Say what each stage of the line takes for a large model."""
    rows = [
        (
            name,
            f"{stage['seconds']:,.0f}",
            f"{stage['peak_bytes'] / 1e9:.2f}",
            f"{stage['bytes'] / 1e9:.2f}",
        )
        for name, stage in data["stages"].items()
    ]
    about = (
        f"{data['parameters'] / 1e9:.2f} B random weights in bf16, {data['bytes'] / 1e9:.1f} GB, "
        f"in {data['layers']} layers of LLaMA-7B's shape; prune runs two steps of 64 tokens to "
        "50 %. The peak is the resident memory of the largest process of a stage, mapped pages of "
        "files among it."
    )
    header = ("stage", "s", "peak memory, GB", "written, GB")
    return write_table(header, rows, about, describe(data, "onnxruntime"))


def render_one_shot(data: dict[str, Any]) -> str:
    """Compare ways to prune without training."""
    rows = [("unpruned", "", "", f"{data['dense']:.1f}", "")]
    for name, row in data["rows"].items():
        achieved = row["achieved"]
        removed = (f"{achieved[kind]:.0%} of the {kind}" for kind in ("layers", "heads", "channels")
                   if achieved[kind])  # fmt: skip
        kind, by, score = name.partition("-by-")
        score = score.replace("-as-peft", ", started as peft does").replace("-", ", ")
        way = f"{kind} by {score}" if by else name.replace("-", ", ")
        rows.append((
            way, ", ".join(removed), f"-{achieved['parameters']:.1%}",
            f"{row['perplexity']:.1f}", f"{row['seconds'] / 60:.0f}",
        ))  # fmt: skip
    documents = data["shared_options"]["documents"]
    about = (
        f"Perplexity of the last {documents} documents of the second text, in segments of 256 "
        "tokens. Criterion gate unless another is named, 128 rows of 256 tokens to score and to "
        "refit over."
    )
    tried = [_describe_trials(name, row) for name, row in data["rows"].items() if row["trials"]]
    header = ("way", "removed", "parameters", "perplexity", "min")
    return write_table(header, rows, " ".join([about, *tried]), describe(data, "peft"))


def _describe_trials(name: str, row: dict[str, Any]) -> str:
    """Say which shapes a row tried, and the loss of held-out rows with each."""
    shapes = []
    for trial in row["trials"]:
        ratios = trial["ratios"]
        heads, channels = (
            ratios.get(own, ratios.get("ratio")) for own in ("head_ratio", "channel_ratio")
        )
        kind = "query heads" if ratios.get("heads") == "query-heads" else "KV heads"
        layers = f"{ratios['drop_layers']} layers, " if ratios["drop_layers"] else ""
        shapes.append(
            f"{layers}{heads:.1%} of the {kind} and {channels:.1%} of the channels "
            f"({trial['loss']:.3f})"
        )
    return (
        f'Tried for "{name.replace("-", ", ")}", before rounding and with the loss of held-out '
        f"rows in brackets: {'; '.join(shapes)}."
    )


def render_run(data: dict[str, Any]) -> str:
    """Compare a whole run that cuts with one that masks."""
    header = (
        *("removal", "total, s", *_PARTS, "step before, s", "after, s", "after / before"),
        *("last losses", "held-out perplexity"),
    )
    rows = []
    for name, run in data["runs"].items():
        total, perplexity = run["seconds"], run["valid_perplexity"]
        shares = [f"{run[f'{part}_s'] / total:.1%}" for part in _PARTS]
        steps = [f"{run['step_s_before']:.3g}", f"{run['step_s_after']:.3g}"]
        quality = [f"{run['loss']:.3f}", "" if perplexity is None else f"{perplexity:.2f}"]
        ratio = f"{run['after_over_before']:.2f}"
        rows.append((name, f"{total:.1f}", *shares, *steps, ratio, *quality))
    options = data["options"]
    about = (
        f"{data['model']}, {options['steps']} steps of {options['batch_size']} x "
        f"{options['seq_len']} tokens. Cutting took {data['cut_over_mask']:.2f} of the time of "
        f"masking over the whole run, and {data['late_cut_over_mask']:.2f} in the last quarter of "
        "the steps, compared pair by pair."
    )
    return write_table(header, rows, about, describe(data, "peft"))


def render_scaling(data: dict[str, Any]) -> str:
    """Show the plans for large models."""
    header = (
        *("model", "GPUs", "base", "checkpointing", "micro-batch", "weights, GB", "LoRA, GB"),
        *("activations, GB", "in all, GB", "fits 80 GB", "hours"),
    )
    rows = [
        (
            row["model"],
            row["gpus"],
            (row["load_in"] or "bf16") + (", sharded" if row["sharded"] else ""),
            "yes" if row["gradient_checkpointing"] else "no",
            row["micro_batch_size"],
            *(
                f"{row['bytes'][part] / 1e9:.1f}"
                for part in ("weights", "adapters", "activations", "total")
            ),
            "yes" if row["fits"] else "no",
            f"{row['run_hours']:.1f}" if row["fits"] else "",
        )
        for row in data["rows"]
    ]
    setting, rate = data["setting"], data["constants"]["flops_per_s"]
    about = (
        f"Computed, not measured: `{find_command(data)}`. Batch of {setting['batch_size']} x "
        f"{setting['seq_len']} tokens, LoRA of rank {setting['lora_rank']}, {setting['steps']} "
        f"steps. Memory is per GPU. Hours assume {rate['value'] / 1e12:.0f} TFLOP/s per GPU "
        f"({rate['source']}), without the time of the network."
    )
    return write_table(header, rows, about)


def render_latency(data: dict[str, Any]) -> str:
    """Show the paper's Table 3, measured here."""

    def show(row: dict[str, Any]) -> str:
        return f"{row['median_ms']:.2f} ({row['p10_ms']:.2f} to {row['p90_ms']:.2f})"

    header = ("engine", "pruned", "unmerged, ms", "merged, ms", "merged against dense")
    measured = [row for row in data["latency"] if row["phase"] == "prefill"]
    rows = []
    for engine in dict.fromkeys(row["engine"] for row in measured):
        for ratio in sorted({row["ratio"] for row in measured}):
            same = [row for row in measured if (row["engine"], row["ratio"]) == (engine, ratio)]
            pair = {row["merged"]: row for row in same}
            name, gain = f"{engine} {pair[True]['precision']}", pair[True]["relative"] - 1
            rows.append((name, f"{ratio:.0%}", show(pair[False]), show(pair[True]), f"{gain:+.1%}"))
    about = (
        f"Prefill of {measured[0]['tokens']} tokens, batch {measured[0]['batch']}, median of "
        f"{measured[0]['repeats']} interleaved trials (p10 to p90)."
    )
    return write_table(header, rows, about, describe(data))


def render_messages(data: dict[str, Any]) -> str:
    """Compare the bytes that a step sends with those counted from shapes."""
    header = ("criterion", "summed, counted from shapes", "summed", "gathered, counted", "gathered")
    rows = [
        (
            name,
            f"{row['computed']['gradients'] + row['computed']['scores']:,}",
            f"{row['summed']:,}",
            f"{row['computed']['weights']:,}",
            f"{row['gathered']:,}",
        )
        for name, row in data["messages"].items()
    ]
    about = "In bytes. The other summed bytes are those with which the ranks agree on how to go on."
    return write_table(header, rows, about, describe(data))


def render_load(data: dict[str, Any]) -> str:
    """Show the memory of a rank that loads its share of a base model."""
    names = {
        "the whole base": "weight_bytes",
        "the share of this rank": "own_bytes",
        "memory after loading": "held_bytes",
        "peak while loading": "peak_bytes",
    }
    rows = [(name, f"{data['load'][key] / 1e6:.0f}") for name, key in names.items()]
    return write_table(("", "MB"), rows, describe(data))


def render_triton(data: dict[str, Any]) -> str:
    """Compare Triton, serving many clients, with the runner alone."""
    options, rounds, cuts = data["options"], data["rounds"], (50, 95, 99)
    alone, served = (sorted(each[name] for each in rounds) for name in ("alone", "served"))
    rows = [
        (f"{name}, ms", *(f"{data[key][f'p{cut}_ms']:.0f}" for cut in cuts))
        for name, key in (("first token", "first_token"), ("each next token", "next_token"))
    ]
    ratios = ", ".join(f"{each['relative']:.2f}" for each in rounds)
    about = (
        f"{options['clients']} clients, prompts of {options['prompt']} tokens and "
        f"{options['tokens']} new ones, {options['precision']}, {data['answers']} answers in "
        f"{len(rounds)} rounds. Triton gave {served[0]:.0f} to {served[-1]:.0f} tokens/s, and the "
        f"same runner in one process with the same batch {alone[0]:.0f} to {alone[-1]:.0f}. Their "
        f"ratio by round: {ratios}; median {data['relative']:.2f}."
    )
    header = ("", *(f"p{cut}" for cut in cuts))
    return write_table(header, rows, about, f"Triton {data['triton']}, {describe(data)}")


def render_served(data: dict[str, Any]) -> str:
    """Show the results of the optional tests with real servers."""
    rows = [
        (row["server"], row["version"], row["shape"], row["result"], row["date"][:10])
        for row in data["rows"]
    ]
    commands, machines = (sorted({row[key] for row in data["rows"]}) for key in ("command", "cpu"))
    about = f"{', '.join(machines)}: {', '.join(f'`{name}`' for name in commands)}"
    return write_table(("server", "version", "shape", "gives", "date"), rows, about)


def render_rank(data: dict[str, Any]) -> str:
    """Show what a higher rank of LoRA costs."""
    low, high = map(str, data["ranks"])
    ratio = data["step_ratio"]
    first, last = ratio["quartiles"]
    rows = [(f"a step with rank {high}, against rank {low}",
             f"{ratio['median']:.3f} (quartiles {first:.3f}, {last:.3f})")]  # fmt: skip
    rows += [
        (f"LoRA, its gradients and the state of AdamW, {name}",
         f"{format_bytes(sizes[high])}, against {format_bytes(sizes[low])}")
        for name, sizes in data["adapter_bytes"].items()
    ]  # fmt: skip
    options = data["options"]
    about = (
        f"{data['model']}, {options['steps']} steps of {options['batch_size']} x "
        f"{options['seq_len']} tokens. The two runs take turns step by step; the ratio is that of "
        f"{ratio['steps']} steps after the last event. Bytes are planned, not measured."
    )
    return write_table(("what", "cost"), rows, about, describe(data, "peft"))


def render_lora_init(data: dict[str, Any]) -> str:
    """Show how far LoRA's gradients rank groups as the true ones do, by how LoRA starts."""
    starts = data["starts"]
    labels = {"heads": "whole groups of heads", "channels": "whole channels"}
    last = starts["groups"]
    rows = [
        (labels.get(kind, kind),
         *(f"{starts[init][kind]['rank_correlation']:.2f}" for init in starts),
         *(f"{last[kind].get(f'share_{name}', 1):.0%}" for name in ("lora", "gradient")))
        for kind in sorted(last, key=lambda kind: kind in labels)
    ]  # fmt: skip
    header = (
        "scores of",
        *(f"rank correlation, {init}" for init in starts),
        *(f"part of the score, {name}" for name in ("lora, groups", "gradient")),
    )
    about = (
        f"{data['model']}, LoRA of rank {data['rank']}, {data['rows']} rows of "
        f"{data['options']['seq_len']} tokens before the first step; means over the layers."
    )
    return write_table(header, rows, f"{about} {describe(data, 'peft')}")


def render_tutorial(data: dict[str, Any]) -> str:
    """Show how long each command of the tutorial takes."""
    stages = data["stages"]
    rows = [(f"`{_shorten(stage['command'])}`", f"{stage['seconds']:.0f}") for stage in stages]
    total = sum(stage["seconds"] for stage in stages)
    rows.append(("all", f"{total:.0f}, or {total / 60:.0f} minutes"))
    return write_table(("command", "seconds"), rows, f"{data['model']}. {describe(data)}")


def _shorten(command: str) -> str:
    """Keep the command and what it is given first."""
    words = command.split()
    dry = " ... --dry-run" if "--dry-run" in words else ""
    return " ".join(itertools.takewhile(lambda word: not word.startswith("--"), words)) + dry


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "answers": render_answers,
    "formats": render_formats,
    "int4": render_int4,
    "bench": lambda data: strip_heading(render_latency_table(read_record(LatencyResult, data))),
    "latency": render_latency,
    "load": render_load,
    "lora_init": render_lora_init,
    "one_shot": render_one_shot,
    "rank": render_rank,
    "refit": render_refit,
    "refit_memory": render_refit_memory,
    "distill": render_distill,
    "memory": render_memory,
    "messages": render_messages,
    "paper": lambda data: strip_heading(render_markdown(read_record(TableResult, data))),
    "pruning": lambda data: strip_heading(render_pruning_table(read_record(PruningResult, data))),
    "run": render_run,
    "scaling": render_scaling,
    "served": render_served,
    "stages": render_stages,
    "triton": render_triton,
    "tutorial": render_tutorial,
}

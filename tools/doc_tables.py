"""The tables of docs/costs.md and docs/scaling.md, from what the tools measured or planned."""

from typing import Any

from lpdeploy.benchmark.pruning_table import render_pruning as render_bench

_PARTS = ("training", "scoring", "cutting")
_RUN_HEADER = (
    *("removal", "total, s", *_PARTS, "step before, s", "after, s", "after / before"),
    *("last losses", "held-out perplexity"),
)
_SCALING_HEADER = (
    *("model", "GPUs", "base", "checkpointing", "micro-batch", "weights, GB", "LoRA, GB"),
    *("activations, GB", "in all, GB", "fits 80 GB", "hours"),
)


def render_pruning(data: dict[str, Any]) -> str:
    """Return the tables of `lpdeploy bench pruning`, without their heading."""
    return render_bench(data).split("\n", 2)[2].rstrip()


def render_memory(data: dict[str, Any]) -> str:
    """Return what was planned beside what was measured."""
    lines = [
        "| model | options | planned, MB | measured, MB | error |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        options = ", ".join(
            f"{name.replace('_', ' ')} {value}" if value is not True else name.replace("_", " ")
            for name, value in row["options"].items()
        )
        lines.append(
            f"| {row['shape']} | {options or 'the defaults below'} "
            f"| {row['planned_bytes']['total'] / 1e6:,.0f} | {row['measured_bytes'] / 1e6:,.0f} "
            f"| {row['error']:+.1%} |"
        )
    about = (
        "lora, micro-batches of 1 x 512 tokens, two to a step, LoRA of rank 8 with dropout, fp32; "
        "the peak of a process, its libraries included."
    )
    return "\n".join([*lines, "", about, describe(data["machine"])])


def render_run(data: dict[str, Any]) -> str:
    """Return a whole run that cuts beside the same run that masks."""
    lines = [
        f"| {' | '.join(_RUN_HEADER)} |",
        f"|{' --- |' * len(_RUN_HEADER)}",
    ]
    for name, run in data["runs"].items():
        total = run["seconds"]
        shares = " | ".join(f"{run[f'{part}_s'] / total:.1%}" for part in _PARTS)
        perplexity = run["valid_perplexity"]
        lines.append(
            f"| {name} | {total:.1f} | {shares} | {run['step_s_before']:.3g} "
            f"| {run['step_s_after']:.3g} | {run['after_over_before']:.2f} | {run['loss']:.3f} "
            f"| {'' if perplexity is None else f'{perplexity:.2f}'} |"
        )
    options = data["options"]
    about = (
        f"{data['model']}, {options['steps']} steps of {options['batch_size']} x "
        f"{options['seq_len']} tokens; cut against mask: {data['cut_over_mask']:.2f} of "
        f"the time of the whole run, {data['late_cut_over_mask']:.2f} of that of the steps of its "
        "last quarter, round by round."
    )
    return "\n".join([*lines, "", about, describe(data["machine"])])


def render_scaling(data: dict[str, Any]) -> str:
    """Return the plans of large models."""
    lines = [
        f"| {' | '.join(_SCALING_HEADER)} |",
        f"|{' --- |' * len(_SCALING_HEADER)}",
    ]
    for row in data["rows"]:
        parts = row["bytes"]
        numbers = (parts["weights"], parts["adapters"], parts["activations"], parts["total"])
        values = " | ".join(f"{value / 1e9:.1f}" for value in numbers)
        base = (row["load_in"] or "bf16") + (", sharded" if row["sharded"] else "")
        hours = f"{row['run_hours']:.1f}" if row["fits"] else ""
        lines.append(
            f"| {row['model']} | {row['gpus']} | {base} "
            f"| {'yes' if row['gradient_checkpointing'] else 'no'} | {row['micro_batch_size']} "
            f"| {values} | {'yes' if row['fits'] else 'no'} | {hours} |"
        )
    setting, rate = data["setting"], data["constants"]["flops_per_s"]
    about = (
        f"Computed, not measured: `{data['command']}`. Batch {setting['batch_size']} x "
        f"{setting['seq_len']} tokens, LoRA of rank {setting['lora_rank']}, {setting['steps']} "
        f"steps; memory of each GPU; hours at {rate['value'] / 1e12:.0f} TFLOP/s a GPU "
        f"({rate['source']}), without what the network takes."
    )
    return "\n".join([*lines, "", about])


def describe(machine: dict[str, Any]) -> str:
    """Say on what, with what and when something was measured."""
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft")
    )
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {versions}, "
        f"{machine['date'][:10]}: `{machine['command']}`"
    )

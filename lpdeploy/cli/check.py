"""`lpdeploy check`: the shape and cost of a pruned model, before any training."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lpdeploy.cli.common import base_option, print_result, shared_options, write_flags
from lpdeploy.cli.options import GroupedCommand, build_config, config_options
from lpdeploy.cli.types import COUNT, MODEL
from lpdeploy.machine import format_bytes

if TYPE_CHECKING:
    from lpdeploy.servers.check import Alignment, CheckResult


@click.command("check", cls=GroupedCommand)
@click.argument("model", type=MODEL, metavar="MODEL|RUN")
@config_options(
    "ratio", "head_ratio", "channel_ratio", "drop_layers", "round_to", "round_heads_to", "heads"
)
@click.option(
    "--tensor-parallel", type=COUNT, default=1, help="Number of GPUs that share the heads."
)
@click.option(
    "--tokens", type=COUNT, default=2048, help="Number of prompt tokens in the cost estimate."
)
@base_option
@shared_options()
def command(
    *,
    model: str,
    tensor_parallel: int,
    tokens: int,
    base: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Show the shape, cost and servers of a pruned model.

    For a MODEL, computes the shape that the given ratio would leave. Nothing is trained, and only
    the config and the tokenizer are read. For a RUN, describes the shape that it was pruned to.
    Lists the servers that load the shape. If pruning makes a server reject it, suggests a similar
    shape that loads.
    """
    config = build_config(values)
    if config.has_open_shape:
        raise click.UsageError(
            "check shows one shape. Give --heads kv-groups or --heads query-heads."
        )

    from lpdeploy.servers.check import check

    result = check(model, config, tensor_parallel=tensor_parallel, tokens=tokens, base=base)
    data = result.to_json()
    if data["suggestion"]:
        data["suggestion"]["options"] = write_flags(data["suggestion"]["options"])
    print_result(data, _format(result), as_json=as_json)


def _format(result: "CheckResult") -> str:
    from lpdeploy.servers.check import describe_request

    shape, before, after = result.shape, result.before, result.after
    heads, kv_heads, channels = (
        f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)
        for value in (shape.heads, shape.kv_heads, shape.channels)
    )
    size = f"{heads} heads ({kv_heads} KV) of {shape.head_dim}, {channels} channels"
    lines = [
        f"{shape.architecture}: {shape.layers} layers, {size}",
        _compare("parameters", before.parameters, after.parameters, "{:,.0f}".format),
        _compare("bytes", before.bytes, after.bytes, format_bytes),
        _compare(
            f"prefill of {result.tokens} tokens",
            before.prefill_flops,
            after.prefill_flops,
            lambda flops: f"{flops / 1e12:.3g} TFLOP",
        ),
        _compare(
            f"bytes read per token, with a cache of {result.tokens} tokens",
            before.decode_bytes,
            after.decode_bytes,
            format_bytes,
        ),
        "",
        *(_describe_width(row, ranks=result.tensor_parallel) for row in result.alignment),
        "",
        *(
            f"{row.name:18} {row.loads:10} {write_flags(row.why)} [{row.tested or 'not tried'}]"
            for row in result.servers
        ),
    ]
    if result.suggestion is not None:
        request, nearest = result.suggestion
        options = write_flags(describe_request(request))
        widths = f"{nearest.heads} heads, {nearest.channels} channels"
        lines += [
            "",
            f"Nearest shape that loads wherever the unpruned model does: {options} ({widths})",
        ]
    return "\n".join(lines)


def _compare(name: str, before: float, after: float, write: Callable[[Any], str]) -> str:
    return f"{name}: {write(after)}, {after / before - 1:+.1%} of {write(before)}"


def _describe_width(row: "Alignment", *, ranks: int) -> str:
    share = " of each GPU" if ranks > 1 else ""
    note = "" if row.aligned else "; use a multiple of 8 for half precision"
    return (
        f"{row.width}{share}: {row.size}, a multiple of {row.multiple}; "
        f"{row.waste:.1%} of the multiplications are padding in tiles of 128{note}"
    )

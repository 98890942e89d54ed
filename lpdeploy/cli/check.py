"""`lpdeploy check`: what a ratio would give, before any training."""

from typing import Any

import click

from lpdeploy.artifacts import format_bytes
from lpdeploy.cli.common import print_result, shared_options
from lpdeploy.pruning.options import PruneOptions

_DEFAULT = PruneOptions()
_COUNT = click.IntRange(min=1)
_SHARE = click.FloatRange(0, 1, max_open=True)


@click.command("check")
@click.argument("model", metavar="MODEL|RUN")
@click.option(
    "--ratio",
    type=_SHARE,
    default=_DEFAULT.ratio,
    help="Share of groups to remove; a RUN has its own.",
)
@click.option("--head-ratio", type=_SHARE, help="Share of the heads.  [default: --ratio]")
@click.option("--channel-ratio", type=_SHARE, help="Share of the channels.  [default: --ratio]")
@click.option("--round-to", type=_COUNT, default=_DEFAULT.round_to, help="Channels: multiples.")
@click.option(
    "--round-heads-to", type=_COUNT, default=_DEFAULT.round_heads_to, help="KV heads: multiples."
)
@click.option("--tensor-parallel", type=_COUNT, default=1, help="GPUs that share the heads.")
@click.option("--tokens", type=_COUNT, default=2048, help="Of the prefill, and in the cache.")
@shared_options()
def command(  # noqa: PLR0913 - one parameter an option
    *,
    model: str,
    ratio: float,
    head_ratio: float | None,
    channel_ratio: float | None,
    round_to: int,
    round_heads_to: int,
    tensor_parallel: int,
    tokens: int,
    as_json: bool,
) -> None:
    """Say which servers load MODEL pruned by --ratio, or what RUN has pruned, and what it costs.

    Nothing is trained, and of MODEL only the config is read.
    """
    from lpdeploy.servers.check import Target, check

    target = Target(ratio, round_to, round_heads_to, head_ratio, channel_ratio)
    result = check(model, target=target, tensor_parallel=tensor_parallel, tokens=tokens)
    print_result(result, _format(result), as_json=as_json)


def _format(result: dict[str, Any]) -> str:
    shape, before, after = result["shape"], result["before"], result["after"]
    heads, kv_heads, channels = (
        f"{min(value)} to {max(value)}" if isinstance(value, list) else str(value)
        for value in (shape["heads"], shape["kv_heads"], shape["channels"])
    )
    size = f"{heads} heads ({kv_heads} KV) of {shape['head_dim']}, {channels} channels"
    lines = [
        f"{shape['architecture']}: {shape['layers']} layers, {size}",
        _compare("parameters", before["parameters"], after["parameters"], "{:,.0f}".format),
        _compare("bytes", before["bytes"], after["bytes"], format_bytes),
        _compare(
            f"prefill of {result['tokens']} tokens",
            before["prefill_flops"],
            after["prefill_flops"],
            lambda flops: f"{flops / 1e12:.3g} TFLOP",
        ),
        _compare(
            f"read a token, with a cache of {result['tokens']}",
            before["decode_bytes"],
            after["decode_bytes"],
            format_bytes,
        ),
        "",
        *(_describe_width(row, ranks=result["tensor_parallel"]) for row in result["alignment"]),
        "",
        *(
            f"{row['name']:18} {row['loads']:10} {row['why']}"
            + (f" [{row['tested']}]" if row["tested"] else "")
            for row in result["servers"]
        ),
    ]
    if (found := result["suggestion"]) is not None:
        widths = f"{found['heads']} heads, {found['channels']} channels"
        lines += ["", f"Nearest that costs no server: {found['options']} ({widths})"]
    return "\n".join(lines)


def _compare(name: str, before: float, after: float, write: Any) -> str:
    return f"{name}: {write(after)}, {after / before - 1:+.1%} of {write(before)}"


def _describe_width(row: dict[str, Any], *, ranks: int) -> str:
    share = " of each GPU" if ranks > 1 else ""
    note = "" if row["aligned"] else "; no multiple of 8, which half precision wants"
    return (
        f"{row['width']}{share}: {row['size']}, a multiple of {row['multiple']}; "
        f"{row['waste']:.1%} of the multiplications in tiles of 128 are padding{note}"
    )

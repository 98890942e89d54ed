"""Refit: when groups go, the columns of o_proj and down_proj that stay are solved again.

Removing groups takes their part out of the residual stream. What stays can make up for much of it:
each of these weights is solved by ridge least squares over calibration tokens, so that the residual
stream behind it is again what it was before the event. Layers are solved from the first to the
last. Two streams of hidden states go through them, that of the model before the event and that of
the model as it is pruned so far, so a layer also makes up for what the layers before it lost.

With X (tokens, kept) the inputs of a weight W and R (tokens, hidden) what is missing behind it, the
change is ``argmin_D ||X D' - R||^2 + ridge * mean(diag X'X) * ||D||^2``, which needs only X'X and
X'R. The ridge is chosen on calibration rows that are held out.

Source:
    Our own combination. Solving what stays from a Gram matrix goes back to Optimal Brain Surgeon
    (Hassibi and Stork, 1993); SparseGPT (arXiv:2301.00774), ZipLM (arXiv:2302.04089), SlimGPT
    (arXiv:2412.18110) and FLAP (arXiv:2312.11983) make up for what was pruned in language models.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError
from lpdeploy.models.adapters import get_base_linear
from lpdeploy.models.run_weights import copy_columns
from lpdeploy.models.weight_files import index_weights
from lpdeploy.plan import GroupSpec, get_output
from lpdeploy.pruning.least_squares import make_sums, solve
from lpdeploy.pruning.walk import Calibration, Pace, enter_layers, evaluating, walk_layers

logger = logging.getLogger(__name__)

TOKENS_A_COLUMN = 20
"""Calibration tokens for each column that is solved; fewer fit the calibration data only."""
_FEWEST_TOKENS_A_COLUMN = 2


def count_refit_rows(options: PruneConfig, lengths: npt.NDArray[Any], *, columns: int) -> int:
    """Return how many rows to refit over.

    Args:
        options: May say it.
        lengths: Tokens of each row of the data set.
        columns: Of the widest weight that is solved.
    """
    if options.refit_samples is not None:
        return min(options.refit_samples, len(lengths))
    rows = math.ceil(TOKENS_A_COLUMN * columns / lengths.mean())
    # The one event of a schedule that has no other may take its time.
    once = options.num_calibration_rows if options.schedule != "joint" else 0
    return min(max(rows, once), len(lengths))


def check_refit_rows(options: PruneConfig, lengths: npt.NDArray[Any], *, columns: int) -> None:
    """Refuse data that is too little to refit over, and warn of data that is little.

    Args:
        options: May say how many rows are taken.
        lengths: Tokens of each row of the data set.
        columns: Of the widest weight that is solved at the last event.

    Raises:
        LpdeployError: There are fewer than 2 tokens for each column.
    """
    rows = count_refit_rows(options, lengths, columns=columns)
    tokens = int(rows * lengths.mean())
    advice = (
        f"At least {_FEWEST_TOKENS_A_COLUMN * columns:,} are needed, and "
        f"{TOKENS_A_COLUMN * columns:,} advised: give more data, or more `refit_samples`."
    )
    if tokens < _FEWEST_TOKENS_A_COLUMN * columns:
        raise LpdeployError(
            f"A refit of {columns:,} columns over {tokens:,} tokens would only fit these tokens. "
            f"{advice} Or leave `refit` out."
        )
    if tokens < TOKENS_A_COLUMN * columns * 0.9:  # rows are rounded, and lengths a mean
        logger.warning(
            "The refit has %s tokens for %s columns, and may help little. %s",
            f"{tokens:,}",
            f"{columns:,}",
            advice,
        )


def list_stored(
    folder: Path, config: PretrainedConfig, specs: Iterable[GroupSpec]
) -> dict[str, torch.dtype]:
    """Return the precision in which a checkpoint stores each weight that may be refitted."""
    stored = index_weights(folder, config)
    modules = [get_output(spec).module for spec in specs]
    return {module: stored[f"{module}.weight"].info.torch_dtype for module in modules}


@dataclass(frozen=True)
class Part:
    """A weight that is to be solved again.

    Attributes:
        columns: Its columns that stay, where the others are masked; None where they were cut.
        dtype: Precision of the checkpoint, to which the solution is rounded.
    """

    columns: Tensor | None
    dtype: torch.dtype


@dataclass
class _Stream:
    """A batch on its way through the layers; hidden states have shape (B, T, hidden).

    Attributes:
        real: Which tokens are no padding, shape (B, T).
        keywords: What each layer is called with beside the hidden states.
        before: Hidden states of the model before the event.
        pruned: Those of the model as it is pruned so far.
        middle: ``before``, between the attention and the FFN of the layer at hand.
    """

    real: Tensor
    keywords: list[Mapping[str, Any]]
    before: Tensor
    pruned: Tensor
    middle: Tensor


def refit_layers(
    model: Any, calibration: Calibration, *, remove: Callable[[int], Mapping[str, Part] | None]
) -> None:
    """Remove groups layer by layer, and solve what stays of each layer before going to the next.

    Args:
        model: The causal LM inside peft.
        calibration: Rows to solve over.
        remove: Removes the groups of a layer by its index, and returns which of ``o_proj`` and
            ``down_proj`` are to be solved; None if the whole layer goes.

    Raises:
        LpdeployError: Hidden states are not finite, or another rank is gone. Groups are removed
            from some layers by then, so the model is of no use any more.
    """
    ridges: list[float | None] = []
    with evaluating(model):
        streams = _begin(model, calibration)
        changed = False
        for index, layer in walk_layers(model, Pace("Refitting", calibration.ranks)):
            for stream in streams:
                _run_before(layer, index, stream, calibration)
            parts = remove(index)
            changed = changed or parts is None or bool(parts)
            if not changed:
                for stream in streams:
                    stream.pruned = stream.before
            elif parts is not None:
                own = parts.get("o_proj")
                ridges += _refit_attention(layer, index, streams, own, calibration)
                ridges += _refit_ffn(layer, streams, parts.get("down_proj"), calibration)
    _report(calibration, ridges)


def _report(calibration: Calibration, ridges: list[float | None]) -> None:
    """Say what the solutions were fitted to, and which ridges were chosen."""
    counts = torch.zeros(2, dtype=torch.float64, device=calibration.ranks.device)
    for batch in calibration.batches:
        mask = batch["attention_mask"]
        counts += torch.tensor([len(mask), float(mask.sum())]).to(counts)
    calibration.ranks.sum([counts])
    rows, tokens = (int(count) for count in counts.tolist())
    chosen = [
        f"ridge {ridge:g} for {number}" if ridge else f"{number} left as they were"
        for ridge, number in sorted(Counter(ridges).items(), key=lambda pair: -pair[1])
    ]
    if calibration.ranks.is_first and chosen:
        weights = f"{len(ridges)} weights refitted over {rows:,} rows ({tokens:,} tokens)"
        logger.info("%s: %s", weights, ", ".join(chosen))


def _begin(model: Any, calibration: Calibration) -> list[_Stream]:
    streams = []
    for batch in calibration.batches:
        with calibration.autocast():
            hidden, keywords = enter_layers(model, batch["input_ids"])
        real = batch["attention_mask"].bool()
        streams.append(_Stream(real, keywords, hidden, hidden, hidden))
    return streams


def _run_before(layer: Any, index: int, stream: _Stream, calibration: Calibration) -> None:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        stream.middle = args[0]

    handle = layer.post_attention_layernorm.register_forward_pre_hook(keep)
    try:
        with calibration.autocast():
            stream.before = layer(stream.before, **stream.keywords[index])
    finally:
        handle.remove()


def _refit_attention(
    layer: Any, index: int, streams: list[_Stream], part: Part | None, calibration: Calibration
) -> list[float | None]:
    attention = layer.self_attn

    def attend(stream: _Stream) -> Any:
        normed = layer.input_layernorm(stream.pruned)
        return attention(hidden_states=normed, **stream.keywords[index])

    # As large as a stream at most; to compute them twice would cost more.
    inputs = [_take_inputs(attention.o_proj, attend, stream, calibration) for stream in streams]
    ridges = []
    if part is not None:
        missing = (stream.middle - stream.pruned for stream in streams)
        ridges += [_solve_linear(attention.o_proj, part, streams, inputs, missing, calibration)]
    for stream, own in zip(streams, inputs, strict=True):
        with calibration.autocast():
            stream.pruned = stream.pruned + attention.o_proj(own)
    return ridges


def _refit_ffn(
    layer: Any, streams: list[_Stream], part: Part | None, calibration: Calibration
) -> list[float | None]:
    def feed(stream: _Stream) -> Any:
        return layer.mlp(layer.post_attention_layernorm(stream.pruned))

    ridges = []
    if part is not None:
        down = layer.mlp.down_proj
        inputs = (_take_inputs(down, feed, stream, calibration) for stream in streams)
        missing = (stream.before - stream.pruned for stream in streams)
        ridges += [_solve_linear(down, part, streams, inputs, missing, calibration)]
    for stream in streams:
        with calibration.autocast():
            stream.pruned = stream.pruned + feed(stream)
    return ridges


class _Taken(Exception):  # noqa: N818 - no error: the pass has given what was wanted of it
    pass


def _take_inputs(
    linear: nn.Module, run: Callable[[_Stream], Any], stream: _Stream, calibration: Calibration
) -> Tensor:
    """Return what a Linear is given when a stream runs, and end the pass there."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Taken

    handle = linear.register_forward_pre_hook(take)
    try:
        with calibration.autocast():
            run(stream)
    except _Taken:
        pass
    finally:
        handle.remove()
    return found[0]


def _solve_linear(
    linear: Any,
    part: Part,
    streams: Iterable[_Stream],
    inputs: Iterable[Tensor],
    missing: Iterable[Tensor],
    calibration: Calibration,
) -> float | None:
    """Solve a Linear over all batches, and round its weight to what the checkpoint stores."""
    weight = get_base_linear(linear).weight
    kept = weight if part.columns is None else weight[:, part.columns]
    sums = {held: make_sums(kept) for held in (False, True)}
    for stream, own, gap, held in zip(streams, inputs, missing, calibration.held_out, strict=True):
        with calibration.autocast():
            rest = (gap - linear(own))[stream.real]
        tokens = own[stream.real] if part.columns is None else own[stream.real][:, part.columns]
        sums[held].add(tokens.float(), rest.float())
    calibration.ranks.sum([tensor for one in sums.values() for tensor in (one.gram, one.cross)])
    change, ridge = solve(sums[False], sums[True])
    new = (kept.float() + change.T).to(part.dtype)
    if not new.isfinite().all():
        raise LpdeployError(
            f"A refitted weight is not finite in {part.dtype}. Leave `refit` out, or use a base "
            "model that is saved in bfloat16."
        )
    columns = torch.arange(weight.shape[1]) if part.columns is None else part.columns
    copy_columns(weight, new, columns)
    return ridge

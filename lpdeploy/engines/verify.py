"""The verify stage: every stage of a run, or of a model, computes the same logits."""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.artifacts import compute_sha256, save_json
from lpdeploy.engines import ENGINES, ONNX, get_engine
from lpdeploy.engines.runner import Runner, pad_left
from lpdeploy.engines.stages import (
    Stage,
    add_rounding_noise,
    list_layers,
    list_model_stages,
    list_run_stages,
)
from lpdeploy.engines.verification import Pair, VerifyResult
from lpdeploy.engines.weight_checks import WeightsCheck
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import check_untouched, find_recorded_folders
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.records import find_record
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

_PROMPT_TOKENS = (23, 9, 17)  # three rows of different lengths: batch > 1, padding on the left
_DECODE_STEPS = 4

# The largest difference of two logits that computed the same sums in another order, as a share of
# the largest logit: some hundred times the rounding unit of float32 (2^-24).
_REORDERED = 2e-5
# Some models amplify rounding more than that. Then it is measured on the model itself, in so many
# random draws. Two orders of the same sums differ by about as much as the largest of these changes
# a logit, and a lost head changes one by far more.
_DRAWS = 3
# Other kernels round in other places than torch. Three times what rounding does in torch holds
# their differences, and is below what a lost head does, in float32 as in half precision.
_ROUNDING_MARGIN = 3.0
# A checkpoint rounds W + BA, and the weights in memory do too; where a sum in another order is on
# the other side of the middle between two numbers, one weight in a thousand differs by a unit.
_TIES = 0.1


@dataclass(frozen=True)
class _Computed:
    """What a stage computed.

    Attributes:
        logits: Shape (tokens, vocab).
        hidden: After each decoder layer of the prefill, shape (B, T, hidden); empty for an export.
        rounding: Largest change of a logit by the rounding of the weights, if they are rounded.
    """

    logits: Tensor
    hidden: list[Tensor]
    rounding: float = 0.0


def verify(
    model: str | os.PathLike[str],
    *,
    engine: str = "onnx",
    base: Path | None = None,
    atol: float | None = None,
    integrity: bool = False,
) -> VerifyResult:
    """Compare the logits of every stage with those of an earlier one, and the weights of results.

    Of a run: the base with masks and LoRA = the base cut, with LoRA = W + BA in float32 = the same
    rounded to the precision of the checkpoint = the compacted checkpoint = its export, and the
    unmerged checkpoint and its export where they are. Of a model folder: torch = its export.
    Inputs are a batch of left-padded rows of different lengths and a few cached steps of one
    token; logits at padding do not count.

    All but exports compute in float32, and may differ by what sums in another order change: 2e-5 of
    the largest logit, or, if that is more, three times what random rounding changes on this model.
    An export that rounds activations may differ by three times what the same rounding changes in
    torch, measured on this model too.

    Args:
        model: A run or a model folder.
        engine: Compare the exports for this engine too; ``torch`` leaves exports out.
        base: Where the base model of a run lies now, if it was moved.
        atol: Tolerance for every pair instead of its own.
        integrity: Hash every file of the run, its models and its exports, even if size and time
            are as recorded.

    Raises:
        ArtifactError: There is nothing to compare, a stage cannot be loaded, or a file has changed.
    """
    place = locate_model(model)
    run = place.run
    if integrity:
        _check_integrity(place)
    if run is None:
        stages = list_model_stages(place, engine)
    else:
        stages = list_run_stages(run, engine, moved_to=base)
    asked_for = engine if get_engine(engine).export else ONNX.name
    # ONNX is the default: a run that is not exported yet still has its other stages to compare.
    missing = asked_for != ONNX.name and not any(s.name.startswith(engine) for s in stages)
    if len(stages) < 2 or missing:
        what = f"no {asked_for} export" if missing else "only one stage"
        raise ArtifactError(
            f"'{model}' has {what} to look at. "
            f"Run 'lpdeploy export {model} --engine {asked_for}' first."
        )
    with place.hold(shared=True):
        result = _compare_all(stages, atol=atol)
    if run is not None:
        _save(run, result, place, [stage.name for stage in stages])
    return result


def _save(run: RunFolder, result: VerifyResult, place: ModelPlace, stages: Sequence[str]) -> None:
    """Write verify.json, where results of other exports of the same model stay."""
    contracts = [
        run.get_export(engine.name, unmerged=unmerged) / engine.contract_file
        for engine in ENGINES.values()
        for unmerged in (False, True)
    ]
    present = {path.parent.name: compute_sha256(path) for path in contracts if path.is_file()}
    own = {name: sha256 for name, sha256 in present.items() if name in stages}
    result = replace(result, model_sha256=place.compute_sha256(), exports=own)
    old = find_record(VerifyResult, run.verification, fix="Delete it.")
    with run.recorded(run.verification):
        merged = result if old is None else result.merge(old, present=present)
        save_json(run.verification, merged.to_json())


def _check_integrity(place: ModelPlace) -> None:
    run = place.run
    parts = [*place.list_parts(), *([run.path] if run else [])]
    recorded = {found for part in parts for found in find_recorded_folders(part)}
    count = run.check_files() if run else 0
    for folder in sorted(recorded - ({run.path} if run else set())):
        fix = "Make it again, or restore the file."
        count += check_untouched(folder, fix=fix, always_hash=True)
    logger.info("%s files have their recorded hashes.", count)
    for folder in parts:
        if folder not in recorded:
            logger.warning("'%s' has no record of its files: they were not checked.", folder)


def _compare_all(stages: list[Stage], *, atol: float | None) -> VerifyResult:
    """Build each stage in its turn, so that only one model is in memory."""
    pairs: list[Pair] = []
    weights: list[WeightsCheck] = []
    done: dict[str, _Computed] = {}
    by_name = {stage.name: stage for stage in stages}
    batch: list[list[int]] = []
    for stage in stages:
        runner = stage.build()
        batch = batch or build_inputs(runner.vocab_size, limit=runner.max_positions)
        found = _compute(runner, batch)
        if stage.check_weights is not None:
            weights.append(stage.check_weights(runner))
        del runner
        gc.collect()
        if stage.against is not None:
            before = done[stage.against]
            tolerance = _find_tolerance(stage, before, batch, atol=atol)
            pair = _compare(stage, before, found, tolerance)
            if not pair.ok and atol is None and stage.build_rounded is None:
                noise = _measure_noise(by_name[stage.against], before, batch)
                tolerance = max(tolerance or 0.0, _ROUNDING_MARGIN * noise)
                pair = _compare(stage, before, found, tolerance)
            found = replace(found, rounding=pair.max_abs_diff if stage.rounds else 0.0)
            pairs.append(pair)
        done[stage.name] = found
    return VerifyResult(tuple(pairs), tuple(weights))


def _find_tolerance(
    stage: Stage, before: _Computed, batch: list[list[int]], *, atol: float | None
) -> float | None:
    if stage.rounds:
        return None
    if atol is not None:
        return atol
    largest = before.logits.abs().max().item()
    if stage.build_rounded is not None:
        rounded = collect_logits(stage.build_rounded(), batch)
        rounding = (rounded - before.logits).abs().max().item()
        return _ROUNDING_MARGIN * rounding + _REORDERED * largest
    return _REORDERED * largest + _TIES * before.rounding


def _measure_noise(stage: Stage, computed: _Computed, batch: list[list[int]]) -> float:
    """Return the largest change of a logit when float32 rounds at random."""
    runner = stage.build()
    largest = 0.0
    for seed in range(_DRAWS):
        with add_rounding_noise(runner, seed=seed):
            logits = collect_logits(runner, batch)
        largest = max(largest, (logits - computed.logits).abs().max().item())
    return largest


def _compare(stage: Stage, left: _Computed, right: _Computed, tolerance: float | None) -> Pair:
    a, b = stage.against or "", stage.name
    if left.logits.shape != right.logits.shape:
        raise ArtifactError(
            f"{a} gives logits of shape {tuple(left.logits.shape)}, {b} "
            f"{tuple(right.logits.shape)}: they are not stages of one model. Compact and export "
            "again."
        )
    largest = left.logits.abs().max().item()
    # NaN compares as false with everything, so a NaN difference is never ok.
    difference = (left.logits - right.logits).abs().max().item()
    ok = difference <= (float("inf") if tolerance is None else tolerance)
    return Pair(
        a=a,
        b=b,
        max_abs_diff=difference,
        max_abs_logit=largest,
        top1_agreement=(left.logits.argmax(-1) == right.logits.argmax(-1)).float().mean().item(),
        tolerance=tolerance,
        ok=ok,
        first_layer=None
        if ok or tolerance is None
        else _find_layer(left, right, tolerance / largest),
    )


def _find_layer(left: _Computed, right: _Computed, share: float) -> int | None:
    """Return the first layer after which the largest hidden states differ by more than a share."""
    for index, (one, other) in enumerate(zip(left.hidden, right.hidden, strict=False)):
        if not (one - other).abs().max() <= share * one.abs().max():
            return index
    return None


def _compute(runner: Runner, rows: list[list[int]]) -> _Computed:
    with _watch_layers(runner) as hidden:
        logits = collect_logits(runner, rows)
    return _Computed(logits, hidden)


@contextmanager
def _watch_layers(runner: Runner) -> Iterator[list[Tensor]]:
    """Collect the hidden states after each decoder layer of the first call, the prefill."""
    layers, hidden = list_layers(runner), list[Tensor]()

    def keep(_: Any, __: Any, output: Any) -> None:
        if len(hidden) < len(layers):
            states = output[0] if isinstance(output, tuple) else output
            hidden.append(states.detach().float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


def build_inputs(vocab_size: int, *, limit: int) -> list[list[int]]:
    """Return rows of random tokens, each with the tokens that are decoded after it."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max(1, limit - _DECODE_STEPS)) for length in _PROMPT_TOKENS]
    return [
        torch.randint(vocab_size, (length + _DECODE_STEPS,), generator=generator).tolist()
        for length in lengths
    ]


def collect_logits(runner: Runner, rows: list[list[int]]) -> Tensor:
    """Run a prefill of all but the last tokens, then these one by one through the cache.

    Returns:
        Logits at every token that is not padding, shape (tokens, vocab), float32.
    """
    input_ids, mask = pad_left([row[:-_DECODE_STEPS] for row in rows])
    output = runner.forward(input_ids, attention_mask=mask)
    collected = [output.logits[mask.bool()].float().cpu()]
    for step in range(_DECODE_STEPS):
        token = torch.tensor([[row[step - _DECODE_STEPS]] for row in rows])  # (B, 1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = runner.forward(token, attention_mask=mask, past=output.past, last_only=True)
        collected.append(output.logits[:, -1].float().cpu())
    return torch.cat(collected)

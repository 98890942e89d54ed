"""The verify stage: every stage of a run, or of a model, computes the same logits."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lpdeploy.artifacts import save_json
from lpdeploy.engines import ONNX, TORCH, get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.runner import Runner, pad_left
from lpdeploy.engines.torch.runner import TorchRunner, load_torch_runner
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import check_untouched
from lpdeploy.models.adapters import LoraWeights, apply_lora_weights, attach_lora, expand_lora
from lpdeploy.models.compact import find_base, load_run_adapter
from lpdeploy.models.cutting import apply_cut, apply_masks
from lpdeploy.models.loading import PRECISIONS, get_dtype, load_config, load_model
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.plan import PruningPlan
from lpdeploy.run_folder import RunFolder

_PROMPT_TOKENS = (23, 9, 17)  # three rows of different lengths: batch > 1, padding on the left
_DECODE_STEPS = 4

# The largest difference of two logits, as a share of the largest logit. Both sides compute the
# same sums in another order, or from weights rounded once more to the precision of a checkpoint;
# each figure is some ten times the rounding unit of the precision (2^-24, 2^-11, 2^-8) grown over
# the layers, far below what one lost head or channel changes. Of int8 and int4 weights the rounding
# unit is that of a block's largest weight (2^-8, 2^-4): int4 differs by so much that the share of
# equal first choices says more than the bound, which only catches what is broken.
_RELATIVE_TOLERANCE = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "int4": 0.5}


@dataclass(frozen=True)
class Pair:
    """Two stages compared.

    Attributes:
        a: The one.
        b: The other.
        max_abs_diff: Largest absolute difference of two logits.
        max_abs_logit: Largest absolute logit of ``a``.
        top1_agreement: Share of tokens after which both put the same token first.
        tolerance: What ``max_abs_diff`` may be.
        ok: Whether it is.
    """

    a: str
    b: str
    max_abs_diff: float
    max_abs_logit: float
    top1_agreement: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class VerifyResult:
    """Every pair of neighbouring stages.

    Attributes:
        pairs: The pairs, in the order of the stages.
    """

    pairs: tuple[Pair, ...]

    @property
    def ok(self) -> bool:
        """Whether every pair agrees."""
        return all(pair.ok for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {"ok": self.ok, "pairs": [asdict(pair) for pair in self.pairs]}


@dataclass(frozen=True)
class _Stage:
    """A way to compute, made when it is its turn and forgotten afterwards."""

    name: str
    build: Callable[[], Runner]
    precision: str


def verify(
    model: str | os.PathLike[str],
    *,
    engine: str = "onnx",
    atol: float | None = None,
    integrity: bool = False,
) -> VerifyResult:
    """Compare the logits of every two neighbouring stages, over a prefill and cached decoding.

    Of a run: the base with masks and LoRA = the base cut, with LoRA = the compacted, merged,
    reloaded checkpoint = its export, and the unmerged checkpoint and its export where they
    are. Of a model folder: torch = its export. Inputs are a batch of left-padded rows of different
    lengths and a few cached steps of one token; logits at padding do not count.

    Args:
        model: A run or a model folder.
        engine: Compare the exports for this engine too; ``torch`` leaves exports out.
        atol: Tolerance for every pair instead of the one of its precision.
        integrity: Hash every file of the run, also those whose size and time are as recorded.

    Raises:
        ArtifactError: There is nothing to compare, a stage cannot be loaded, or a file has changed.
    """
    place = locate_model(model)
    for folder in place.list_parts() if integrity else ():
        check_untouched(folder, fix="Make it again, or restore the file.", always_hash=True)
    stages = _list_model(place, engine) if place.run is None else _list_run(place.run, engine)
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
        result = VerifyResult(tuple(_compare_chain(stages, atol=atol)))
    if place.run is not None:
        save_json(place.run.verification, result.to_json())
    return result


def _compare_chain(stages: list[_Stage], *, atol: float | None) -> Iterator[Pair]:
    """Compare each stage with the one before; only their logits are in memory together."""
    before, batch = None, None
    for stage in stages:
        runner = stage.build()
        batch = batch or build_inputs(runner.vocab_size, limit=runner.max_positions)
        logits = collect_logits(runner, batch)
        if before is not None:
            yield _compare(before[0], before[1], stage, logits, atol=atol)
        before = (stage, logits)
        del runner
        gc.collect()


def _compare(a: _Stage, left: Tensor, b: _Stage, right: Tensor, *, atol: float | None) -> Pair:
    if left.shape != right.shape:
        raise ArtifactError(
            f"{a.name} gives logits of shape {tuple(left.shape)}, {b.name} {tuple(right.shape)}: "
            "they are not stages of one model. Compact and export again."
        )
    largest = left.abs().max().item()
    # NaN compares as false with everything, so a NaN difference is never ok.
    difference = (left - right).abs().max().item()
    precision = max(a.precision, b.precision, key=list(_RELATIVE_TOLERANCE).index)
    tolerance = atol if atol is not None else _RELATIVE_TOLERANCE[precision] * largest
    return Pair(
        a=a.name,
        b=b.name,
        max_abs_diff=difference,
        max_abs_logit=largest,
        top1_agreement=(left.argmax(-1) == right.argmax(-1)).float().mean().item(),
        tolerance=tolerance,
        ok=difference <= tolerance,
    )


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


def _list_run(run: RunFolder, engine: str) -> list[_Stage]:
    plan, merged = run.load_plan(), locate_model(run)
    stages = [
        _Stage("masked/torch", lambda: _build_masked(run, plan), "fp32"),
        _Stage("cut/torch", lambda: _build_cut(run, plan), "fp32"),
    ]
    if run.unmerged.is_dir():
        unmerged = locate_model(run, unmerged=True)
        stages += [_torch_stage("unmerged/torch", unmerged)]
        stages += _list_exported(unmerged, engine)
    return [*stages, _torch_stage("compact/torch", merged), *_list_exported(merged, engine)]


def _list_model(place: ModelPlace, engine: str) -> list[_Stage]:
    return [_torch_stage(TORCH.name, place), *_list_exported(place, engine)]


def _torch_stage(name: str, place: ModelPlace) -> _Stage:
    stored = PRECISIONS[get_dtype(load_config(place.folder))]
    return _Stage(
        name, lambda: load_torch_runner(place.folder, dtype="fp32", adapter=place.adapter), stored
    )


def _list_exported(place: ModelPlace, engine: str) -> list[_Stage]:
    record = get_engine(engine)
    folder = find_export(place, engine) if record.export else None
    if folder is None:
        return []
    precision = load_contract(folder, record).precision
    return [_Stage(folder.name, lambda: record.load(folder), precision)]


def _build_masked(run: RunFolder, plan: PruningPlan) -> Runner:
    """The unpruned base with the adapter, its removed groups masked as in Eq. 13."""
    base, adapter = find_base(plan), load_run_adapter(run)
    wrapped = _attach(load_model(base, dtype="fp32"), expand_lora(adapter, plan))
    masks = {}
    for spec in plan.specs:
        masks[spec.name] = torch.zeros(spec.num_groups, dtype=torch.bool)
        masks[spec.name][plan.kept[spec.name]] = True
    apply_masks(wrapped.get_base_model(), plan.specs, masks)
    return TorchRunner(wrapped)


def _build_cut(run: RunFolder, plan: PruningPlan) -> Runner:
    """The base cut in memory, as training cuts it, with the adapter unmerged."""
    model = load_model(find_base(plan), dtype="fp32")
    apply_cut(model, plan.specs, {name: torch.tensor(kept) for name, kept in plan.kept.items()})
    return TorchRunner(_attach(model, load_run_adapter(run)))


def _attach(model: Any, weights: Mapping[str, LoraWeights]) -> Any:
    first = next(iter(weights.values()))
    rank = first.lora_a.shape[0]
    wrapped = attach_lora(model, rank=rank, alpha=first.scaling * rank, dropout=0.0, seed=0)
    apply_lora_weights(model, weights)
    return wrapped.eval()

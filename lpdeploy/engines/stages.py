"""The stages of a run or a model that must compute the same thing, and what each is compared with.

A stage in float32 is compared with another in float32. Rounding is taken out of the comparison, or
measured. Where weights are rounded, to the checkpoint's half precision or to the 8 or 4 bits of an
export, torch computes with the same rounded weights. Where an export rounds activations, what that
alone changes is measured in torch, on this model, and the export may differ by a few times as much.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lpdeploy.engines import TORCH, get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import TorchRunner, load_torch_runner
from lpdeploy.engines.verification import UNPACKED
from lpdeploy.engines.weight_checks import WeightsCheck, check_checkpoint
from lpdeploy.models.adapters import LoraWeights, apply_lora_weights, attach_lora, expand_lora
from lpdeploy.models.compact import find_base
from lpdeploy.models.cutting import apply_cut, apply_masks, close_gaps, drop_layers
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.models.run_weights import RunWeights, apply_refit, load_run_weights
from lpdeploy.models.weight_files import index_weights
from lpdeploy.plan import PruningPlan
from lpdeploy.run_folder import RunFolder

MERGED, ROUNDED = "merged/torch", "rounded/torch"
_NOISE = 2.0**-22
_HALF, _PACKED = ("fp16", "bf16"), ("int8", "int4")
_LAYER = re.compile(r"(?:.*\.)?layers\.\d+")


@dataclass(frozen=True)
class Stage:
    """A way to compute, made when it is its turn and forgotten afterwards.

    Attributes:
        name: What users see.
        build: Makes it.
        against: Name of an earlier stage that it is compared with; None for the first.
        rounds: Whether it is ``against`` with its weights rounded, so that it may differ.
        build_rounded: Makes ``against`` with activations rounded as this stage rounds them, whose
            difference from ``against`` says what that does; None if it computes in float32.
        check_weights: Compares its weights with those that it was made from, given its own
            runner; None if that is not possible.
    """

    name: str
    build: Callable[[], Runner]
    against: str | None = None
    rounds: bool = False
    build_rounded: Callable[[], Runner] | None = None
    check_weights: Callable[[Runner], WeightsCheck] | None = None


def list_run_stages(run: RunFolder, engine: str, *, moved_to: Path | None = None) -> list[Stage]:
    """List the stages of a run, from the base with masks to the exports.

    Args:
        run: A run that ``compact`` has made a model of.
        engine: Whose exports to list.
        moved_to: Where the base model lies now, if not where the plan says.
    """
    plan, merged = run.load_plan(), locate_model(run)
    base = find_base(plan, moved_to)
    stages = [
        Stage("masked/torch", lambda: _build_masked(run, base, plan)),
        Stage("cut/torch", lambda: _build_cut(run, base, plan), "masked/torch"),
    ]
    if run.unmerged.is_dir():
        unmerged = locate_model(run, unmerged=True)
        stages += _list_place(unmerged, "unmerged/torch", "cut/torch", engine)
    compact = "compact/torch"
    stages.append(
        Stage(
            MERGED,
            lambda: _build_merged(run, base, plan),
            "cut/torch",
            check_weights=lambda runner: check_checkpoint(
                _get_model(runner), merged.folder, a=MERGED, b=compact
            ),
        )
    )
    stored = {
        name: weight.info.torch_dtype
        for name, weight in index_weights(merged.folder, load_config(merged.folder)).items()
    }
    if set(stored.values()) != {torch.float32}:
        stages.append(
            Stage(ROUNDED, lambda: _build_merged(run, base, plan, stored), MERGED, rounds=True)
        )
    return [*stages, *_list_place(merged, compact, stages[-1].name, engine)]


def list_model_stages(place: ModelPlace, engine: str) -> list[Stage]:
    """List the stages of a model: torch, and its export."""
    return _list_place(place, TORCH.name, None, engine)


def _list_place(place: ModelPlace, name: str, against: str | None, engine: str) -> list[Stage]:
    stage = Stage(
        name, lambda: load_torch_runner(place.folder, dtype="fp32", adapter=place.adapter), against
    )
    return [stage, *_list_exports(place, name, engine)]


def _list_exports(place: ModelPlace, against: str, engine: str) -> list[Stage]:
    record = get_engine(engine)
    folder = find_export(place, engine) if record.export else None
    if folder is None:
        return []
    precision = load_contract(folder, record).precision

    def load(dtype: str = "fp32") -> TorchRunner:
        return load_torch_runner(place.folder, dtype=dtype, adapter=place.adapter)

    def load_unpacked(*, round_activations: bool) -> Runner:
        assert record.apply_packed is not None
        runner = load()
        record.apply_packed(folder, runner.model, round_activations=round_activations)
        return runner

    def check_weights(_: Runner) -> WeightsCheck:
        assert record.check_weights is not None
        return record.check_weights(
            folder,
            place.folder,
            adapter=place.adapter,
            precision=precision,
            a=against,
            b=folder.name,
        )

    stage = Stage(
        folder.name,
        lambda: record.load(folder),
        against,
        check_weights=check_weights if record.check_weights else None,
    )
    if precision in _HALF:
        return [replace(stage, build_rounded=lambda: load(precision))]
    if precision in _PACKED:
        unpacked = f"{folder.name}{UNPACKED}"
        return [
            Stage(unpacked, lambda: load_unpacked(round_activations=False), against, rounds=True),
            replace(
                stage,
                against=unpacked,
                build_rounded=lambda: load_unpacked(round_activations=True),
            ),
        ]
    return [stage]


def list_layers(runner: Runner) -> list[torch.nn.Module]:
    """List the decoder layers of a stage in torch; nothing for an export."""
    if not isinstance(runner, TorchRunner):
        return []
    return [layer for name, layer in runner.model.named_modules() if _LAYER.fullmatch(name)]


@contextmanager
def add_rounding_noise(runner: Runner, *, seed: int) -> Iterator[None]:
    """Let a stage in torch round at random: Monte Carlo arithmetic, Parker 1997.

    Every number that a linear layer, a norm, an activation or the table of positions gives is
    multiplied by a random factor that differs from 1 by at most 2^-22: four times what float32
    rounds, because a sum of many products is less exact than one rounding.
    """
    model = _get_model(runner)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def round_at_random(_: torch.nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(round_at_random(_, __, tensor) for tensor in output)
        draws = torch.rand(output.shape, generator=generator, device=output.device)
        return output * (1 + _NOISE * (2 * draws - 1))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(round_at_random) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _get_model(runner: Runner) -> torch.nn.Module:
    assert isinstance(runner, TorchRunner)
    return runner.model


def _build_masked(run: RunFolder, base: Path, plan: PruningPlan) -> Runner:
    """The unpruned base with refit and adapter, its removed groups masked as in Eq. 13."""
    weights, model = load_run_weights(run, plan), load_model(base, dtype="fp32")
    drop_layers(model, plan.dropped)
    apply_refit(model, weights.refit, plan)
    wrapped = _attach(model, expand_lora(weights.lora, plan))
    masks = {}
    for spec in plan.kept_specs:
        masks[spec.name] = torch.zeros(spec.num_groups, dtype=torch.bool)
        masks[spec.name][plan.kept[spec.name]] = True
    apply_masks(wrapped.get_base_model(), plan.kept_specs, masks)
    close_gaps(model)
    return TorchRunner(wrapped)


def _build_cut(run: RunFolder, base: Path, plan: PruningPlan) -> Runner:
    """The base cut in memory, as training cuts it, with the adapter unmerged."""
    weights = load_run_weights(run, plan)
    model = _load_cut(base, plan, weights)
    wrapped = _attach(model, weights.lora)
    close_gaps(model)
    return TorchRunner(wrapped)


def _build_merged(
    run: RunFolder,
    base: Path,
    plan: PruningPlan,
    stored: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> Runner:
    """The base cut in memory, with W + scaling BA in the place of each W.

    It computes in float32 in any case. ``stored`` says what each weight is rounded to; a checkpoint
    need not store what its config says, nor all weights alike.
    """
    weights = load_run_weights(run, plan)
    model = _load_cut(base, plan, weights)
    with torch.no_grad():
        for name, lora in weights.lora.items():
            weight = model.get_submodule(name).weight
            weight += lora.scaling * lora.lora_b.float() @ lora.lora_a.float()
        close_gaps(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(stored.get(name, torch.float32)).float()
    return TorchRunner(model)


def _load_cut(base: Path, plan: PruningPlan, weights: RunWeights) -> Any:
    """Load the base as training has it, where the layers that stay keep their names."""
    model = load_model(base, dtype="fp32")
    drop_layers(model, plan.dropped)
    kept = {name: torch.tensor(kept) for name, kept in plan.kept.items()}
    apply_cut(model, plan.kept_specs, kept)
    apply_refit(model, weights.refit, plan)
    return model


def _attach(model: Any, weights: Mapping[str, LoraWeights]) -> Any:
    first = next(iter(weights.values()))
    rank = first.lora_a.shape[0]
    wrapped = attach_lora(model, rank=rank, alpha=first.scaling * rank, dropout=0.0, seed=0)
    apply_lora_weights(model, weights)
    return wrapped.eval()

"""What a run changed of the weights that stay: LoRA, and what was refitted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lpdeploy.artifacts import check_unchanged
from lpdeploy.errors import ArtifactError, quote_error
from lpdeploy.families.groups import expand_index
from lpdeploy.manifest import load_output_hash
from lpdeploy.models.adapters import LoraWeights, check_adapter, get_base_linear, load_adapter
from lpdeploy.models.finite import check_finite
from lpdeploy.plan import PruningPlan
from lpdeploy.run_folder import RunFolder


@dataclass(frozen=True)
class RunWeights:
    """What a run changed of the weights that stay.

    Attributes:
        lora: Module name -> its LoRA weights, as wide as what stays.
        refit: Module name -> the weight that stands in the place of the base's columns that stay,
            shape (out, kept); see ``lpdeploy.pruning.refit``. Empty if nothing was refitted.
    """

    lora: Mapping[str, LoraWeights]
    refit: Mapping[str, Tensor] = field(default_factory=dict)


def load_run_weights(run: RunFolder, plan: PruningPlan) -> RunWeights:
    """Read what training left of a run, checked against its hashes and its plan.

    Raises:
        ArtifactError: A file is missing, has changed, or does not fit the plan.
    """
    expected = load_output_hash(run.path, "prune", run.adapter.name)
    check_unchanged(run.adapter, expected, fix="Prune again, or restore the folder.")
    lora = load_adapter(run.adapter)
    check_adapter(lora, plan)
    if run.refit.exists() and not plan.refit_sha256:
        raise ArtifactError(
            f"'{run.refit}' is there, and the plan knows of no refit. Restore the plan, or prune "
            "again."
        )
    return RunWeights(lora, _load_refit(run, plan) if plan.refit_sha256 else {})


def _load_refit(run: RunFolder, plan: PruningPlan) -> dict[str, Tensor]:
    path, fix = run.refit, "Restore it, or prune again."
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing, and the plan needs it. {fix}")
    check_unchanged(path, plan.refit_sha256, fix=fix)
    try:
        refit = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {quote_error(error)}. {fix}") from error
    columns = {module: len(index) for module, index in _list_columns(plan)}
    for module, weight in refit.items():
        check_finite(weight, name=f"{module}.weight")
        if weight.ndim != 2 or weight.shape[1] != columns.get(module):
            raise ArtifactError(
                f"'{path}' holds {module:.200} in shape {list(weight.shape)}, and the plan leaves "
                f"{columns.get(module, 0)} columns of it. {fix}"
            )
    return refit


def _list_columns(plan: PruningPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield each module whose columns are cut, with those of the base that stay."""
    for spec in plan.kept_specs:
        for piece in spec.slices:
            if piece.dim == 1:
                yield piece.module, expand_index(torch.tensor(plan.kept[spec.name]), piece.block)


def apply_refit(model: nn.Module, refit: Mapping[str, Tensor], plan: PruningPlan) -> None:
    """Put refitted weights into a model that was cut by a plan, or that is to be masked by it."""
    columns = dict(_list_columns(plan))
    with torch.no_grad():
        for module, new in refit.items():
            copy_columns(get_base_linear(model.get_submodule(module)).weight, new, columns[module])


def copy_columns(weight: Tensor, new: Tensor, columns: Tensor) -> None:
    """Copy ``new`` over a weight that was cut to ``columns``, or over these columns of a whole one.

    Args:
        weight: Shape (out, kept) or (out, all); changed in place.
        new: Shape (out, kept).
        columns: Shape (kept,).
    """
    new = new.to(weight.device, weight.dtype)
    if weight.shape == new.shape:
        weight.copy_(new)
    else:
        weight.index_copy_(1, columns.to(weight.device), new)

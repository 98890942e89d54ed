"""What a run ends with: the plan, the adapter and the importance of the groups."""

import contextlib
import hashlib
from dataclasses import replace
from typing import Any

from safetensors.torch import save_file
from transformers import PretrainedConfig

from lpdeploy.artifacts import atomic_file, compute_sha256, save_json
from lpdeploy.config import PruneConfig
from lpdeploy.families.groups import list_group_specs
from lpdeploy.folders import atomic_folder
from lpdeploy.manifest import Stage
from lpdeploy.models.card import build_adapter_card
from lpdeploy.models.shapes import compute_achieved
from lpdeploy.plan import PruningPlan
from lpdeploy.pruning.state import PruningState
from lpdeploy.records import format_json
from lpdeploy.run_folder import ADAPTER, RunFolder


def build_plan(
    state: PruningState, options: PruneConfig, config: PretrainedConfig, *, base: str, stage: Stage
) -> PruningPlan:
    """Return which groups stay.

    Args:
        state: The groups that are still there.
        options: How they were chosen.
        config: Config of the unpruned model.
        base: Absolute folder or hub name of the unpruned model.
        stage: Has the hash of the unpruned model among its inputs.
    """
    specs = list_group_specs(config, heads=options.widths.heads)
    kept = state.list_kept(specs)
    return PruningPlan(
        base_model=base,
        base_sha256=stage.inputs["base"],
        ratio=_compute_ratio(state, options),
        specs=specs,
        kept=kept,
        achieved=compute_achieved(config, specs, kept),
    )


def _compute_ratio(state: PruningState, options: PruneConfig) -> float:
    """Return the share of the groups that were to go, those of dropped layers included."""
    ratio = options.widths.compute_ratio(state.specs)
    dropped = (options.drop_layers or 0) / (len(state.kept) / 2)  # two specs a layer
    return ratio if not dropped else 1 - (1 - ratio) * (1 - dropped)


def save_results(
    run: RunFolder, model: Any, state: PruningState, *, plan: PruningPlan, stage: Stage
) -> PruningPlan:
    """Save the adapter, the refitted weights and the importance of the groups; record their hashes.

    Args:
        run: Where to.
        model: The ``PeftModel``.
        state: The groups that are still there.
        plan: Which they are.
        stage: Takes the hashes.

    Returns:
        The plan, with the hash of the refitted weights.
    """
    plan = replace(plan, refit_sha256=_save_refit(run, state))
    state.cut_masked()
    with atomic_folder(run.adapter, kind=ADAPTER, overwrite=True) as temporary:
        # Asking the hub whether the vocabulary grew (peft's "auto") would need a network.
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        card = build_adapter_card(plan.base_model)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    with run.recorded(run.importance, run.log), atomic_file(run.importance) as path:
        save_file(state.last_seen, path)
    stage.outputs = {
        run.adapter.name: compute_sha256(run.adapter),
        run.plan.name: hashlib.sha256(format_json(plan.to_json()).encode()).hexdigest(),
        **({run.chat.name: compute_sha256(run.chat)} if run.chat.is_file() else {}),
    }
    return plan


def _save_refit(run: RunFolder, state: PruningState) -> str | None:
    if not state.refitted:
        return None
    with run.recorded(run.refit), atomic_file(run.refit) as path:
        save_file(state.list_refit(), path)
    return compute_sha256(run.refit)


def complete_run(run: RunFolder, plan: PruningPlan) -> None:
    """Save the plan, the last of all files: a run with a plan is complete."""
    with run.recorded(run.plan):
        save_json(run.plan, plan.to_json())
    run.checkpoint.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a run without checkpoints has no such folder
        run.checkpoint.parent.rmdir()

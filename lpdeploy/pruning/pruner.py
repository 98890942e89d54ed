"""Pruning inside a training loop of one's own: watch, score, remove, save."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import LINEARS
from lpdeploy.manifest import record_stage
from lpdeploy.models.adapters import get_lora_weights
from lpdeploy.models.find import resolve_model
from lpdeploy.models.loading import compute_model_sha256, load_config
from lpdeploy.models.shapes import list_prunable
from lpdeploy.plan import GroupSpec, get_output
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import list_stored
from lpdeploy.pruning.results import build_plan, complete_run, save_results
from lpdeploy.pruning.schedule import build_schedule
from lpdeploy.pruning.state import apply_event, build_state
from lpdeploy.pruning.walk import Calibration, hold_out
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)


class LoRAPruner:
    """Algorithm 1 without its loop: it scores and removes groups while something else trains.

    .. code-block:: python

        pruner = LoRAPruner(peft_model, config, total_steps=500)
        for batch in batches:
            with pruner.observe():
                peft_model(**batch).loss.backward()
            pruner.step(optimizer)
        pruner.save("run")

    Of ``config``, what to remove, how to score and when to remove count. The learning rate, the
    batches and the precision are those of the loop.

    Args:
        model: A ``PeftModel`` with LoRA on all seven projections of every layer.
        config: What to remove and how to choose it.
        total_steps: Optimizer steps of the whole training. The last removal lands on the ratio.
        base: Folder or hub name of the unpruned model; None for what the model was loaded from.
        refit_batches: Where ``config`` asks for a refit, inputs of the model to solve over at each
            event, on its device: ``input_ids``, and ``attention_mask`` where rows are padded on
            the right. Give 20 tokens for each column that stays, or more.

    Attributes:
        step_count: Optimizer steps done.

    Raises:
        ValueError: ``model`` is not such a model, ``total_steps`` is below 1, or only one of
            ``config`` and ``refit_batches`` asks for a refit.

    Source:
        LoRAPrune, arXiv:2305.18403, Algorithm 1.
    """

    def __init__(
        self,
        model: Any,
        config: PruneConfig | None = None,
        *,
        total_steps: int,
        base: str | os.PathLike[str] | None = None,
        refit_batches: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; it must be at least 1")
        self.model = model
        self.config = config or PruneConfig()
        if self.config.runs_rows_at_events != bool(refit_batches):
            raise ValueError(
                "`refit` or `criterion='obs'` runs batches of its own; give refit_batches"
                if not refit_batches
                else "refit_batches are for `refit=True` or `criterion='obs'`; give one of these"
            )
        if self.config.drop_layers or self.config.depth:
            raise ValueError(
                "`drop_layers` and `depth` drop layers before LoRA is attached, and this model has "
                "LoRA; use lpdeploy.prune, or leave them out"
            )
        if self.config.max_loss_increase is not None:
            raise ValueError(
                "`max_loss_increase` needs rows that are held out, which only lpdeploy.prune has; "
                "leave it out"
            )
        self.step_count = 0
        self._causal = get_causal_model(model)
        self._base = os.fspath(base) if base is not None else str(self._causal.name_or_path)
        specs = list_prunable(self._causal.config, self.config.widths)
        _tell_start(self._causal, specs, self.config)
        self._refit_batches = refit_batches
        stored = None
        if self.config.refit:
            folder = resolve_model(self._base)
            stored = list_stored(folder, load_config(folder), specs)
        self.state = build_state(self._causal, specs, self.config, stored=stored)
        self.schedule = build_schedule(self.config, specs, steps=total_steps)
        self._events_left = self.schedule.list_events()

    @property
    def ratio(self) -> float:
        """Share of groups that is removed so far."""
        return self.schedule.compute_ratio(self.step_count)

    @property
    def is_complete(self) -> bool:
        """Whether all groups that were to go are gone."""
        return not self._events_left

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Watch the forward and backward passes of one step, in as many parts as it has."""
        if self.is_complete:
            yield
            return
        handle = self._causal.register_forward_pre_hook(self._note_mask, with_kwargs=True)
        try:
            with self.state.scorer.observe():
                yield
        finally:
            handle.remove()

    def _note_mask(self, _: Any, __: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        # Gradients are zero at padding, but the features that some criteria measure are not.
        self.state.scorer.attention_mask = inputs.get("attention_mask")

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Score batches before the first step, without training on them.

        Where the schedule removes all groups at once, it does so now.

        Args:
            batches: Inputs of the model, with ``labels``. Each one is scored by itself, and the
                scores are averaged.
        """
        for count, batch in enumerate(batches, start=1):
            with self.observe():
                self.model(**batch).loss.backward()
            self.state.update_average(decay=1 - 1 / count)
            self.model.zero_grad()
        self._remove_if_due(0, None)

    def score(self) -> None:
        """Fold the step that was observed into the importance of the groups (Eq. 11).

        Call it after the last backward pass of a step, before gradients are clipped and before the
        optimizer moves the weights: Eq. 9 takes both from before the update.
        """
        if not self.is_complete:
            self.state.update_average(decay=self.config.ema_decay)

    def prune(self, optimizer: torch.optim.Optimizer) -> bool:
        """Count a step, and remove groups if an event is due after it.

        Args:
            optimizer: Holds the parameters that are cut, and their moments.

        Returns:
            Whether groups were removed.
        """
        self.step_count += 1
        return self._remove_if_due(self.step_count, optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Score, let the optimizer step, forget the gradients, and remove groups if it is time.

        Returns:
            Whether groups were removed.
        """
        self.score()
        optimizer.step()
        optimizer.zero_grad()
        return self.prune(optimizer)

    def _remove_if_due(self, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if step not in self._events_left:
            return False
        progress = self.schedule.compute_progress(step)
        calibrate = self._calibrate_refit if self.config.runs_rows_at_events else None
        apply_event(
            self.state, self.config, progress=progress, optimizer=optimizer, calibrate=calibrate
        )
        self._events_left.remove(step)
        return True

    def _calibrate_refit(self, _: int) -> Calibration:
        batches = [
            {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
            for batch in self._refit_batches
        ]
        return Calibration(batches, hold_out(len(batches)), nullcontext, Ranks())

    def save(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> RunFolder:
        """Write a run folder, as ``lpdeploy.prune`` does; ``compact`` goes on from it.

        Args:
            output: The folder.
            overwrite: Replace a run that is there.

        Raises:
            LpdeployError: Not all removals have happened, the unpruned model is not found, or
                the folder cannot be used.
        """
        if not self.is_complete:
            raise LpdeployError(
                f"Groups are still to be removed after {self.step_count} of {self.schedule.steps} "
                "steps. Train to the end, and calibrate first if the schedule prunes at once."
            )
        run, folder = RunFolder(output), resolve_model(self._base)
        local = Path(self._base).is_dir()
        record = {"model": self._base, "data": None, **self.config.to_json()}
        with run.hold():
            run.check_free(base=folder, resume=False, overwrite=overwrite)
            run.claim(clear=True)
            with record_stage(run.path, "prune", record) as stage:
                stage.inputs = {"base": compute_model_sha256(folder)}
                base = str(folder.resolve()) if local else self._base
                plan = build_plan(
                    self.state, self.config, load_config(folder), base=base, stage=stage
                )
                plan = save_results(run, self.model, self.state, plan=plan, stage=stage)
            complete_run(run, plan)
        return run


def _tell_start(causal: Any, specs: Sequence[GroupSpec], config: PruneConfig) -> None:
    """Warn where LoRA's gradients cannot tell groups apart at first; see docs/how-it-works.md."""
    outputs = [causal.get_submodule(get_output(spec).module) for spec in specs]
    wanted = {CRITERIA[config.criterion].lora_init, config.effective_lora_init} == {"groups"}
    if wanted and not all(get_lora_weights(linear).lora_b.any() for linear in outputs):
        logger.warning(
            "LoRA starts with B = 0 in o_proj and down_proj, so that its gradients cannot tell "
            "their groups apart at first. Call lpdeploy.init_lora_by_groups(model) before, or set "
            "`lora_init='peft'`."
        )


def get_causal_model(model: Any) -> Any:
    """Return the causal LM inside a ``PeftModel``, checked to have LoRA on all its projections.

    Raises:
        ValueError: It has not, or its LoRA is of a kind that cannot be merged exactly.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        raise ValueError("model has no LoRA adapter 'default'; wrap it by peft.get_peft_model")
    if config.use_dora or config.use_rslora:
        raise ValueError("the adapter uses DoRA or rank-stabilised scaling; use plain LoRA")
    causal = model.get_base_model()
    bare = [
        name
        for name, module in causal.named_modules()
        if name.rpartition(".")[2] in LINEARS and not hasattr(module, "lora_A")
    ]
    if bare:
        raise ValueError(
            f"{len(bare)} projections have no LoRA, first {bare[0]}; set target_modules to "
            f"{list(LINEARS)}"
        )
    return causal

"""Pruning inside transformers' ``Trainer``, and trainers that are made from it, such as TRL's."""

import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lpdeploy.errors import LpdeployError
from lpdeploy.pruning.pruner import LoRAPruner


class PruneCallback(TrainerCallback):
    """Prunes a model while a ``Trainer`` trains it.

    .. code-block:: python

        pruner = LoRAPruner(trainer.model, config, total_steps=trainer.args.max_steps)
        trainer.add_callback(PruneCallback(pruner, output="run"))
        trainer.train()

    Groups are scored by the gradients before they are clipped, so the callback takes over the
    clipping to the trainer's ``max_grad_norm``. Removing groups replaces parameters: train in one
    process (a wrapper such as DDP would hold on to the old ones), and do not resume from a
    checkpoint of the trainer.

    Args:
        pruner: What prunes.
        output: Where to save the run when the training ends; None to save it yourself.
        overwrite: Replace a run that is there.
    """

    def __init__(
        self,
        pruner: LoRAPruner,
        *,
        output: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.pruner = pruner
        self._output, self._overwrite = output, overwrite
        self._watching: Any = None
        self._max_norm = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - transformers' signature
        **kwargs: Any,
    ) -> None:
        """Take over clipping, and score what the schedule wants scored before the first step.

        Raises:
            LpdeployError: The training is of other length, was begun before, or has several ranks.
        """
        if state.max_steps != self.pruner.schedule.steps:
            raise LpdeployError(
                f"The trainer takes {state.max_steps} steps, and the pruner was made for "
                f"{self.pruner.schedule.steps}. Give it total_steps={state.max_steps}."
            )
        if state.global_step or args.world_size > 1:
            raise LpdeployError(
                "Groups are cut out of the model in one process and from the first step on. Do "
                "not resume the trainer, and use lpdeploy.prune for several GPUs."
            )
        self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        rows = self.pruner.config.num_calibration_rows
        if rows:
            size = args.per_device_train_batch_size
            batches = itertools.islice(kwargs["train_dataloader"], -(-rows // size))
            self.pruner.calibrate(_move(batch, args.device) for batch in batches)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Watch the passes of the step that begins."""
        self._watching = self.pruner.observe()
        self._watching.__enter__()

    def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
        """Score, then clip."""
        self._watching.__exit__(None, None, None)
        self.pruner.score()
        if self._max_norm > 0:
            torch.nn.utils.clip_grad_norm_(given["model"].parameters(), self._max_norm)

    def on_step_end(self, *_: Any, **given: Any) -> None:
        """Remove groups if it is time."""
        self.pruner.prune(given["optimizer"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - transformers' signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Give clipping back, and save the run."""
        args.max_grad_norm = self._max_norm
        if self._output is not None and state.global_step == state.max_steps:
            self.pruner.save(self._output, overwrite=self._overwrite)


def _move(batch: Mapping[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}

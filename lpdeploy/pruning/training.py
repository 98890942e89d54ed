"""Algorithm 1: fine-tune with LoRA, score at each step, remove at each event."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import IGNORED, TokenDataset, list_batch, split_batch
from lpdeploy.errors import LpdeployError, NonFiniteError, RankLostError
from lpdeploy.machine import measure_peak_bytes
from lpdeploy.plan import GroupSpec
from lpdeploy.pruning.compilation import apply_compile
from lpdeploy.pruning.guard import EventLoss, LossIncreaseError, watch_event
from lpdeploy.pruning.log import StepInfo
from lpdeploy.pruning.loss import Taught, compute_loss
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import count_refit_rows
from lpdeploy.pruning.schedule import Schedule, build_schedule, compute_learning_rate
from lpdeploy.pruning.state import PruningState, apply_event
from lpdeploy.pruning.teacher import Teacher
from lpdeploy.pruning.walk import (
    Calibration,
    collect_calibration,
    list_calibration_rows,
    make_autocast,
)
from lpdeploy.ramps import RAMPS


@dataclass
class Training:
    """A model in training and everything a step needs.

    Attributes:
        model: The PeftModel.
        optimizer: AdamW over LoRA's parameters.
        device: Where it runs.
        dtype: Precision of the base; LoRA's parameters are float32 in any case.
        dataset: Tokens.
        state: Live groups and their importance.
        options: What the user asked for.
        steps: Optimizer steps of the whole run.
        ranks: The processes that share each batch.
        teacher: What the unpruned model expects in the rows; None without distillation.
        refused: Why the last event is not to stand, with the state before it; None if it is.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    dataset: TokenDataset
    state: PruningState
    options: PruneConfig
    steps: int
    ranks: Ranks = field(default_factory=Ranks)
    teacher: Teacher | None = None
    refused: LossIncreaseError | None = None

    @property
    def schedule(self) -> Schedule:
        """The pruning schedule of this run."""
        return build_schedule(self.options, self.state.specs, steps=self.steps)

    @property
    def hold_steps(self) -> int:
        """Steps before the learning rate falls."""
        return count_hold_steps(self.options, self.state.specs, steps=self.steps)

    def autocast(self) -> torch.autocast:
        """Make the context in which the model computes, in half precision if its base is."""
        return make_autocast(self.device, self.dtype)

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """LoRA's parameters, as the optimizer holds them now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def count_hold_steps(options: PruneConfig, specs: Sequence[GroupSpec], *, steps: int) -> int:
    """Return the steps before the learning rate falls, of a run of so many."""
    if options.lr_hold is not None:
        return round(options.lr_hold * steps)
    schedule = build_schedule(options, specs, steps=steps)
    return schedule.last_event if RAMPS[options.ramp].hold else 0


def count_steps(options: PruneConfig, num_rows: int) -> int:
    """Return the optimizer steps of a run: ``steps``, or ``epochs`` over the rows."""
    if options.schedule == "one-shot":
        return 0
    if options.steps is not None:
        return options.steps
    return options.epochs * math.ceil(num_rows / options.batch_size)


def run_steps(training: Training, *, start: int | None = None) -> Iterator[StepInfo]:
    """Run Algorithm 1 from the calibration, or from 1-based step ``start + 1``, to the end.

    Args:
        training: What to run.
        start: The last step that was done already (0: the calibration); None for a new run.

    Yields:
        One ``StepInfo`` after each step; model, optimizer and state may be saved there, unless
        ``training.refused`` says that an event cost more than ``max_loss_increase``. Nothing is to
        follow then.

    Raises:
        NonFiniteError: Loss or gradient is NaN or infinite. The weights are still those after
            the previous step.
        RankLostError: Another rank is gone; the same is true.
    """
    training.model.train()
    calibrate = start is None and training.options.num_calibration_rows
    first = 0 if calibrate else (start or 0) + 1
    settled = max(first, training.schedule.last_event + 1)
    for step in range(first, training.steps + 1):
        if training.options.compile and step == settled:
            apply_compile(training.state.model)
        with training.ranks.watch():
            info = _run_step(training, step) if step else _calibrate(training)
        yield info


def _calibrate(training: Training) -> StepInfo:
    """Score rows without training on them; where the schedule prunes at once, prune."""
    options, schedule = training.options, training.schedule
    _seed(training, 0)
    start = time.perf_counter()
    rows = list_calibration_rows(
        training.dataset, step=0, num_rows=options.num_calibration_rows, seed=options.seed
    )
    losses: list[float] = []
    scoring: list[_Seconds] = []
    tokens = 0
    backward = not training.state.scorer.criterion.forward_only
    for start_row in range(0, len(rows), options.batch_size):
        with training.state.scorer.observe():
            loss, count = _accumulate_gradients(
                training, rows[start_row : start_row + options.batch_size], backward=backward
            )
        losses.append(_check_finite(0, loss=loss, norm=_compute_norm(training)))
        # The plain mean over the batches, whatever the moving average forgets later.
        decay = 1 - 1 / len(losses)
        scoring.append(_time(training, partial(training.state.update_average, decay=decay)))
        training.optimizer.zero_grad()
        tokens += count
    removed = 0 in schedule.list_events()
    cutting, event = _remove(training, 0) if removed else (None, None)
    seconds = _finish(training, start)
    return StepInfo(
        step=0,
        steps=training.steps,
        loss=sum(losses) / len(losses),
        ratio=schedule.compute_ratio(0),
        lr=0.0,
        tokens_per_s=tokens / seconds,
        seconds=seconds,
        scoring_seconds=sum(part() for part in scoring),
        cutting_seconds=cutting() if cutting else 0.0,
        peak_bytes=measure_peak_bytes(),
        removed=removed and training.refused is None,
        padding=_compute_padding(training, rows, tokens),
        loss_before=event.before if event else None,
        loss_after=event.after if event else None,
    )


def _run_step(training: Training, step: int) -> StepInfo:
    options, schedule = training.options, training.schedule
    events = schedule.list_events()
    _seed(training, step)
    start = time.perf_counter()
    lr = compute_learning_rate(
        step,
        steps=training.steps,
        peak=options.peak_lr,
        warmup_steps=round(options.lr_warmup * training.steps),
        hold_steps=training.hold_steps,
    )
    rows = list_batch(
        len(training.dataset), step=step - 1, batch_size=options.batch_size, seed=options.seed
    )
    scored = step <= schedule.last_event
    with training.state.scorer.observe() if scored else nullcontext():
        loss, tokens = _accumulate_gradients(training, rows, teacher=training.teacher)
    norm = _compute_norm(training)
    mean_loss = _check_finite(step, loss=loss, norm=norm)
    score = partial(training.state.update_average, decay=options.ema_decay)
    scoring = _time(training, score) if scored else None
    _apply_step(training, lr=lr, norm=norm)
    removed = step in events
    cutting, event = _remove(training, step) if removed else (None, None)
    seconds = _finish(training, start)
    return StepInfo(
        step=step,
        steps=training.steps,
        loss=mean_loss,
        ratio=schedule.compute_ratio(step),
        lr=lr,
        tokens_per_s=tokens / seconds,
        seconds=seconds,
        scoring_seconds=scoring() if scoring else 0.0,
        cutting_seconds=cutting() if cutting else 0.0,
        peak_bytes=measure_peak_bytes(),
        removed=removed and training.refused is None,
        padding=_compute_padding(training, rows, tokens),
        loss_before=event.before if event else None,
        loss_after=event.after if event else None,
    )


def _compute_padding(training: Training, rows: list[int], tokens: int) -> float:
    return 1 - int(training.dataset.lengths[rows].sum()) / tokens


def _seed(training: Training, step: int) -> None:
    # Seeding by the step makes dropout the same in a run that was resumed as in one that was not;
    # by the rank, that ranks do not drop the same of different rows.
    torch.manual_seed(training.options.seed * 1_000_003 + step + (training.ranks.rank << 40))


def _accumulate_gradients(
    training: Training, rows: list[int], *, teacher: Teacher | None = None, backward: bool = True
) -> tuple[Tensor, int]:
    """Run forward and backward over a batch; return its mean loss a token, and its tokens.

    Before the first step, the model is its own teacher, so calibration does without. The host does
    not wait for the device: the loss is a number that is still to come.
    """
    size, dataset = training.options.micro_batch_size, training.dataset
    split = split_batch(rows, dataset.lengths, micro_batch_size=size)
    micros = [{**dataset.collate(micro), "rows": torch.tensor(micro)} for micro in split]
    # Dividing by the targets of the whole batch makes the gradient independent of how it is
    # split into micro-batches of unequal lengths.
    targets = sum(int((micro["labels"][:, 1:] != IGNORED).sum()) for micro in micros)
    total = torch.zeros((), device=training.device)
    for micro in training.ranks.deal(micros):
        # Layers that are computed again ask for a gradient, whether it is taken or not.
        with torch.set_grad_enabled(backward or training.options.gradient_checkpointing):
            loss = _compute_loss(training, micro, targets=targets, teacher=teacher)
        if backward:
            loss.backward()
        total += loss.detach()
    training.ranks.sum([total, *(p.grad for p in training.trainable if p.grad is not None)])
    return total, sum(micro["input_ids"].numel() for micro in micros)


def _compute_loss(
    training: Training,
    micro: Mapping[str, Tensor],
    *,
    targets: int,
    teacher: Teacher | None,
) -> Tensor:
    # Padding stands on the right, where causal attention never looks from a real token, so no
    # attention mask is needed and the fast causal kernel is used.
    training.state.scorer.attention_mask = micro["attention_mask"]
    ids, labels = (_move(micro[name], training.device) for name in ("input_ids", "labels"))
    taught = None if teacher is None else teacher.teach(micro)
    if taught is not None:
        log_probs, tokens = (_move(t, training.device) for t in (taught.log_probs, taught.ids))
        taught = replace(taught, log_probs=log_probs, ids=tokens)
    return run_forward(training, ids, labels, targets=targets, taught=taught)


def run_forward(
    training: Training,
    ids: Tensor,
    labels: Tensor,
    *,
    targets: int,
    taught: Taught | None = None,
) -> Tensor:
    """Compute the loss of rows of tokens, ready for ``backward``.

    Args:
        training: The model as it is now.
        ids: Shape (B, T), on its device.
        labels: Likewise; -100 is left out.
        targets: What the sum over the tokens is divided by.
        taught: What the unpruned model expects behind each token; None without distillation.
    """
    model = training.state.model
    with training.autocast():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return compute_loss(hidden, model.lm_head.weight, labels, targets=targets, taught=taught)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory a copy needs no wait; the allocator keeps the memory until it is made.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _compute_norm(training: Training) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in training.trainable if p.grad is not None])


def _check_finite(step: int, *, loss: Tensor, norm: Tensor) -> float:
    """Return the loss; refuse a NaN before it reaches the average or the weights.

    This is where the host waits for the device, once a step: nothing may be changed before.
    """
    values = torch.stack([loss, norm.to(loss.device, loss.dtype)]).tolist()
    for name, value in zip(("loss", "gradient norm"), values, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"The {name} became {value} at step {step}.")
    return values[0]


def _apply_step(training: Training, *, lr: float, norm: Tensor) -> None:
    # Scores were taken from the gradients as they are; only the update is clipped.
    limit = training.options.max_grad_norm
    torch.nn.utils.clip_grads_with_norm_(training.trainable, limit, norm)
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    training.optimizer.step()
    training.optimizer.zero_grad()


def _remove(training: Training, step: int) -> tuple["_Seconds", EventLoss]:
    """Remove groups; return how long it took, and what it cost."""
    rows = training.options.runs_rows_at_events
    remove = partial(
        apply_event,
        training.state,
        training.options,
        progress=training.schedule.compute_progress(step),
        optimizer=training.optimizer,
        calibrate=partial(load_event_rows, training, step) if rows else None,
    )
    seconds: list[_Seconds] = []
    try:
        with training.ranks.watch():
            loss = watch_event(training, step, lambda: seconds.append(_time(training, remove)))
    except RankLostError as error:  # behind the update of this step, or half way through the model
        raise LpdeployError(
            f"{error} Groups were being removed: go on from the last checkpoint with `resume=True`."
        ) from error
    except LossIncreaseError as error:
        training.refused, loss = error, error.loss
    return seconds[0], loss


def load_event_rows(training: Training, step: int, columns: int) -> Calibration:
    """Choose the rows that an event scores outputs and refits over; each event has other ones."""
    options, dataset = training.options, training.dataset
    rows = list_calibration_rows(
        dataset,
        step=step,
        num_rows=count_refit_rows(options, dataset.lengths, columns=columns),
        seed=options.seed,
    )
    return collect_calibration(
        dataset,
        rows,
        micro_batch_size=options.micro_batch_size,
        autocast=training.autocast,
        ranks=training.ranks,
    )


_Seconds = Callable[[], float]
"""Tells how long something took, once the device has come to its end."""


def _time(training: Training, work: Callable[[], None]) -> _Seconds:
    """Run something; on a GPU it is only begun, and its time is told by events."""
    if training.device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return lambda: begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return lambda: seconds


def _finish(training: Training, start: float) -> float:
    """Wait for what was begun since ``start``, and return the seconds since."""
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)
    return time.perf_counter() - start

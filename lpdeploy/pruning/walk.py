"""Running a decoder layer by layer, where only the hidden states between two layers are kept."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lpdeploy.data.batches import IGNORED, TokenDataset, list_batch, split_batch
from lpdeploy.models.cutting import DroppedLayer
from lpdeploy.pruning.loss import compute_loss
from lpdeploy.pruning.ranks import Ranks

logger = logging.getLogger(__name__)

_HELD_OUT = 8  # every eighth batch
_HELD_OUT_ROWS = 64
_QUIET_SECONDS = 60.0


@dataclass(frozen=True)
class Calibration:
    """The rows that a pruned model is fitted to or judged by.

    Attributes:
        batches: ``input_ids``, ``labels`` and ``attention_mask`` of each batch of this rank, shape
            (B, T), on the device of the model.
        held_out: Of each batch, whether nothing is fitted to it.
        autocast: Makes the context in which the model computes.
        ranks: The processes that have the other batches.
    """

    batches: Sequence[Mapping[str, Tensor]]
    held_out: Sequence[bool]
    autocast: Callable[[], AbstractContextManager[Any]]
    ranks: Ranks


def collect_calibration(
    dataset: TokenDataset,
    rows: list[int],
    *,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    ranks: Ranks,
) -> Calibration:
    """Load rows of a data set, and deal them to the ranks.

    Args:
        dataset: Tokens.
        rows: Which of them.
        micro_batch_size: Rows of a batch.
        autocast: Makes the context in which the model computes.
        ranks: The processes that share the rows.
    """
    split = split_batch(rows, dataset.lengths, micro_batch_size=micro_batch_size)
    own = ranks.deal([dataset.collate(micro) for micro in split])
    held_out = hold_out(len(split)) + [False] * (-len(split) % ranks.size)  # as dealt
    return Calibration(
        batches=[{name: t.to(ranks.device) for name, t in micro.items()} for micro in own],
        held_out=held_out[ranks.rank :: ranks.size],
        autocast=autocast,
        ranks=ranks,
    )


def list_held_out(dataset: TokenDataset, *, seed: int) -> list[int]:
    """List the last rows of the first pass over the data: nothing is fitted to them before.

    They are 64 rows, or a quarter of all where that is less.

    Args:
        dataset: Tokens.
        seed: Of the run.
    """
    size = max(1, min(_HELD_OUT_ROWS, len(dataset) // 4))
    return list_batch(len(dataset), step=0, batch_size=len(dataset), seed=seed)[-size:]


def list_calibration_rows(
    dataset: TokenDataset, *, step: int, num_rows: int, seed: int
) -> list[int]:
    """List rows to score or to fit to, none of which is held out.

    Args:
        dataset: Tokens.
        step: Other steps take other rows.
        num_rows: How many there are at most.
        seed: Of the run.
    """
    rows = list_batch(len(dataset), step=step, batch_size=num_rows, seed=seed)
    held_out = set(list_held_out(dataset, seed=seed))
    # With very few rows, some of them serve for both.
    return [row for row in rows if row not in held_out] or rows


def hold_out(num_batches: int) -> list[bool]:
    """Say of each batch whether it is held out: every eighth, or the last of fewer."""
    every = min(_HELD_OUT, num_batches)
    return [every > 1 and place % every == every - 1 for place in range(num_batches)]


class Pace:
    """Logs once a minute how far a long piece of work is, so that short work stays silent.

    Args:
        doing: What is done, such as "Refitting".
        ranks: The processes that do it together; the first of them speaks.
    """

    def __init__(self, doing: str, ranks: Ranks) -> None:
        self._doing, self._speaks, self._said = doing, ranks.is_first, time.monotonic()

    def say(self, done: str) -> None:
        """Log what is done by now, if a minute has passed."""
        now = time.monotonic()
        if self._speaks and now - self._said >= _QUIET_SECONDS:
            self._said = now
            logger.info("%s: %s", self._doing, done)


def walk_layers(model: Any, pace: Pace) -> Iterator[tuple[int, Any]]:
    """Yield the index and the module of each layer that is there.

    Args:
        model: The causal LM (not the peft wrapper around it).
        pace: Is told of each layer.
    """
    layers = model.model.layers
    for index, layer in enumerate(layers):
        if isinstance(layer, DroppedLayer):
            continue
        pace.say(f"layer {index + 1} of {len(layers)}")
        yield index, layer


def enter_layers(model: Any, input_ids: Tensor) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Embed tokens, and find out what a model calls its layers with.

    Args:
        model: The causal LM (not the peft wrapper around it).
        input_ids: Shape (B, T).

    Returns:
        What the first layer is given, shape (B, T, hidden), and for each layer the keywords that
        it is called with.
    """
    layers = model.model.layers
    calls: list[tuple[Tensor, Mapping[str, Any]]] = []
    with _bypass(layers, calls):
        model.model(input_ids=input_ids, use_cache=False)
    return calls[0][0], [keywords for _, keywords in calls]


@contextmanager
def _bypass(
    layers: Sequence[nn.Module], calls: list[tuple[Tensor, Mapping[str, Any]]]
) -> Iterator[None]:
    """Let layers return what they are given, and note with what they are called."""

    def pass_on(hidden: Tensor, **keywords: Any) -> Tensor:
        calls.append((hidden, keywords))
        return hidden

    for layer in layers:
        layer.forward = pass_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def make_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Make the context in which a model computes: in half precision if its base is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def measure_loss(model: Any, calibration: Calibration) -> float:
    """Return the mean loss of a model over all rows, in nats a token.

    Args:
        model: The causal LM (not the peft wrapper around it).
        calibration: The rows.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=calibration.ranks.device)
    with evaluating(model):
        for batch in calibration.batches:
            with calibration.autocast():
                hidden = model.model(input_ids=batch["input_ids"], use_cache=False)
                sums += sum_losses(model, hidden.last_hidden_state, batch["labels"])
    calibration.ranks.sum([sums])
    loss, tokens = sums.tolist()
    return loss / tokens


def sum_losses(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses of a batch, in nats, and the number of its targets, shape (2,).

    Args:
        model: The causal LM.
        hidden: What goes into its head, shape (B, T, hidden).
        labels: Shape (B, T); -100 is left out. Token t predicts label t + 1.
    """
    loss = compute_loss(hidden, model.lm_head.weight, labels, targets=1)
    return torch.stack([loss, (labels[:, 1:] != IGNORED).sum()])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

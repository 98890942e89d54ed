"""What travels between ranks in a step, counted from shapes: bytes a rank puts into messages."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.families.groups import count_group_parameters, list_group_specs
from lpdeploy.plan import GroupSpec

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Travel:
    """Sizes of the messages of one step of an unpruned model, in bytes; each shrinks with it.

    Attributes:
        gradients: LoRA's gradients and the loss, summed over the ranks in one message.
        scores: What the criterion sums besides, in steps that score.
        weights: Weights of the layers that are gathered on every rank, with ``shard``.
    """

    gradients: int
    scores: int
    weights: int

    def count_sent(self, ranks: int) -> float:
        """Return the bytes a rank sends: a ring sum sends all but its part twice, a gather once.

        Args:
            ranks: How many there are.
        """
        others = (ranks - 1) / ranks
        return others * (2 * (self.gradients + self.scores) + self.weights)


def compute_travel(
    config: PretrainedConfig, options: PruneConfig, *, ranks: int, itemsize: int
) -> Travel:
    """Count what travels in one step.

    Args:
        config: Of the unpruned base.
        options: Of the run.
        ranks: How many share a batch.
        itemsize: Bytes of one weight of the base.
    """
    specs, hidden = list_group_specs(config), config.hidden_size
    # Rows of q, k, v, gate and up with the hidden size beside them, columns of o and down.
    cut = sum(spec.num_groups * piece.block for spec in specs for piece in spec.slices)
    linears = sum(len(spec.slices) for spec in specs)
    projections = sum(spec.num_groups * count_group_parameters(spec, config) for spec in specs)
    weights = 0
    if options.shard:
        norms = 2 * hidden * config.num_hidden_layers
        passes = 2 * options.batch_size // (options.micro_batch_size * ranks)  # there and back
        weights = passes * (projections + norms) * itemsize
    return Travel(
        gradients=_FLOAT_BYTES * (options.lora_rank * (cut + linears * hidden) + 1),
        scores=_FLOAT_BYTES
        * _count_scores(list_group_specs(config, heads=options.widths.heads), hidden, options),
        weights=weights,
    )


def _count_scores(specs: Sequence[GroupSpec], hidden: int, options: PruneConfig) -> int:
    """Count the numbers that are summed over the ranks for the scores of one step."""
    criterion = CRITERIA[options.criterion]
    pieces = [(spec.num_groups, piece) for spec in specs for piece in spec.slices]
    if criterion.score_weights is None:
        return sum(spec.num_groups for spec in specs)
    numbers = 0
    if criterion.weight_gradients:
        numbers += sum(groups * piece.block * hidden for groups, piece in pieces)
    if criterion.measure_inputs is not None:
        numbers += sum(groups * piece.block if piece.dim else hidden for groups, piece in pieces)
    if options.shard:  # each Linear's sums over a rank's rows
        numbers += sum(groups for groups, _ in pieces)
    return numbers

"""Gram matrices of the inputs of weights, summed up over tokens."""

import torch
from torch import Tensor

_COLUMNS = 256


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add X'X of some tokens in place, in float32 also where autocast would take half precision.

    The result is symmetric, so only the blocks on and below the diagonal are computed. With 1,536
    columns this takes two thirds of the time of the whole product on a CPU core.

    Args:
        gram: Shape (columns, columns), float32.
        inputs: X, shape (tokens, columns), float32.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        for start in range(0, len(gram), _COLUMNS):
            stop = min(start + _COLUMNS, len(gram))
            block = inputs[:, start:stop].T @ inputs[:, :stop]
            gram[start:stop, :stop] += block
            gram[:start, start:stop] += block[:, :start].T

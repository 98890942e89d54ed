"""The Pareto front: what nothing else beats in both of two figures."""

import math
from collections.abc import Sequence


def find_front(points: Sequence[tuple[float, float] | None]) -> tuple[int, ...]:
    """Find the points that no other beats; lower is better in both figures.

    Args:
        points: Two figures each; None, or a figure that is not finite, is on no front.

    Returns:
        Indices of the points on the front, by their first figure, then by their place.
    """
    known = {
        index: point
        for index, point in enumerate(points)
        if point is not None and all(map(math.isfinite, point))
    }
    front = [
        index
        for index, point in known.items()
        if not any(_beats(other, point) for other in known.values())
    ]
    return tuple(sorted(front, key=lambda index: (known[index][0], index)))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other

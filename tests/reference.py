"""The paper's criterion, selection and schedule as plain loops, to test the fast code against.

Written from LoRAPrune, arXiv:2305.18403, alone: no tensor operation beyond reading one number,
no code shared with lpdeploy.
"""

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def weight_importance(
    weight: Matrix, a: Matrix, b: Matrix, grad_a: Matrix, grad_b: Matrix, scaling: float
) -> list[list[float]]:
    """Eq. 10 for every weight of one layer: W (out, in), A (rank, in), B (out, rank)."""
    rank = len(a)
    scores = []
    for i in range(len(weight)):
        row = []
        for j in range(len(weight[0])):
            gradient = 0.0
            update = 0.0
            for r in range(rank):
                gradient += grad_b[i][r] * a[r][j]
                gradient += b[i][r] * grad_a[r][j]
                gradient -= grad_b[i][r] * grad_a[r][j]
                update += b[i][r] * a[r][j]
            row.append((gradient * (weight[i][j] + scaling * update)) ** 2)
        scores.append(row)
    return scores


def group_importance(scores: Matrix, dim: int, block: int) -> list[float]:
    """Eq. 4: the sum over the rows (dim 0) or columns (dim 1) that a group owns."""
    size = len(scores) if dim == 0 else len(scores[0])
    groups = [0.0] * (size // block)
    for i in range(len(scores)):
        for j in range(len(scores[0])):
            groups[(i if dim == 0 else j) // block] += scores[i][j]
    return groups


def moving_average(history: Sequence[Sequence[float]], decay: float) -> list[float]:
    """Eq. 11 over the scores of all steps, starting from zero (Algorithm 1)."""
    average = [0.0] * len(history[0])
    for scores in history:
        average = [
            decay * old + (1 - decay) * new for old, new in zip(average, scores, strict=True)
        ]
    return average


def select(importance: Sequence[float], keep: int) -> list[int]:
    """Eq. 12: drop the least important one by one until ``keep`` remain; ties drop the later."""
    alive = list(range(len(importance)))
    while len(alive) > keep:
        worst = alive[0]
        for index in alive:
            if importance[index] <= importance[worst]:
                worst = index
        alive.remove(worst)
    return alive


def kept_count(total: int, ratio: float, multiple: int) -> int:
    """The multiple nearest to the share that stays; the larger of two; at least one."""
    if ratio == 0:
        return total
    best = multiple
    for candidate in range(multiple, total + multiple, multiple):
        wanted = (1 - ratio) * total
        if abs(candidate - wanted) <= abs(best - wanted) + 1e-6:
            best = candidate
    return min(best, total)


def schedule(
    ratio: float, steps: int, every: int, warmup: float, cooldown: float
) -> dict[int, float]:
    """The cubic schedule as a table: 1-based step of each event -> share gone after it."""
    first, last = warmup * steps, steps - cooldown * steps
    events = [s for s in range(1, steps + 1) if s % every == 0 and first <= s <= last]
    table = {}
    for number, step in enumerate(events, start=1):
        left = 1 - number / len(events)
        table[step] = ratio - ratio * left * left * left
    return table

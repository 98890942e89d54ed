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


def merged_weight(weight: Matrix, a: Matrix, b: Matrix, scaling: float) -> list[list[float]]:
    """W + scaling B A."""
    merged = [list(row) for row in weight]
    for i in range(len(b)):
        for j in range(len(a[0])):
            for r in range(len(a)):
                merged[i][j] += scaling * b[i][r] * a[r][j]
    return merged


def gradient_importance(weight: Matrix, gradient: Matrix) -> list[list[float]]:
    """Eq. 3 before its square: the change of the loss, to first order, without each weight."""
    return [
        [gradient[i][j] * weight[i][j] for j in range(len(weight[0]))] for i in range(len(weight))
    ]


def feature_norms(samples: Sequence[Matrix]) -> list[float]:
    """L2 norm of each feature over all tokens of all samples: (B, T, in) -> (in,)."""
    energies = [0.0] * len(samples[0][0])
    for sample in samples:
        for token in sample:
            for j, value in enumerate(token):
                energies[j] += value * value
    return [energy**0.5 for energy in energies]


def wanda_importance(weight: Matrix, norms: Sequence[float]) -> list[list[float]]:
    """Wanda's |W| times the norm of the feature it multiplies."""
    return [[abs(row[j]) * norms[j] for j in range(len(row))] for row in weight]


def raise_scores(scores: Matrix, *, absolute: bool) -> list[list[float]]:
    """The square (Eqs. 3 and 10) or the absolute value of each number."""
    return [[abs(x) if absolute else x * x for x in row] for row in scores]


def gate_importance(
    hidden: Sequence[Matrix], gradient: Sequence[Matrix], block: int, *, absolute: bool
) -> list[float]:
    """Sum over samples of the squared (absolute) sum of h * dL/dh of a group: (B, T, F) -> (G,)."""
    groups = [0.0] * (len(hidden[0][0]) // block)
    for sample, slopes in zip(hidden, gradient, strict=True):
        gates = [0.0] * len(groups)
        for t in range(len(sample)):
            for j in range(len(sample[t])):
                gates[j // block] += sample[t][j] * slopes[t][j]
        for g, gate in enumerate(gates):
            groups[g] += abs(gate) if absolute else gate * gate
    return groups


def normalized(scores: Sequence[float]) -> list[float]:
    """Scores of one Linear over their L2 norm."""
    norm = sum(score * score for score in scores) ** 0.5
    return [score / norm for score in scores]

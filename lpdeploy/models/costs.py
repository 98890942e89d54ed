"""What a pass has to do at least: operations of a prefill and a training step, bytes of a token."""

from transformers import PretrainedConfig

from lpdeploy.criteria import Criterion
from lpdeploy.families.groups import get_head_dim
from lpdeploy.models.shapes import list_projections, list_widths


def compute_prefill_flops(
    config: PretrainedConfig, *, tokens: int, batch: int, rank: int = 0
) -> float:
    """Count the multiplications and additions of a prefill that needs its last logits only.

    Norms, rotation and softmax are left out: they are no matrix products.

    Args:
        config: A model's config, uniform or of per-layer widths.
        tokens: T, of each row.
        batch: Rows.
        rank: Of LoRA beside every projection; 0 where it is merged.

    Returns:
        Floating-point operations, two a product and sum.
    """
    head_dim = get_head_dim(config)
    total = 2.0 * batch * config.hidden_size * config.vocab_size  # the head, once a row
    for width in list_widths(config):
        sizes = list_projections(config, width)
        weights = sum(rows * columns + rank * (rows + columns) for rows, columns in sizes)
        # A token sees half of the others on average: scores and weighted values, 2 T / 2 each.
        total += 2.0 * batch * tokens * (weights + width.heads * head_dim * tokens)
    return total


def compute_training_flops(
    config: PretrainedConfig,
    *,
    tokens: int,
    batch: int,
    rank: int,
    weight_gradients: bool = False,
    checkpointing: bool = False,
) -> float:
    """Count the multiplications and additions of one training step over a frozen base with LoRA.

    Matrix products only, forward and backward: of the base, gradients of the inputs, which the
    first layer's q, k and v do not need; of LoRA, those of A and B too; of attention, the scores
    once more in its backward pass, which does not keep them. Checkpointing asks for the gradient
    of the embeddings' output too, and its second pass ends before the layer's last product.

    Args:
        config: A model's config, uniform or of per-layer widths.
        tokens: T, of each row.
        batch: Rows of the step.
        rank: Of LoRA beside every projection.
        weight_gradients: Also count the gradients of the projections themselves (Eq. 3).
        checkpointing: Also count the layers' second forward pass.

    Returns:
        Floating-point operations, two a product and sum.
    """
    total = 4.0 * config.hidden_size * config.vocab_size  # the head: output, gradient of its input
    passes = 2 if checkpointing else 1
    for layer, width in enumerate(list_widths(config)):
        for place, (columns, rows) in enumerate(list_projections(config, width)):
            to_input = 0 if layer == 0 and place < 3 and not checkpointing else 1
            base, lora = rows * columns, rank * (rows + columns)
            total += 2.0 * base * (passes + to_input + weight_gradients)
            # A and B forward, the gradients of both, of A's output, and of A's input.
            total += 2.0 * (lora * (passes + 1) + rank * (rows + columns * to_input))
            total -= 2.0 * rank * rows * (checkpointing and place == 6)
        # A token sees half of the others: two products forward, five backward, 2 T / 2 each.
        attended = width.heads * get_head_dim(config) * tokens
        total += attended * (2 * passes + 5)
    return total * batch * tokens


def compute_scoring_flops(config: PretrainedConfig, *, rank: int, criterion: Criterion) -> float:
    """Count the operations of scoring every weight once, whatever the batch.

    Args:
        config: A model's config, uniform or of per-layer widths.
        rank: Of LoRA: ``W + scaling B A`` takes so many multiply-adds a weight.
        criterion: How it is scored; one that scores no weights costs nothing here.

    Returns:
        Floating-point operations, two a multiply-add.
    """
    if criterion.score_weights is None:
        return 0.0
    weights = sum(
        rows * columns
        for width in list_widths(config)
        for columns, rows in list_projections(config, width)
    )
    # scaled sum, product with the gradient, square, sum over the group
    return weights * (2.0 * rank * (1 + criterion.rank_products) + 4)


def compute_decode_bytes(
    config: PretrainedConfig, *, context: int, batch: int, weight_bytes: int, cache_itemsize: int
) -> float:
    """Count what is read to decode one token of every row: all weights once, and the cache.

    Args:
        config: A model's config, uniform or of per-layer widths.
        context: Tokens in the cache.
        batch: Rows.
        weight_bytes: Of the weights that are read whole; of the embedding only some rows are.
        cache_itemsize: Bytes of one number in the cache.
    """
    heads = sum(width.kv_heads for width in list_widths(config))
    cache = 2 * heads * get_head_dim(config) * context * batch * cache_itemsize
    return float(weight_bytes + cache)

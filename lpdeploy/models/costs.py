"""What a forward pass has to do at least: operations of a prefill, bytes of a decoded token."""

from typing import Any

from lpdeploy.models.groups import get_head_dim
from lpdeploy.models.shapes import list_widths


def compute_prefill_flops(config: Any, *, tokens: int, batch: int, rank: int = 0) -> float:
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
    hidden, head_dim = config.hidden_size, get_head_dim(config)
    total = 2.0 * batch * hidden * config.vocab_size  # the head, once a row
    for width in list_widths(config):
        query, key = width.heads * head_dim, width.kv_heads * head_dim
        # (in, out) of q, k, v, o, gate, up, down
        sizes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        sizes += [(hidden, width.channels)] * 2 + [(width.channels, hidden)]
        weights = sum(rows * columns + rank * (rows + columns) for rows, columns in sizes)
        # A token sees half of the others on average: scores and weighted values, 2 T / 2 each.
        total += 2.0 * batch * tokens * (weights + query * tokens)
    return total


def compute_decode_bytes(
    config: Any, *, context: int, batch: int, weight_bytes: int, cache_itemsize: int
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

"""Options of ``prune`` that contradict each other, and what to do about it."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from lpdeploy.criteria import CRITERIA

RATIOS = ("ratio", "head_ratio", "channel_ratio")
BUDGETS = ("target_params", "target_memory", "target_latency")
"""Fields that each decide what is left, in place of the ratios."""
LATENCY = ("engine", "latency_phase", "latency_tokens")
"""Fields that say what ``target_latency`` measures."""


def list_conflicts(config: Any) -> Iterator[str]:
    """Yield a sentence for each pair of fields that contradict each other."""
    rules = (
        _list_shape_conflicts,
        _list_head_conflicts,
        _list_depth_conflicts,
        _list_training_conflicts,
        _list_base_conflicts,
    )
    return chain.from_iterable(rule(config) for rule in rules)


def _list_shape_conflicts(config: Any) -> Iterator[str]:
    given = [name for name in (*RATIOS, *BUDGETS) if getattr(config, name) is not None]
    if config.budget and len(given) > 1:
        names = " and ".join(f"`{name}`" for name in given)
        yield f"{names} each decide what is left; give one of them."
    if config.target_latency is None:
        for name in LATENCY:
            if getattr(config, name) is not None:
                yield f"`{name}` belongs to `target_latency`; give that too, or leave `{name}` out."
    elif config.engine is None:
        yield (
            "`target_latency` needs an engine to be measured on; give `engine`, for example "
            "`engine='ort'`."
        )
    elif config.scope == "global":
        yield (
            "`target_latency` measures shapes whose layers are alike, and `scope='global'` makes "
            "them differ; use `scope='layer'` or a `ratio`."
        )


def _list_head_conflicts(config: Any) -> Iterator[str]:
    if config.heads not in ("query-heads", "auto"):
        return
    asked = f"`heads={config.heads!r}`"
    alike = "needs layers that keep as many query heads each, and"
    for name in ("protect_first", "protect_last"):
        if getattr(config, name):
            yield f"{asked} {alike} `{name}` leaves some layers whole; change one of them."
    if config.scope == "global":
        yield f"{asked} {alike} `scope='global'` makes layers differ; change one of them."
    for name in ("head_ratio", "channel_ratio"):
        if config.heads == "auto" and getattr(config, name) is not None:
            yield f"`heads='auto'` chooses what `{name}` says; give one of them."
    if config.heads == "auto" and config.shard:
        yield (
            "`heads='auto'` tries both kinds in one process, and `shard` is for models that do not "
            "fit; give `heads='kv-groups'` or `heads='query-heads'`."
        )


def _list_depth_conflicts(config: Any) -> Iterator[str]:
    if config.depth is None:
        return
    given = [name for name in ("head_ratio", "channel_ratio") if getattr(config, name) is not None]
    for name in (*given, *(["drop_layers"] if config.drop_layers else [])):
        yield f"`depth='auto'` chooses what `{name}` says; give one of them."
    if config.shard:
        yield (
            "`depth='auto'` tries several depths in one process, and `shard` is for models "
            "that do not fit; give `drop_layers` instead."
        )


def _list_training_conflicts(config: Any) -> Iterator[str]:
    if config.batch_size % config.micro_batch_size:
        yield (
            f"`batch_size` {config.batch_size} is no multiple of `micro_batch_size` "
            f"{config.micro_batch_size}; set `micro_batch_size` to a divisor of it."
        )
    if isinstance(config.lr, str) and config.schedule == "one-shot":
        yield (
            f"`lr={config.lr!r}` tries learning rates, and `schedule='one-shot'` trains nothing; "
            "change one of them."
        )
    if config.distill and config.schedule == "one-shot":
        yield (
            "`distill` changes the loss of the fine-tuning, and `schedule='one-shot'` has none; "
            "change one of them."
        )
    for name in ("distill_temperature", "distill_top_k", "distill_live"):
        if getattr(config, name) not in (None, False) and config.distill is None:
            yield f"`{name}` belongs to `distill`; give that too, or leave `{name}` out."
    if config.distill and config.shard:
        yield (
            "`distill` runs the whole unpruned model on one device, and `shard` is for models that "
            "do not fit; change one of them."
        )
    warmup, cooldown = config.pauses
    if warmup + cooldown >= 1:
        yield (
            f"`prune_warmup` {warmup:g} and `prune_cooldown` {cooldown:g} leave no steps for "
            "pruning; their sum must be below 1."
        )
    if config.schedule != "joint" and config.calibration_samples == 0:
        yield (
            f"`schedule='{config.schedule}'` prunes by the scores of `calibration_samples` rows, "
            "which cannot be 0; leave it out for 128."
        )


def _list_base_conflicts(config: Any) -> Iterator[str]:
    weight_gradients = CRITERIA[config.criterion].weight_gradients
    if weight_gradients and config.load_in:
        yield (
            f"`criterion='{config.criterion}'` needs gradients of the frozen weights, which "
            f"`load_in='{config.load_in}'` does not have; use "
            f"`criterion='lora'`, or leave `load_in` out."
        )
    if config.load_in == "4bit" and config.removal == "cut":
        yield (
            "`removal='cut'` cannot go with `load_in='4bit'`, whose weights share scales across "
            "rows; use `removal='mask'` or `load_in='8bit'`."
        )
    outputs = CRITERIA[config.criterion].score_outputs is not None
    if outputs and config.scope == "global":
        yield (
            f"`criterion='{config.criterion}'` compares the groups of one layer, and "
            "`scope='global'` those of all layers; use `scope='layer'` or `criterion='gate'`."
        )
    if outputs and config.shard:
        yield (
            f"`criterion='{config.criterion}'` needs whole weights, and `shard` divides them; "
            "change one of them."
        )
    if config.refit and config.shard:
        yield "`refit` needs whole weights, and `shard` divides them; change one of them."
    if config.refit_samples is not None and not (config.refit or outputs):
        yield "`refit_samples` belongs to `refit`; give that too, or leave `refit_samples` out."
    for refused, why in (
        (config.removal == "cut" and "removal='cut'", "divided weights cannot be cut"),
        (config.load_in and f"load_in='{config.load_in}'", "quantized weights are not divided"),
        (
            weight_gradients and f"criterion='{config.criterion}'",
            "the gradients would take as much memory as the weights",
        ),
    ):
        if config.shard and refused:
            yield f"`shard` cannot go with `{refused}`: {why}; change one of them."

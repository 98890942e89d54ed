"""Named sets of options of ``prune``, which give way to what the user says."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "best": {
            "criterion": "obs",
            "refit": True,
            "distill": 0.5,
            "depth": "auto",
            "lr": "auto",
            "lora_rank": 32,
            "lora_alpha": 64.0,
        },
        "loraprune": {
            "heads": "kv-groups",
            "criterion": "lora",
            "score_form": "squared",
            "normalize": False,
            "refit": False,
            "ema_decay": 0.9,
            "schedule": "joint",
            "ramp": "paper",
            "prune_every": 10,
            "calibration_samples": 0,
            "scope": "layer",
            "epochs": 2,
            "batch_size": 128,
            "lr": 1e-4,
            "lora_rank": 8,
            "lora_init": "peft",
        },
    }
)
"""Name -> options. ``best`` is what measured best on our models; see docs/results.md, "Recovery".
Where ``obs`` cannot be used, it has ``gate``, which came next. Alpha is twice the rank, as by
default, also where the user chose the rank.
``loraprune`` is the paper's method to the letter: Algorithm 1, equations 4, 10 and 11 with the
lambda of section 4.1, and the batch size, the learning rate, the epochs and the rank given there;
groups go in equal portions every ten steps."""

# What an option of a preset cannot go with, since the two decide the same or exclude each other.
_GIVES_WAY = {
    "depth": ("drop_layers", "head_ratio", "channel_ratio", "shard"),
    "refit": ("shard",),
    "distill": ("shard",),
}


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def list_preset(
    name: str, given: Mapping[str, Any], *, chosen: Collection[str]
) -> Mapping[str, Any]:
    """Return the options of a preset that hold beside what the user chose.

    Args:
        name: Of the preset.
        given: All options and their values.
        chosen: Names of those that the user chose, and that the preset leaves as they are.
    """
    options = {
        option: value
        for option, value in PRESETS[name].items()
        if option not in chosen
        and not any(_is_given(given.get(other)) for other in _GIVES_WAY.get(option, ()))
    }
    if options.get("criterion") == "obs" and (given.get("shard") or given.get("scope") == "global"):
        options["criterion"] = "gate"
    if "lora_alpha" in options and "lora_rank" in chosen:
        options["lora_alpha"] = 2.0 * given["lora_rank"]
    schedule = given.get("schedule", "joint")
    if schedule == "one-shot":
        for trained in (
            "distill",
            "lr",
            "lora_rank",
            "lora_alpha",
        ):  # there is no training to change
            options.pop(trained, None)
    if schedule != "joint" and "schedule" in chosen:
        options.pop("calibration_samples", None)  # which such a run cannot do without
    return options

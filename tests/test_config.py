"""Every option of PruneConfig: what is refused, from Python and from the command line alike."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.config import GROUPS, PruneConfig
from lpdeploy.fields import RENAMED, get_kind, get_option, is_optional, rename_fields

FIELDS = dataclasses.fields(PruneConfig)
# What else a field needs, so that its own value is the only thing that can be wrong.
BESIDE = {
    "distill_temperature": {"distill": 0.5},
    "distill_top_k": {"distill": 0.5},
    "distill_live": {"distill": 0.5},
    "refit_samples": {"refit": True},
    "engine": {"target_latency": 5.0},
    "latency_phase": {"target_latency": 5.0, "engine": "ort"},
    "latency_tokens": {"target_latency": 5.0, "engine": "ort"},
    "target_latency": {"engine": "ort"},
}


def list_wrong(own):
    """List values that a field must refuse: types, ranges, choices, numbers that are none."""
    rules, kind = get_option(own), get_kind(own)
    wrong = [[], {}, object(), *([] if is_optional(own) else [None])]
    if kind is bool:
        return [*wrong, 1, 0, "true", 1.0]
    if kind is str:
        unknown = ["", "nothing", next(iter(rules.choices)).upper()] if rules.choices else []
        return [*wrong, 1, True, *unknown]
    wrong += ["1", True, math.nan, math.inf, -math.inf, 1 + 2j]
    wrong += [1.5, 2.0] if kind is int else []
    wrong += [] if rules.low is None else [rules.low - 1]
    wrong += [rules.high + 1, 10**30] if kind is int else []  # each number has a largest
    wrong += [] if rules.above is None else [rules.above, rules.above - 1]
    wrong += [] if rules.below is None else [rules.below, rules.below + 1]
    return wrong


def list_right(own):
    rules, kind = get_option(own), get_kind(own)
    if rules.choices or kind is str:
        return [*rules.choices, *([] if rules.choices else ["ort"])]
    if kind is bool:
        return [True, False]
    lows = [rules.low] if rules.low is not None else [rules.above + 1e-9]
    return [kind(low) for low in lows] + ([] if rules.below is None else [rules.below - 1e-9])


def test_every_field_refuses_what_is_wrong_and_names_itself():
    for own in FIELDS:
        for value in list_wrong(own):
            with pytest.raises(ValueError, match=f"`{own.name}` is .*; it must be "):
                PruneConfig(**{**BESIDE.get(own.name, {}), own.name: value})


def test_every_field_takes_what_is_right():
    for own in FIELDS:
        beside = {**BESIDE.get(own.name, {})}
        beside |= {"batch_size": 1, "micro_batch_size": 1}
        beside |= {"prune_warmup": 0.0, "prune_cooldown": 0.0}
        for value in list_right(own):
            config = PruneConfig(**{**beside, own.name: value})
            assert getattr(config, own.name) == value
            assert type(getattr(config, own.name)) is get_kind(own)
        if is_optional(own) and own.name not in ("engine",):
            PruneConfig(**{own.name: None})


def test_every_field_refuses_the_same_on_the_command_line(tmp_path):
    given = ["prune", "MODEL", "--data", "text.txt", "--output", str(tmp_path / "run")]
    for own in FIELDS:
        if get_kind(own) is bool:
            continue
        flag = f"--{own.name.replace('_', '-')}"
        values = {**BESIDE.get(own.name, {})}
        if "target_latency" in values:
            values["target_latency"] = "5ms"
        beside = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in values.items()
        ]
        numbers = [v for v in list_wrong(own) if isinstance(v, int | float) and v is not True]
        for value in ("nothing", *(numbers if get_kind(own) in (int, float) else ())):
            if own.name == "target_params" and value in (1.5, 2.0):
                continue  # fractions of units are rounded down
            result = CliRunner().invoke(main, [*given, *beside, f"{flag}={value}"])
            assert result.exit_code == 2, (own.name, value, result.output)
            assert flag in result.stderr, (own.name, value, result.stderr)
    assert not (tmp_path / "run").exists()


def test_every_field_explains_itself_in_a_whole_phrase():
    for own in FIELDS:
        rules = get_option(own)
        assert rules.group in GROUPS
        assert rules.help[0].isupper(), own.name
        assert rules.help.endswith(".") or rules.help.endswith(")."), own.name


def test_numbers_become_plain_ones():
    config = PruneConfig(ratio=np.float32(0.25), steps=np.int64(7), lora_alpha=8, seed=np.int32(1))
    values = [config.ratio, config.steps, config.lora_alpha, config.seed]
    assert values == [0.25, 7, 8.0, 1]
    assert [type(value) for value in values] == [float, int, float, int]
    json.dumps(config.to_json())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"batch_size": 10, "micro_batch_size": 4},
            "`batch_size` 10 is no multiple of `micro_batch_size` 4",
        ),
        ({"prune_warmup": 0.6, "prune_cooldown": 0.4}, "`prune_warmup` .* `prune_cooldown`"),
        ({"ramp": "early", "prune_warmup": 0.3}, "`prune_warmup` 0.3 and `prune_cooldown` 0.7"),
        ({"schedule": "separate", "calibration_samples": 0}, "separate.*`calibration_samples`"),
        ({"schedule": "one-shot", "calibration_samples": 0}, "one-shot.*`calibration_samples`"),
        ({"criterion": "gradient", "load_in": "8bit"}, "`criterion='gradient'` .*8bit"),
        ({"criterion": "gradient", "load_in": "4bit"}, "`criterion='gradient'` .*4bit"),
        ({"load_in": "4bit", "removal": "cut"}, "`removal='cut'` .* use `removal='mask'`"),
        ({"shard": True, "removal": "cut"}, "`shard` cannot go with `removal='cut'`"),
        ({"shard": True, "load_in": "8bit"}, "`shard` cannot go with `load_in='8bit'`"),
        ({"shard": True, "criterion": "gradient"}, "`shard` cannot .* `criterion='gradient'`"),
        ({"ratio": 0.5, "target_params": 9}, "`ratio` and `target_params` each decide"),
        ({"head_ratio": 0.5, "target_memory": 9}, "`head_ratio` and `target_memory` each"),
        ({"target_params": 9, "target_memory": 9}, "`target_params` and `target_memory` each"),
        ({"target_latency": 9.0}, "`target_latency` needs an engine"),
        ({"engine": "ort"}, "`engine` belongs to `target_latency`"),
        ({"latency_phase": "decode", "target_params": 9}, "`latency_phase` belongs"),
        ({"latency_tokens": 9}, "`latency_tokens` belongs"),
        ({"target_latency": 9.0, "engine": "ort", "scope": "global"}, "`scope='layer'`"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(**values)


@pytest.mark.parametrize(
    ("values", "removal"),
    [
        ({}, "cut"),
        ({"load_in": "8bit"}, "cut"),
        ({"load_in": "4bit"}, "mask"),
        ({"shard": True}, "mask"),
        ({"removal": "mask"}, "mask"),
    ],
    ids=str,
)
def test_removal_is_what_the_base_allows(values, removal):
    config = PruneConfig(**values)
    assert config.effective_removal == removal
    assert config.to_json()["removal"] == removal
    assert PruneConfig(**config.to_json()).effective_removal == removal


@pytest.mark.parametrize(
    ("values", "init"),
    [
        ({}, "groups"),
        ({"criterion": "gate"}, "peft"),
        ({"criterion": "gate", "lora_init": "groups"}, "groups"),
        ({"lora_init": "peft"}, "peft"),
    ],
    ids=str,
)
def test_lora_starts_as_the_criterion_needs_it(values, init):
    config = PruneConfig(**values)
    assert config.effective_lora_init == init
    assert config.to_json()["lora_init"] == init  # so that the record of a run says it


def test_a_ratio_of_half_unless_a_budget_decides():
    assert PruneConfig().ratio == 0.5
    assert PruneConfig(head_ratio=0.25).ratios == {"heads": 0.25, "channels": 0.5}
    config = PruneConfig(target_params=9)
    assert (config.ratio, config.budget) == (None, "target_params")
    with pytest.raises(ValueError, match="`target_params` is still open"):
        config.ratios  # noqa: B018
    assert config.with_ratios(head_ratio=0.25).ratios == {"heads": 0.25, "channels": 0.5}


def test_former_names_are_read():
    old = {"warmup": 0.2, "cooldown": None, "seed": 3}
    assert rename_fields(old) == {"prune_warmup": 0.2, "prune_cooldown": None, "seed": 3}
    with pytest.raises(ValueError, match="`warmup` is the former name of `prune_warmup`"):
        rename_fields({"warmup": 0.2, "prune_warmup": 0.2})
    names = {own.name for own in FIELDS}
    assert set(RENAMED.values()) <= names
    assert not RENAMED.keys() & names


def test_a_ramp_gives_the_pauses_that_are_not_given():
    assert PruneConfig(ramp="authors").pauses == (0.1, 0.1)
    assert PruneConfig(ramp="paper", prune_cooldown=0.2).pauses == (0.0, 0.2)


@pytest.mark.parametrize(
    ("schedule", "ramp", "given", "rows"),
    [
        ("joint", "authors", None, 0),
        ("joint", "paper", None, 0),
        ("joint", "early", None, 128),
        ("joint", "early", 0, 0),
        ("joint", "authors", 32, 32),
        ("separate", "authors", None, 128),
        ("one-shot", "early", None, 128),
        ("one-shot", "early", 5, 5),
    ],
)
def test_rows_of_the_calibration(schedule, ramp, given, rows):
    config = PruneConfig(schedule=schedule, ramp=ramp, calibration_samples=given)
    assert config.num_calibration_rows == rows


def test_the_config_needs_the_standard_library_alone():
    code = "import sys, lpdeploy.config; print({n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = eval(done.stdout)
    assert not loaded & {"torch", "transformers", "numpy", "click", "yaml"}

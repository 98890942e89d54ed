"""Presets: what they set, and that they give way."""

import json

import pytest
import yaml
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.presets import PRESETS
from tests.helpers import make_tiny_model

SMALL = [
    "--steps=2", "--batch-size=2", "--micro-batch-size=2", "--seq-len=24", "--round-to=4",
    "--device=cpu", "--calibration-samples=4", "--prune-every=1",
]  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_each_holds_where_nothing_else_is_said(name):
    config = PruneConfig.from_preset(name)
    for option, value in PRESETS[name].items():
        assert getattr(config, option) == value


def test_the_paper_to_the_letter():
    config = PruneConfig.from_preset("loraprune")
    # Section 4.1: batch 128, learning rate 1e-4, two epochs, rank 8, lambda 0.9.
    assert (config.batch_size, config.lr, config.epochs, config.lora_rank) == (128, 1e-4, 2, 8)
    assert config.effective_lora_init == "peft"  # and no start of ours
    assert config.ema_decay == 0.9
    assert config.num_calibration_rows == 0
    assert config.pauses == (0.0, 0.0)
    assert not config.refit
    assert config.distill is config.depth is None


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ()),
        ({"schedule": "one-shot"}, ("distill", "lr", "lora_rank", "lora_alpha")),
        ({"drop_layers": 0}, ("depth",)),
        ({"channel_ratio": 0.0}, ("depth",)),
        ({"target_latency": 3.0, "engine": "ort"}, ()),
    ],
    ids=str,
)
def test_it_gives_way_to_what_it_cannot_go_with(options, left_out):
    config = PruneConfig.from_preset("best", **options)
    for option, value in PRESETS["best"].items():
        default = getattr(PruneConfig(), option)
        assert getattr(config, option) == (default if option in left_out else value)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [({"scope": "global"}, ()), ({"shard": True}, ("depth", "refit", "distill"))],
    ids=str,
)
def test_where_obs_cannot_be_used_it_has_what_came_next(options, left_out):
    config = PruneConfig.from_preset("best", **options)
    assert config.criterion == "gate"
    for option in ("refit", "distill", "depth", "lr"):
        default = getattr(PruneConfig(), option)
        assert getattr(config, option) == (
            default if option in left_out else PRESETS["best"][option]
        )


def test_what_is_said_overrides_it():
    config = PruneConfig.from_preset("best", criterion="wanda", refit=False)
    assert (config.criterion, config.refit, config.distill) == ("wanda", False, 0.5)
    config = PruneConfig.from_preset("best", lora_rank=4)
    assert (config.lora_rank, config.lora_alpha) == (4, 8.0)
    assert PruneConfig.from_preset("best", lora_rank=4, lora_alpha=1.0).lora_alpha == 1.0
    with pytest.raises(ValueError, match="no preset 'worst'; choose from best, loraprune"):
        PruneConfig.from_preset("worst")


def prune(base, data, output, *words):
    words = ["prune", str(base), "--data", str(data), "--output", str(output), *SMALL, *words]
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, result.stderr
    return yaml.safe_load((output / "recipe.yaml").read_text())["prune"]


def test_on_the_command_line(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"prune": {"criterion": "magnitude", "max_grad_norm": 2.0}}))
    words = ["--preset=best", "--recipe", str(recipe), "--no-refit", "--ratio=0.3"]
    options = prune(base, data, tmp_path / "run", *words)
    assert options["criterion"] == "obs"  # what is typed overrides a recipe
    assert options["max_grad_norm"] == 2.0
    assert (options["lora_rank"], options["lora_alpha"]) == (32, 64.0)
    assert options["refit"] is False
    assert options["distill"] == 0.5
    assert "preset" not in options
    assert json.loads((tmp_path / "run" / "target.json").read_text())["asked"] == {
        "ratio": 0.3,
        "depth": "auto",
        "lr": "auto",
    }
    assert isinstance(options["lr"], float)


def test_best_without_training(base, data, tmp_path):
    options = prune(base, data, tmp_path / "run", "--preset=best", "--schedule=one-shot")
    assert (options["criterion"], options["refit"], options["distill"]) == ("obs", True, None)


def test_in_a_recipe_it_gives_way_to_the_rest_of_it(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    options = {"preset": "best", "criterion": "wanda", "schedule": "one-shot", "drop_layers": 0}
    recipe.write_text(yaml.safe_dump({"prune": options}))
    options = prune(base, data, tmp_path / "run", "--recipe", str(recipe))
    assert (options["criterion"], options["refit"], options["distill"]) == ("wanda", True, None)


def test_the_papers_method_prunes_once_with_rows_to_score():
    for schedule in ("separate", "one-shot"):
        config = PruneConfig.from_preset("loraprune", schedule=schedule)
        assert config.num_calibration_rows == 128


@pytest.mark.parametrize(
    ("recipe", "words", "depth", "layers"),
    [
        ({"depth": "auto"}, ["--drop-layers=1"], None, 1),
        ({"drop_layers": 1, "head_ratio": 0.5}, ["--depth=auto", "--ratio=0.3"], "auto", None),
        ({"depth": "auto"}, ["--head-ratio=0.5"], None, None),
    ],
    ids=str,
)
def test_the_command_line_says_otherwise_how_many_layers_go(
    data, tmp_path, recipe, words, depth, layers
):
    deep = make_tiny_model(tmp_path / "deep", num_hidden_layers=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"prune": recipe}))
    words = ["--recipe", str(path), "--schedule=one-shot", *words]
    options = prune(deep, data, tmp_path / "run", *words)
    assert (tmp_path / "run" / "target.json").exists() == (depth == "auto")
    if depth is None:
        assert options["drop_layers"] == layers

"""A target of size: the shape that a run then has, counted from the weights it wrote."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file

from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import count_parameters
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.selection import round_kept
from lpdeploy.pruning.target import build_counter, choose_ratio, load_chosen
from lpdeploy.run_folder import RunFolder
from lpdeploy.servers.check import Target, forecast_config, suggest
from tests.helpers import make_text, make_tiny_model
from tests.pruning.test_resume import StoppedError, stop_after

SMALL = PruneOptions(
    steps=2, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=4,
    calibration_samples=2, criterion="random", device="cpu", checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("target") / "base", heads=8, kv_heads=4)


@pytest.fixture(scope="module")
def data(base):
    return make_text(base.parent / "text.txt")


def count_saved(folder):
    """Return (numbers, bytes) of the weights in a checkpoint."""
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)


def count_by_hand(config, kept):
    """Count a model of two layers, hidden 32, heads of 8, from (KV heads, channels) of each."""
    per_group = config.num_attention_heads // config.num_key_value_heads
    layers = sum(
        (2 * per_group + 2) * heads * 8 * 32 + 3 * channels * 32 + 2 * 32
        for heads, channels in kept
    )
    return layers + 2 * config.vocab_size * 32 + 32


@pytest.mark.parametrize(
    "changes",
    [{}, {"round_to": 16, "round_heads_to": 2}, {"protect_first": 1}, {"scope": "global"}],
    ids=str,
)
@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
def test_the_run_meets_it_and_the_next_larger_shape_would_not(base, data, tmp_path, changes, share):
    options = dataclasses.replace(SMALL, **changes)
    config = load_config(base)
    dense, _ = count_saved(base)
    limit = int(share * dense)
    chosen = choose_ratio(str(base), options, parameters=limit)
    ratio = chosen["ratios"]["ratio"]
    prune(
        str(base), tmp_path / "run", data=str(data), target=chosen,
        options=dataclasses.replace(options, ratio=ratio),
    )  # fmt: skip
    compact(tmp_path / "run")
    saved, _ = count_saved(tmp_path / "run" / "model")
    assert saved <= limit
    assert saved == chosen["after"]
    assert chosen["before"] == dense
    assert json.loads((tmp_path / "run" / "target.json").read_text()) == chosen
    assert RunFolder(tmp_path / "run").load_plan().ratio == ratio

    def shape(smaller):
        heads = round_kept(4, smaller, multiple=options.round_heads_to)
        channels = round_kept(48, smaller, multiple=options.round_to)
        first = (4, 48) if options.protect_first else (heads, channels)
        return count_by_hand(config, [first, (heads, channels)])

    if options.scope == "layer":
        assert shape(ratio) == saved
        assert all(shape(step / 1000) > limit for step in range(int(1000 * ratio)))
        assert shape(ratio - 2e-6) > limit


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"protect_last": 1}, {"round_to": 32}], ids=str)
def test_what_is_counted_is_the_model_of_the_forecast(tmp_path, model_type, changes):
    folder = make_tiny_model(
        tmp_path / "m", model_type=model_type, kv_heads=2, tie_word_embeddings=True
    )
    config, options = load_config(folder), dataclasses.replace(SMALL, **changes)
    count = build_counter(config, options)
    for ratio in (0, 0.1, 0.3, 0.5, 0.9):
        shape = forecast_config(config, dataclasses.replace(options, ratio=ratio))
        assert count(ratio) == count_parameters(shape)


@pytest.mark.parametrize("round_to", [4, 20])  # 20 leaves a first chunk of 8 channels
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_global_runs_have_no_more_than_was_counted(base, data, tmp_path, round_to, ratio):
    options = dataclasses.replace(SMALL, scope="global", round_to=round_to, ratio=ratio)
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    compact(tmp_path / "run")
    saved, _ = count_saved(tmp_path / "run" / "model")
    counted = build_counter(load_config(base), options)(ratio)
    assert saved <= counted
    if round_to == 4:
        assert saved == counted


def test_bytes_are_those_of_the_checkpoints_precision(tmp_path, data):
    base = make_tiny_model(tmp_path / "base", kv_heads=2, dtype="bfloat16")
    config = load_config(base)
    config.dtype = "bfloat16"
    config.save_pretrained(base)
    half = choose_ratio(str(base), SMALL, bytes=20_000)
    whole = choose_ratio(str(base), SMALL, parameters=10_000)
    assert half["ratios"] == whole["ratios"]
    assert half["after"] == 2 * whole["after"] <= 20_000


def test_bytes_of_a_run(base, data, tmp_path):
    _, dense = count_saved(base)
    chosen = choose_ratio(str(base), SMALL, bytes=int(0.7 * dense))
    options = dataclasses.replace(SMALL, **chosen["ratios"])
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    compact(tmp_path / "run")
    assert count_saved(tmp_path / "run" / "model")[1] == chosen["after"] <= 0.7 * dense


def test_what_cannot_be_met_is_refused_with_what_could_be(base):
    config = load_config(base)
    least = count_by_hand(config, [(1, 4)] * 2)
    dense = count_by_hand(config, [(4, 48)] * 2)
    with pytest.raises(LpdeployError, match=f"out of reach: .* are {least:,} parameters of"):
        choose_ratio(str(base), SMALL, parameters=least - 1)
    assert choose_ratio(str(base), SMALL, parameters=least)["after"] == least
    with pytest.raises(LpdeployError, match=f"has {dense:,} parameters already. Give less"):
        choose_ratio(str(base), SMALL, parameters=dense)
    with pytest.raises(LpdeployError, match=rf"has .* \({4 * dense:,} bytes\) already"):
        choose_ratio(str(base), SMALL, bytes=4 * dense)
    with pytest.raises(ValueError, match="give either parameters or bytes"):
        choose_ratio(str(base), SMALL)


@pytest.mark.parametrize("removal", ["cut", "mask"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_heads_and_channels_go_by_ratios_of_their_own(base, data, tmp_path, scope, removal):
    options = dataclasses.replace(
        SMALL, ratio=0.9, head_ratio=0.25, channel_ratio=0.75, scope=scope, removal=removal, steps=4
    )
    seen = []
    result = prune(
        str(base), tmp_path / "run", data=str(data), options=options,
        on_step=lambda info: seen.append(info.ratio),
    )  # fmt: skip
    plan = RunFolder(tmp_path / "run").load_plan()
    kept = [
        sum(len(k) for name, k in plan.kept.items() if name.endswith(kind))
        for kind in ("heads", "channels")
    ]
    assert kept == [2 * 3, 2 * 12]
    assert plan.achieved["heads"] == 0.25
    assert plan.achieved["channels"] == 0.75
    # 2 of 8 heads and 72 of 96 channels: what is asked of all groups is what was achieved.
    assert plan.ratio == result.ratio == seen[-1] == pytest.approx(74 / 104)
    assert plan.achieved["groups"] == pytest.approx(74 / 104)


def test_a_resumed_run_keeps_its_ratios_and_their_record(base, data, tmp_path):
    chosen = {"asked": {"parameters": 5}, "ratios": {"head_ratio": 0.5, "channel_ratio": 0.25}}
    options = dataclasses.replace(SMALL, **chosen["ratios"], steps=4)
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        prune(str(base), run, data=str(data), options=options, target=chosen, on_step=stop_after(2))
    again = load_chosen(run, {"parameters": 5})
    assert again == chosen
    with pytest.raises(ArtifactError, match="other run: head_ratio was 0.5 and is None now"):
        prune(
            str(base), run, data=str(data), resume=True,
            options=dataclasses.replace(options, head_ratio=None),
        )  # fmt: skip
    prune(str(base), run, data=str(data), options=options, target=again, resume=True)
    assert json.loads((run / "target.json").read_text()) == chosen
    stage = json.loads((run / "manifest.json").read_text())["stages"]["prune"]
    assert stage["options"]["target"] == chosen
    with pytest.raises(ArtifactError, match="another target: parameters 5, not bytes 7. Give the"):
        load_chosen(run, {"bytes": 7})
    prune(str(base), run, data=str(data), options=SMALL, overwrite=True)
    assert not (run / "target.json").exists()
    with pytest.raises(ArtifactError, match="No target.json in .* It began with --ratio"):
        load_chosen(run, {"parameters": 5})


def test_check_knows_ratios_of_heads_and_channels(base):
    config = load_config(base)
    target = Target(0.5, round_to=4, head_ratio=0.25, channel_ratio=0.75)
    shape = target.build_config(config)
    assert (shape.num_key_value_heads, shape.intermediate_size) == (3, 12)
    words = "--head-ratio 0.25 --channel-ratio 0.75 --round-heads-to 1 --round-to 4"
    assert target.describe() == words
    assert Target(0.5, head_ratio=0.25).describe().startswith("--ratio 0.5 --head-ratio 0.25 --ro")
    found = suggest(config, Target(0.5, round_to=4, head_ratio=0.25), ranks=2)
    assert found is not None
    assert found.build_config(config).num_key_value_heads % 2 == 0
    with pytest.raises(ValueError, match="ratio 1.5 is outside"):
        PruneOptions(channel_ratio=1.5)

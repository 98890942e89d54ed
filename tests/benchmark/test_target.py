"""A target of size: the shape that a run then has, counted from the weights it wrote."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file

from lpdeploy.benchmark.target import resolve_options
from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import build_counter, round_kept
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.target import (
    SizeFound,
    TargetRecord,
    load_target,
)
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_text, make_tiny_model
from tests.pruning.test_resume import StoppedError, stop_after

SMALL = PruneConfig(
    steps=2, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=4,
    calibration_samples=2, criterion="random", device="cpu", checkpoint_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("target") / "base", heads=8, kv_heads=4)


@pytest.fixture(scope="module")
def data(base):
    return make_text(base.parent / "text.txt")


def ask(options, **budget):
    """Let a budget decide in place of the ratio of options."""
    return dataclasses.replace(options, ratio=None, **budget)


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
    asked = ask(options, target_params=limit)
    with pytest.raises(ValueError, match="`target_params` is still open"):
        prune(str(base), tmp_path / "run", data=str(data), options=asked)
    resolved, chosen = resolve_options(str(base), asked)
    ratio = resolved.ratio
    assert resolved == dataclasses.replace(options, ratio=ratio)
    prune(str(base), tmp_path / "run", data=str(data), target=chosen, options=resolved)
    compact(tmp_path / "run")
    saved, _ = count_saved(tmp_path / "run" / "model")
    assert saved <= limit
    assert json.loads((tmp_path / "run" / "target.json").read_text()) == {
        "asked": {"parameters": limit}, "ratios": {"ratio": ratio}, "before": dense, "after": saved,
    }  # fmt: skip
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


@pytest.mark.parametrize("round_to", [4, 20])  # 20 leaves a first chunk of 8 channels
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_global_runs_have_no_more_than_was_counted(base, data, tmp_path, round_to, ratio):
    options = dataclasses.replace(SMALL, scope="global", round_to=round_to, ratio=ratio)
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    compact(tmp_path / "run")
    saved, _ = count_saved(tmp_path / "run" / "model")
    counted = build_counter(load_config(base), options.widths)(ratio)
    assert saved <= counted
    if round_to == 4:
        assert saved == counted


def test_bytes_are_those_of_the_checkpoints_precision(tmp_path, data):
    base = make_tiny_model(tmp_path / "base", kv_heads=2, dtype="bfloat16")
    config = load_config(base)
    config.dtype = "bfloat16"
    config.save_pretrained(base)
    _, half = resolve_options(str(base), ask(SMALL, target_memory=20_000))
    _, whole = resolve_options(str(base), ask(SMALL, target_params=10_000))
    assert half.ratios == whole.ratios
    assert half.found.after == 2 * whole.found.after <= 20_000


def test_bytes_of_a_run(base, data, tmp_path):
    _, dense = count_saved(base)
    options, chosen = resolve_options(str(base), ask(SMALL, target_memory=int(0.7 * dense)))
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    compact(tmp_path / "run")
    assert count_saved(tmp_path / "run" / "model")[1] == chosen.found.after <= 0.7 * dense


def test_what_cannot_be_met_is_refused_with_what_could_be(base):
    config = load_config(base)
    least = count_by_hand(config, [(1, 4)] * 2)
    dense = count_by_hand(config, [(4, 48)] * 2)
    with pytest.raises(LpdeployError, match=f"out of reach: .* are {least:,} parameters of"):
        resolve_options(str(base), ask(SMALL, target_params=least - 1))
    _, chosen = resolve_options(str(base), ask(SMALL, target_params=least))
    assert chosen.found.after == least
    with pytest.raises(LpdeployError, match=f"has {dense:,} parameters already. Give less"):
        resolve_options(str(base), ask(SMALL, target_params=dense))
    with pytest.raises(LpdeployError, match=rf"has .* \({4 * dense:,} bytes\) already"):
        resolve_options(str(base), ask(SMALL, target_memory=4 * dense))


def test_ratios_are_returned_as_they_are(base):
    assert resolve_options(str(base), SMALL) == (SMALL, None)
    latency = ask(SMALL, target_latency=5.0, engine="torch")
    with pytest.raises(ValueError, match="`engine` is 'fast'; it must be one of torch, "):
        resolve_options(str(base), ask(SMALL, target_latency=5.0, engine="fast"), data="text.txt")
    with pytest.raises(ValueError, match="`data` is needed"):
        resolve_options(str(base), latency)
    with pytest.raises(ValueError, match="`output` is needed"):
        resolve_options(str(base), latency, resume=True)


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
    ratios = {"head_ratio": 0.5, "channel_ratio": 0.25}
    chosen = TargetRecord({"parameters": 5}, ratios, SizeFound(9, 4))
    options = dataclasses.replace(SMALL, **ratios, steps=4)
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        prune(str(base), run, data=str(data), options=options, target=chosen, on_step=stop_after(2))
    again = load_target(run, {"parameters": 5})
    assert again == chosen
    with pytest.raises(ArtifactError, match="other run: head_ratio was 0.5 and is None now"):
        prune(
            str(base), run, data=str(data), resume=True,
            options=dataclasses.replace(options, head_ratio=None),
        )  # fmt: skip
    prune(str(base), run, data=str(data), options=options, target=again, resume=True)
    assert json.loads((run / "target.json").read_text()) == chosen.to_json()
    stage = json.loads((run / "manifest.json").read_text())["stages"]["prune"]
    assert stage["options"]["target"] == chosen.to_json()
    with pytest.raises(ArtifactError, match="another target: parameters 5, not bytes 7. Give the"):
        load_target(run, {"bytes": 7})
    with RunFolder(run).recorded(run / "target.json"):
        (run / "target.json").write_text('{"asked": {}}')
    with pytest.raises(ArtifactError, match="target.json' cannot be used: .* is missing. Use"):
        load_target(run, {"parameters": 5})
    prune(str(base), run, data=str(data), options=SMALL, overwrite=True)
    assert not (run / "target.json").exists()
    with pytest.raises(ArtifactError, match="No target.json in .* began with nothing left open"):
        load_target(run, {"parameters": 5})

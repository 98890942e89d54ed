"""Criteria that score outputs: rows run layer by layer when some groups are to go."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from lpdeploy.config import PruneConfig
from lpdeploy.criteria.obs import score_outputs
from lpdeploy.engines.verify import verify
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import expand_index, list_group_specs
from lpdeploy.models.adapters import attach_lora, get_base_linear, get_lora_weights
from lpdeploy.models.compact import compact
from lpdeploy.models.cutting import apply_masks
from lpdeploy.models.loading import load_model
from lpdeploy.plan import get_output
from lpdeploy.pruning.memory import plan_memory
from lpdeploy.pruning.outputs import score_layers
from lpdeploy.pruning.pruner import LoRAPruner
from lpdeploy.pruning.run import prune
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_lora_model, make_tiny_model
from tests.pruning.test_refit import FAMILIES, calibrate, make_batches

OBS = {"criterion": "obs", "lora_dropout": 0.0}
SMALL = {
    "ratio": 0.5, "steps": 4, "prune_every": 2, "batch_size": 4, "micro_batch_size": 2,
    "seq_len": 24, "round_to": 4, "calibration_samples": 4, "device": "cpu", "lr": 1e-3,
}  # fmt: skip


def score_by_whole_passes(model, specs, batches, kept):
    """Score by an independent loop: whole forward passes and hooks."""
    inputs = {spec.name: [] for spec in specs}
    for spec in specs:
        model.get_submodule(get_output(spec).module).register_forward_pre_hook(
            lambda _, args, own=inputs[spec.name]: own.append(args[0])
        )
    with torch.no_grad():
        for ids in batches[0]:
            model(input_ids=ids, use_cache=False)
        scores = {}
        for spec in specs:
            piece = get_output(spec)
            linear = model.get_submodule(piece.module)
            columns = expand_index(kept[spec.name], piece.block)
            lora = get_lora_weights(linear)
            weight = get_base_linear(linear).weight + lora.scaling * lora.lora_b @ lora.lora_a
            tokens = zip(inputs[spec.name], batches[1], strict=True)
            x = torch.cat([own[real.bool()] for own, real in tokens])[:, columns]
            scores[spec.name] = score_outputs(weight[:, columns], x.T @ x, block=piece.block)
        return scores


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_they_see_what_whole_passes_give(tmp_path, family, masked):
    batches = make_batches(padding=3)
    model = make_lora_model(tmp_path / "a", **FAMILIES[family]).get_base_model().eval()
    specs = list_group_specs(model.config)
    kept = {spec.name: torch.arange(spec.num_groups) for spec in specs}
    if masked:
        kept = {name: groups[::2] for name, groups in kept.items()}
        masks = {spec.name: torch.arange(spec.num_groups) % 2 == 0 for spec in specs}
        apply_masks(model, specs, masks)
    rows = calibrate(*batches, 0)
    scores = score_layers(model, specs, rows, score_outputs, kept=kept if masked else None)
    expected = score_by_whole_passes(model, specs, batches, kept)
    assert scores.keys() == expected.keys()
    for name, own in scores.items():
        torch.testing.assert_close(own, expected[name], rtol=1e-3, atol=1e-4)
        assert own.argsort().tolist() == expected[name].argsort().tolist()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"refit": True}, {"refit": True, "removal": "mask"}, {"schedule": "one-shot"},
        {"drop_layers": 1, "refit": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_stage_of_a_run_computes_the_same(base, data, tmp_path, options):
    config = PruneConfig(**{**SMALL, **OBS, **options})
    prune(str(base), tmp_path / "run", data=str(data), options=config)
    compact(tmp_path / "run")
    compact(tmp_path / "run", keep_adapter=True)
    verify(tmp_path / "run", engine="torch").check()


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantized_base_is_scored_by_what_it_computes_with(data, tmp_path, load_in):
    pytest.importorskip("bitsandbytes")
    base = make_tiny_model(
        tmp_path / "base", heads=8, kv_heads=4, hidden_size=64, intermediate_size=64
    )
    config = PruneConfig(**{**SMALL, **OBS, "load_in": load_in, "round_to": 32})
    prune(str(base), tmp_path / "run", data=str(data), options=config)
    compact(tmp_path / "run")
    verify(tmp_path / "run", engine="torch").check()


@pytest.mark.parametrize("criterion", ["obs", "magnitude", "random"])
def test_without_training_there_is_no_backward_pass(base, data, tmp_path, monkeypatch, criterion):
    def refuse(*_):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    config = PruneConfig(**{**SMALL, "criterion": criterion, "schedule": "one-shot"}, refit=True)
    prune(str(base), tmp_path / "run", data=str(data), options=config)
    other = PruneConfig(**{**SMALL, "criterion": "gate", "schedule": "one-shot"})
    with pytest.raises(AssertionError, match="a backward pass"):
        prune(str(base), tmp_path / "other", data=str(data), options=other)


def test_it_is_planned_with_less_memory():
    config = LlamaConfig(num_hidden_layers=32)
    plans = {
        name: plan_memory(
            config, PruneConfig(criterion=name, schedule="one-shot"), dtype="bf16", device="cuda"
        ).activations
        for name in ("gate", "magnitude")
    }
    assert plans["magnitude"] < 0.2 * plans["gate"]


def test_what_was_removed_was_worth_least_when_it_went(base, data, tmp_path):
    config = PruneConfig(**{**SMALL, **OBS, "schedule": "one-shot"})
    prune(str(base), tmp_path / "run", data=str(data), options=config)
    run = RunFolder(tmp_path / "run")
    plan, scores = run.load_plan(), load_file(run.importance)
    for name, kept in plan.kept.items():
        own = scores[name]
        gone = sorted(set(range(len(own))) - set(kept))
        assert own[gone].max() < own[kept].min()


def test_a_loop_of_ones_own_gives_it_batches(base, tmp_path):
    ids, mask = make_batches(padding=3)
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    wrapped = attach_lora(load_model(base), rank=4, alpha=8, dropout=0.0, seed=3)
    options = PruneConfig(**OBS, schedule="separate", round_to=4, device="cpu")
    pruner = LoRAPruner(wrapped, options, total_steps=1, base=base, refit_batches=batches)
    pruner.calibrate({**batch, "labels": batch["input_ids"]} for batch in batches)
    compact(pruner.save(tmp_path / "run"))
    verify(tmp_path / "run", engine="torch").check()
    with pytest.raises(ValueError, match="runs batches of its own"):
        LoRAPruner(wrapped, options, total_steps=1, base=base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scope": "global"}, "`criterion='obs'` compares the groups of one layer"),
        ({"shard": True}, "`criterion='obs'` needs whole weights"),
    ],
)
def test_what_it_cannot_go_with_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneConfig(**OBS, **options)


def test_inputs_that_are_not_finite_are_refused(tmp_path):
    model = make_lora_model(tmp_path / "a").get_base_model().eval()
    model.model.layers[1].input_layernorm.weight.data[0] = torch.nan
    specs, rows = list_group_specs(model.config), calibrate(*make_batches(), 0)
    with pytest.raises(LpdeployError, match=r"model.layers.1.self_attn.o_proj are not finite"):
        score_layers(model, specs, rows, score_outputs)

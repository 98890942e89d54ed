"""Dropping whole layers: which ones go, what is left, and every stage behind it."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lpdeploy.artifacts import compute_sha256
from lpdeploy.benchmark.target import resolve_options
from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import IGNORED
from lpdeploy.engines.export import export
from lpdeploy.engines.verify import verify
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.compact import compact
from lpdeploy.models.cutting import close_gaps, drop_layers
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import (
    build_counter,
    build_pruned_config,
    compute_widths,
    count_parameters,
    forecast_config,
)
from lpdeploy.plan import PruningPlan, load_plan, rename_layer
from lpdeploy.pruning import depth
from lpdeploy.pruning.depth import choose_drops, drop_and_refit
from lpdeploy.pruning.least_squares import solve_ridge
from lpdeploy.pruning.pruner import LoRAPruner
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.walk import Calibration, hold_out
from tests.helpers import make_lora_model, make_tiny_model
from tests.pruning.test_refit import make_batches, watch
from tests.pruning.test_run import OPTIONS, StoppedError, run, stop_after

LAYERS = 5
FAMILIES = {
    "llama": {},
    "gqa": {"heads": 8, "kv_heads": 4},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    },
    "qwen3": {"model_type": "qwen3"},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip
ONE_SHOT = {"schedule": "one-shot", "calibration_samples": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Five layers, so that some may go."""
    return make_tiny_model(tmp_path_factory.mktemp("deep") / "base", num_hidden_layers=LAYERS)


def collect(*, padding=3, **options):
    """Make a calibration of random rows, some of them padded."""
    ids, masks = make_batches(padding=padding, **options)
    batches = [
        {
            "input_ids": i,
            "attention_mask": m,
            "labels": torch.where(m.bool(), i, torch.full_like(i, IGNORED)),
        }
        for i, m in zip(ids, masks, strict=True)
    ]
    return Calibration(batches, hold_out(len(batches)), nullcontext, Ranks())


def remove(model, layers):
    """Return a copy of a model without some layers, by transformers' means alone."""
    copied = copy.deepcopy(model)
    stay = [index for index in range(len(copied.model.layers)) if index not in layers]
    copied.model.layers = torch.nn.ModuleList(copied.model.layers[index] for index in stay)
    if getattr(copied.config, "layer_types", None):
        copied.config.layer_types = [copied.config.layer_types[index] for index in stay]
    return copied


def compute_mean_loss(model, calibration):
    """Compute the mean loss a token from the whole logits."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in calibration.batches:
            logits = model(batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            total += functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != IGNORED).sum())
    return total / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_that_goes_is_the_one_whose_absence_costs_least(tmp_path, family):
    folder = make_tiny_model(tmp_path, num_hidden_layers=LAYERS, **FAMILIES[family])
    model, calibration = load_model(folder), collect()
    found = choose_drops(model, calibration, among=range(LAYERS), count=3)
    gone = []
    for drop in found:
        losses = {
            layer: compute_mean_loss(remove(model, [*gone, layer]), calibration)
            for layer in range(LAYERS)
            if layer not in gone
        }
        assert drop.layer == min(losses, key=losses.get)
        assert drop.loss == pytest.approx(losses[drop.layer], rel=1e-4)
        gone.append(drop.layer)
    assert [index for index, _ in enumerate(model.model.layers)] == list(range(LAYERS))


def test_of_many_layers_only_those_that_change_least_are_tried(tmp_path, monkeypatch):
    model = load_model(make_tiny_model(tmp_path, num_hidden_layers=LAYERS))
    calibration = collect()
    sums = torch.zeros(LAYERS)
    real = torch.cat([batch["attention_mask"].bool() for batch in calibration.batches])
    for index, layer in enumerate(model.model.layers):
        seen = []
        handle = layer.register_forward_hook(lambda _, args, out, to=seen: to.append((*args, out)))
        with torch.no_grad():
            for batch in calibration.batches:
                model(batch["input_ids"])
        handle.remove()
        before, after = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
        sums[index] = (1 - functional.cosine_similarity(before, after, dim=-1))[real].sum()
    two = set(sums.argsort()[:2].tolist())
    monkeypatch.setattr("lpdeploy.pruning.depth.CANDIDATES", 2)
    (drop,) = choose_drops(model, calibration, among=range(LAYERS), count=1)
    losses = {n: compute_mean_loss(remove(model, [n]), calibration) for n in two}
    assert drop.layer == min(losses, key=losses.get)


def test_only_layers_that_may_go_do(tmp_path):
    model = load_model(make_tiny_model(tmp_path, num_hidden_layers=LAYERS))
    found = choose_drops(model, collect(), among=[1, 3], count=2)
    assert {drop.layer for drop in found} == {1, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_numbered_anew_it_is_the_model_without_these_layers(tmp_path, family):
    folder = make_tiny_model(tmp_path, num_hidden_layers=LAYERS, **FAMILIES[family])
    model = load_model(folder)
    expected = remove(model, [0, 3])
    ids = collect().batches[0]["input_ids"]
    drop_layers(model, [0, 3])
    with torch.no_grad():
        wanted = expected(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted)
        close_gaps(model)
        assert model.config.num_hidden_layers == len(model.model.layers) == 3
        prefix = model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], past_key_values=prefix.past_key_values, use_cache=True)
        torch.testing.assert_close(
            torch.cat([prefix.logits, rest.logits], 1), wanted, rtol=1e-4, atol=1e-4
        )


def test_the_refit_is_what_an_independent_loop_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lpdeploy.pruning.refit.solve", lambda *sums: (solve_ridge(sums[0] + sums[1], 1e-2), 1e-2)
    )
    folder = make_tiny_model(tmp_path, num_hidden_layers=4)
    model, dense, expected = (load_model(folder) for _ in range(3))
    calibration = collect()
    stored = {
        piece.module: torch.float32
        for spec in list_group_specs(model.config)
        for piece in spec.slices
        if piece.dim == 1
    }
    refitted = drop_and_refit(model, [1], calibration, stored=stored)
    assert refitted == {name for name in stored if name.split(".")[2] in "23"}
    drop_layers(expected, [1])
    with torch.no_grad():
        for layer in (2, 3):
            for name in ("heads", "channels"):
                rows, gaps = [], []
                for batch in calibration.batches:
                    real = batch["attention_mask"].bool()
                    wanted = watch(dense, layer, name, batch["input_ids"])[1]
                    inputs, stream = watch(expected, layer, name, batch["input_ids"])
                    rows.append(inputs[real])
                    gaps.append((wanted - stream)[real])
                x, r = torch.cat(rows).double(), torch.cat(gaps).double()
                scale = (1e-2 * (x**2).sum(0).mean()).sqrt() * torch.eye(x.shape[1]).double()
                more = torch.zeros(x.shape[1], r.shape[1]).double()
                found = torch.linalg.lstsq(torch.cat([x, scale]), torch.cat([r, more])).solution
                part = "self_attn.o_proj" if name == "heads" else "mlp.down_proj"
                weight = expected.get_submodule(f"model.layers.{layer}.{part}").weight
                weight += found.T.float()
        ids = collect(seed=5).batches[0]["input_ids"]
        wanted = expected(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, rtol=2e-3, atol=2e-3)
        assert (wanted - dense(ids).logits).abs().max() > 0.1


class TestRuns:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"refit": True},
            {"refit": True, "removal": "mask"},
            {"criterion": "gradient", "schedule": "separate", "calibration_samples": 8},
            {**ONE_SHOT, "refit": True},
        ],
        ids=str,
    )
    def test_every_stage_computes_the_same(self, deep, data, tmp_path, options):
        run(deep, tmp_path / "run", data, options={"drop_layers": 2, **options})
        compact(tmp_path / "run")
        compact(tmp_path / "run", keep_adapter=True)
        found = verify(tmp_path / "run", engine="torch")
        found.check()
        assert {pair.b for pair in found.pairs} >= {"unmerged/torch", "compact/torch"}
        plan = load_plan(tmp_path / "run" / "plan.json")
        assert len(plan.dropped) == 2
        assert plan.achieved["layers"] == 2 / 5
        for name in ("model", "unmerged"):
            config = json.loads((tmp_path / "run" / name / "config.json").read_text())
            assert config["num_hidden_layers"] == 3

    @pytest.mark.parametrize("family", FAMILIES)
    def test_alone_it_leaves_the_base_without_some_layers(self, data, tmp_path, family):
        base = make_tiny_model(
            tmp_path / "base", num_hidden_layers=LAYERS, **FAMILIES[family]
        )  # fmt: skip
        options = {**ONE_SHOT, "drop_layers": 2, "ratio": 0.0}
        run(base, tmp_path / "run", data, options=options)
        compact(tmp_path / "run")
        plan = load_plan(tmp_path / "run" / "plan.json")
        expected = remove(load_model(base), plan.dropped)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        assert type(model) is type(expected)
        ids = collect().batches[0]["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected(ids, use_cache=False).logits)

    @pytest.mark.parametrize(
        ("options", "when"),
        [
            ({}, "before fine-tuning with LoRA"),
            ({"schedule": "separate"}, "before fine-tuning with LoRA"),
            ({"schedule": "one-shot"}, "without fine-tuning"),
        ],
        ids=str,
    )
    def test_alone_it_scores_no_groups(self, deep, data, tmp_path, options, when):
        options = {"drop_layers": 2, "ratio": 0.0, **options}
        steps = run(deep, tmp_path / "run", data, options=options).steps
        log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        if steps:
            assert [line["step"] for line in log] == list(range(1, steps + 1))
            assert not any(line["removed"] for line in log)
        compact(tmp_path / "run")
        card = " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
        assert "40% of its layers removed by" in card
        assert f"chosen by the loss without them, {when}. LoRA is merged" in card

    def test_a_limit_that_nothing_checks_is_named(self, deep, data, tmp_path, caplog):
        options = {"drop_layers": 2, "ratio": 0.0, "max_loss_increase": 0.1}
        run(deep, tmp_path / "run", data, options=options)
        assert "`max_loss_increase` has no effect" in caplog.text

    @pytest.mark.parametrize(("removal", "step"), [("cut", 4), ("cut", 7), ("mask", 4)])
    def test_a_resumed_run_ends_as_if_never_stopped(self, deep, data, tmp_path, removal, step):
        options = {"drop_layers": 2, "refit": True, "removal": removal}
        run(deep, tmp_path / "whole", data, options=options)
        with pytest.raises(StoppedError):
            run(deep, tmp_path / "run", data, options=options, on_step=stop_after(step))
        run(deep, tmp_path / "run", data, options=options, resume=True)
        for name in ("adapter", "importance.safetensors", "plan.json", "refit.safetensors"):
            whole, resumed = (tmp_path / folder / name for folder in ("whole", "run"))
            assert compute_sha256(whole) == compute_sha256(resumed), name

    def test_protected_layers_stay(self, deep, data, tmp_path):
        options = {"drop_layers": 2, "protect_first": 1, "protect_last": 1, **ONE_SHOT}
        run(deep, tmp_path / "run", data, options=options)
        plan = load_plan(tmp_path / "run" / "plan.json")
        assert set(plan.layers) >= {0, 4}
        assert len(plan.kept["layers.0.channels"]) == 48

    def test_an_export_has_the_layers_that_stay(self, deep, data, tmp_path):
        run(deep, tmp_path / "run", data, options={"drop_layers": 2, **ONE_SHOT})
        compact(tmp_path / "run")
        export(str(tmp_path / "run"), engine="onnx")
        verify(tmp_path / "run", engine="onnx").check()

    def test_the_adapter_beside_the_pruned_base_is_a_stock_one(self, deep, data, tmp_path):
        run(deep, tmp_path / "run", data, options={"drop_layers": 2})
        compact(tmp_path / "run", keep_adapter=True)
        layers = {
            name.split(".layers.")[1].split(".")[0]
            for name in load_file(tmp_path / "run/unmerged/adapter/adapter_model.safetensors")
        }
        assert layers == {"0", "1", "2"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"drop_layers": 5}, "leaves none of the 5 layers. Drop at most 4"),
            ({"drop_layers": 3, "protect_first": 2}, "that are not protected. Drop at most 2"),
        ],
        ids=str,
    )
    def test_a_model_without_layers(self, deep, data, tmp_path, options, words):
        with pytest.raises(LpdeployError, match=words):
            run(deep, tmp_path / "run", data, options=options)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("count", [5, 6, 9])
    def test_a_forecast_without_layers(self, deep, count):
        result = CliRunner().invoke(main, ["check", str(deep), "--drop-layers", str(count)])
        assert result.exit_code == 1
        assert f"--drop-layers {count} leaves none of the 5 layers" in result.stderr

    def test_a_live_model_that_has_lora(self, tmp_path):
        model = make_lora_model(tmp_path)
        with pytest.raises(ValueError, match="before LoRA is attached"):
            LoRAPruner(model, PruneConfig(drop_layers=1), total_steps=8)

    def test_a_plan_without_layers_or_with_half_of_one(self, deep):
        specs = list_group_specs(load_config(deep))
        kept = {spec.name: [0] for spec in specs}
        for layer in range(5):
            kept |= {f"layers.{layer}.heads": [], f"layers.{layer}.channels": []}
        with pytest.raises(ValueError, match="no layer keeps a group"):
            PruningPlan("base", "0", 0.5, specs, kept)
        with pytest.raises(ValueError, match=r"layers\.1\.heads keeps no group"):
            PruningPlan("base", "0", 0.5, specs, kept | {"layers.1.channels": [0]})
        del kept["layers.2.heads"]
        with pytest.raises(ValueError, match=r"kept lacks 'layers\.2\.heads'"):
            PruningPlan("base", "0", 0.5, specs, kept)


class TestShapes:
    def test_the_forecast_has_as_many_parameters_as_are_counted(self, deep):
        config = load_config(deep)
        request = PruneConfig(drop_layers=2, ratio=0.25, round_to=4).widths
        count = build_counter(config, request)
        assert count(0.25) == count_parameters(forecast_config(config, request))
        assert count(0) == count_parameters(remove(load_model(deep), [0, 1]).config) - sum(
            p.numel() for layer in load_model(deep).model.layers[:2] for p in layer.parameters()
        )

    def test_what_a_plan_leaves(self, deep):
        config = load_config(deep)
        specs = list_group_specs(config)
        kept = {s.name: [] if s.layer in (1, 2) else list(range(s.num_groups)) for s in specs}
        pruned = build_pruned_config(config, compute_widths(config, specs, kept))
        assert (pruned.num_hidden_layers, pruned.model_type) == (3, "llama")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("base_model.model.model.layers.12.x", "base_model.model.model.layers.2.x"),
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_names(name, expected):
    assert rename_layer(name, (0, 3, 12)) == expected


def test_a_choice_goes_on_from_an_earlier_one(deep):
    model, rows = load_model(deep), collect()
    whole = choose_drops(model, rows, among=range(LAYERS), count=3)
    first = choose_drops(model, rows, among=range(LAYERS), count=1)
    assert whole[:1] == first
    assert choose_drops(model, rows, among=range(LAYERS), count=3, known=first) == whole


def test_trials_of_several_depths_choose_once(deep, data, tmp_path, monkeypatch):
    """Each layer is chosen once, by the trial that first drops so many; the run chooses none."""
    counts = []

    def choose(model, calibration, *, among, count, known=()):
        counts.append(count - len(known))
        return choose_drops(model, calibration, among=among, count=count, known=known)

    monkeypatch.setattr(depth, "choose_drops", choose)
    monkeypatch.setattr(depth, "_chosen", {})
    options = {"depth": "auto", "ratio": 0.5, "refit": True, **ONE_SHOT}
    config = PruneConfig(**{**OPTIONS, **options})
    given = {"data": str(data), "output": tmp_path / "run", "cache": False}
    config, target = resolve_options(str(deep), config, **given)
    tried = max(trial.ratios["drop_layers"] for trial in target.trials)
    prune(str(deep), **given, options=config, target=target)
    assert tried > 1
    assert sum(counts) == tried
    monkeypatch.setattr(depth, "_chosen", {})
    prune(str(deep), **{**given, "output": tmp_path / "again"}, options=config, target=target)
    assert load_plan(tmp_path / "again" / "plan.json") == load_plan(tmp_path / "run" / "plan.json")

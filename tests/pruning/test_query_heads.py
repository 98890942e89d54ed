"""Removing query heads, with all KV heads left: from the options to the model on disk."""

import json

import pytest
import torch

from lpdeploy.benchmark.target import resolve_options
from lpdeploy.config import PruneConfig
from lpdeploy.engines.export import export
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import count_parameters, forecast_config
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.target import SizeFound, TargetRecord, describe_asked, load_target
from lpdeploy.report.page import save_report
from lpdeploy.run_folder import RunFolder
from lpdeploy.servers.check import check
from tests.helpers import make_text, make_tiny_model

SIZES = {"heads": 6, "kv_heads": 2, "hidden_size": 48}
SMALL = {
    "heads": "query-heads", "ratio": 0.34, "steps": 4, "prune_every": 2, "batch_size": 2,
    "micro_batch_size": 2, "seq_len": 16, "round_to": 4, "calibration_samples": 4, "lr": 1e-2,
    "lora_dropout": 0.0, "device": "cpu",
}  # fmt: skip


def run_prune(tmp_path, *, sizes=SIZES, **options):
    base = make_tiny_model(tmp_path / "base", **sizes)
    data, run = make_text(tmp_path / "text.txt"), tmp_path / "run"
    prune(str(base), run, data=str(data), options=PruneConfig(**{**SMALL, **options}))
    return base, run


def test_the_model_on_disk_is_the_base_without_those_heads(tmp_path):
    """Nothing is trained, so zero columns of the base's outputs give the same logits."""
    base, run = run_prune(tmp_path, schedule="one-shot", criterion="magnitude")
    compact(run)
    plan = RunFolder(run).load_plan()
    whole, small = load_model(base), load_model(run / "model")
    for layer, block in enumerate(whole.model.layers):
        heads, channels = (plan.kept[f"layers.{layer}.{kind}"] for kind in ("heads", "channels"))
        assert [sum(head // 3 == kv for head in heads) for kv in range(2)] == [2, 2]
        with torch.no_grad():
            for head in set(range(6)) - set(heads):
                block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
            for channel in set(range(48)) - set(channels):
                block.mlp.down_proj.weight[:, channel] = 0
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected, found = whole(ids).logits, small(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"removal": "mask"},
        {"criterion": "gate", "refit": True},
        {"criterion": "gradient", "schedule": "separate"},
        {"criterion": "obs", "schedule": "one-shot"},
        {"load_in": "8bit"},
        {"drop_layers": 1, "refit": True, "channel_ratio": 0.0},
    ],
    ids=str,
)
def test_every_stage_computes_the_same(tmp_path, options):
    _, run = run_prune(tmp_path, **options)
    compact(run)
    compact(run, keep_adapter=True)
    assert verify(run, engine="torch").ok
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert check(str(run), PruneConfig()).shape.heads == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_exports_are_equal(tmp_path, family):
    sizes = {"heads": 6, "kv_heads": 2, "hidden_size": 96, "head_dim": 16, "model_type": family}
    _, run = run_prune(tmp_path, sizes=sizes)
    compact(run)
    for engine in ("onnx", "ort"):
        export(run, engine=engine)
        assert verify(run, engine=engine).ok


def test_it_is_the_mask_of_what_is_cut(tmp_path):
    """The same groups go, whether they are cut in place or masked until the end."""
    plans = []
    for removal in ("cut", "mask"):
        _, run = run_prune(tmp_path / removal, removal=removal)
        plans.append(RunFolder(run).load_plan().kept)
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("target", "heads"),
    [({"ratio": 0.5}, 4), ({"head_ratio": 0.6, "channel_ratio": 0.0}, 2), ({"ratio": 0.1}, 6)],
)
def test_the_forecast_is_what_the_run_leaves(tmp_path, target, heads):
    options = {"schedule": "one-shot", "criterion": "magnitude", "ratio": None, **target}
    base, run = run_prune(tmp_path, **options)
    found = check(str(base), PruneConfig(**{**SMALL, **options}))
    assert (found.shape.heads, found.shape.kv_heads) == (heads, 2)
    assert found.after.parameters == compact(run).record.parameters["after"]


def test_a_number_of_heads_that_ranks_can_share(tmp_path):
    """Six query heads on two KV heads, kept in multiples of four that both KV heads share."""
    base, _ = run_prune(tmp_path, round_heads_to=4, schedule="one-shot", criterion="magnitude")
    assert check(str(base), PruneConfig(**SMALL, round_heads_to=4)).shape.heads == 4


def test_one_query_head_a_kv_head_is_refused(tmp_path):
    with pytest.raises(LpdeployError, match="each KV head of this model has one. Use `heads='kv-"):
        run_prune(tmp_path, sizes={"heads": 4})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"protect_first": 1}, "`protect_first` leaves some layers whole"),
        ({"scope": "global"}, "`scope='global'` makes layers differ"),
    ],
)
@pytest.mark.parametrize("heads", ["query-heads", "auto"])
def test_what_it_cannot_go_with_is_refused(heads, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneConfig(**{**SMALL, **options, "heads": heads})


class TestAuto:
    @pytest.mark.parametrize("depth", [None, "auto"])
    def test_the_kind_that_loses_least_is_taken(self, tmp_path, depth):
        base = make_tiny_model(tmp_path / "base", **SIZES)
        data, run = make_text(tmp_path / "text.txt"), tmp_path / "run"
        asked = PruneConfig(**{**SMALL, "heads": "auto", "depth": depth})
        config, record = resolve_options(str(base), asked, data=str(data))
        tried = {(trial.ratios["drop_layers"], trial.ratios["heads"]) for trial in record.trials}
        assert {(0, "kv-groups"), (0, "query-heads")} <= tried
        best = min(record.trials, key=lambda trial: trial.loss)
        assert record.ratios == best.ratios
        assert config.heads == best.ratios["heads"]
        limit = compute_parameters(base, "kv-groups")
        for trial in record.trials:
            shape = PruneConfig(**{**SMALL, "ratio": None, "heads": None}).with_ratios(
                **trial.ratios
            )
            left = count_parameters(forecast_config(load_config(base), shape.widths))
            assert left <= limit
        prune(str(base), run, data=str(data), options=config, target=record)
        compact(run)
        assert verify(run, engine="torch").ok
        assert config.heads in save_report(run).read_text()
        again = load_target(run, describe_asked(asked))
        assert asked.with_ratios(**again.ratios) == config

    @pytest.mark.parametrize("target", [{"target_params": 9000}, {"ratio": 0.5, "round_to": 48}])
    @pytest.mark.parametrize("depth", [None, "auto"])
    def test_what_only_query_heads_reach_is_tried(self, tmp_path, target, depth):
        """There is one KV head, which no layer can lose."""
        base = make_tiny_model(tmp_path / "base", kv_heads=1)
        data = make_text(tmp_path / "text.txt")
        options = {**SMALL, "ratio": None, **target, "heads": "auto", "depth": depth}
        _, record = resolve_options(str(base), PruneConfig(**options), data=str(data))
        tried = [(trial.ratios["drop_layers"], trial.ratios["heads"]) for trial in record.trials]
        assert (0, "query-heads") in tried

    @pytest.mark.parametrize(
        "change",
        [{"heads": "auto"}, {"heads": "x"}, {"ratio": "x"}, {"drop_layers": None}, {"x": 1.0}],
    )
    def test_a_damaged_record_of_trials_is_refused(self, change):
        ratios = {"drop_layers": 0, "ratio": 0.5, "heads": "kv-groups", **change}
        ratios = {name: value for name, value in ratios.items() if value is not None}
        record = TargetRecord({"ratio": 0.5}, {"ratio": 0.5}, SizeFound(9, 4)).to_json()
        TargetRecord.from_json(record)
        with pytest.raises(ValueError, match=r"is no ratio|lacks its ratios|is '"):
            TargetRecord.from_json({**record, "trials": [{"ratios": ratios, "loss": 1.0}]})

    def test_one_query_head_a_kv_head_leaves_one_kind(self, tmp_path):
        base = make_tiny_model(tmp_path / "base")
        data, asked = make_text(tmp_path / "text.txt"), PruneConfig(**{**SMALL, "heads": "auto"})
        config, _ = resolve_options(str(base), asked, data=str(data))
        assert config.heads == "kv-groups"

    @pytest.mark.parametrize("name", ["head_ratio", "channel_ratio"])
    def test_a_ratio_of_one_kind_is_refused(self, name):
        with pytest.raises(ValueError, match=f"`heads='auto'` chooses what `{name}` says"):
            PruneConfig(heads="auto", **{name: 0.3})

    def test_shard_is_refused(self):
        with pytest.raises(ValueError, match="`heads='auto'` tries both kinds in one process"):
            PruneConfig(heads="auto", shard=True)


def compute_parameters(base, heads):
    widths = PruneConfig(**{**SMALL, "heads": heads}).widths
    return count_parameters(forecast_config(load_config(base), widths))


def test_a_plan_that_keeps_more_heads_of_one_kv_head_is_refused(tmp_path):
    _, run = run_prune(tmp_path, schedule="one-shot", criterion="magnitude")
    folder = RunFolder(run)
    plan = json.loads(folder.plan.read_text())
    plan["kept"]["layers.0.heads"] = [0, 1, 2, 3]
    with folder.recorded(folder.plan):
        folder.plan.write_text(json.dumps(plan))
    with pytest.raises(ArtifactError, match="as many query heads of each KV head"):
        compact(run)

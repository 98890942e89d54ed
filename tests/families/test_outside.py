"""A family from outside the package: added to the table, it runs the whole line."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lpdeploy.config import PruneConfig
from lpdeploy.engines.export import export
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.families import FAMILIES, Family
from lpdeploy.families.groups import has_bias
from lpdeploy.families.llama import carry_odd_heads
from lpdeploy.families.record import GGUF_LLAMA
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.pruning.run import prune
from lpdeploy.servers.gguf_file import get_architecture
from lpdeploy.servers.package import package
from lpdeploy.servers.verdicts import list_verdicts
from tests.helpers import make_text, make_tiny_model
from tests.models.families import choose_kept, make_run


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig


TOY = Family(model_type="toy", load_classes=lambda: (ToyConfig, ToyForCausalLM))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)


def judge_llama_cpp(config):
    return next(v for v in list_verdicts(config) if v.name == "llama.cpp")


@pytest.mark.slow
def test_it_runs_the_line(tmp_path):
    base = make_tiny_model(
        tmp_path / "base", model_type="toy", kv_heads=2, head_dim=16, attention_bias=True
    )
    options = PruneConfig(
        steps=2, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=16,
        calibration_samples=2, device="cpu",
    )  # fmt: skip
    data = make_text(tmp_path / "t.txt")
    run = tmp_path / "run"
    prune(str(base), run, data=str(data), options=options)
    compact(run)
    config = load_config(run / "model")
    assert (type(config), config.num_key_value_heads) == (ToyConfig, 1)
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "model"), ToyForCausalLM)
    assert all(pair.ok for pair in verify(run, engine="torch").pairs)
    export(str(run), engine="ort")
    assert all(pair.ok for pair in verify(run, engine="ort").pairs)


def test_layers_that_differ_take_a_class_of_its_own(tmp_path):
    base = make_tiny_model(tmp_path / "base", model_type="toy", heads=4)
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=[2, 1], channels=32))
    with pytest.raises(LpdeployError, match="toy has no class.*`scope='layer'`"):
        compact(run)


def test_what_it_states_of_itself_is_asked_of_its_record(tmp_path, monkeypatch):
    base = make_tiny_model(tmp_path / "base", model_type="toy", heads=4)
    config = load_config(base)
    assert not has_bias(config, "model.layers.0.self_attn.q_proj")
    assert judge_llama_cpp(config).loads == "no"
    with pytest.raises(LpdeployError, match="no architecture for a toy"):
        package(str(base), kind="llamacpp", output=tmp_path / "refused")
    with pytest.raises(LpdeployError, match="no architecture for a toy"):
        get_architecture(config)
    stated = Family(
        model_type="toy",
        load_classes=TOY.load_classes,
        carry_odd_heads=carry_odd_heads,
        biased=("q_proj",),
        gguf=GGUF_LLAMA,
    )
    monkeypatch.setitem(FAMILIES, "toy", stated)
    assert has_bias(config, "model.layers.0.self_attn.q_proj")
    assert not has_bias(config, "model.layers.0.self_attn.k_proj")
    assert judge_llama_cpp(config).loads != "no"
    assert get_architecture(config) == GGUF_LLAMA
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=3, channels=32))
    compact(run)
    assert load_config(run / "model").model_type == "mistral"
    assert load_model(run / "model").config.num_attention_heads == 3


def test_without_its_record_it_is_refused(tmp_path, monkeypatch):
    base = make_tiny_model(tmp_path / "base", model_type="toy")
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(ArtifactError, match="is a ToyForCausalLM, which lpdeploy does not know"):
        load_config(base)

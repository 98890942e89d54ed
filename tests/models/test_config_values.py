import json
import shutil

import pytest

from lpdeploy.demo.run import _BASE
from lpdeploy.errors import ArtifactError
from lpdeploy.families import FAMILIES
from lpdeploy.models.config_values import find_bad_value
from lpdeploy.models.loading import load_config

COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
BAD = [
    *((name, value) for name in COUNTS for value in (0, -1, 10**12, 1.5, "8", True, [8], {})),
    *(("dtype", value) for value in ("float64", "int8", "none", "nn", 1, True, [], {})),
    *(("rms_norm_eps", value) for value in (0, -1e-5, 2, "x", None, [])),
    *(("attention_dropout", value) for value in (-1, 1.5, "x", None)),
    *(("hidden_act", value) for value in ("none", "", 3, None, [])),
    *(("rope_parameters", value) for value in ("x", 3, [], {"rope_type": "none"})),
    *(("rope_parameters", ROPE | {key: None}) for key in ROPE),
    *(("rope_parameters", ROPE | {"rope_theta": value}) for value in (0, -1, "x", [])),
    ("rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0}),
    ("num_key_value_heads", 3),
    ("num_attention_heads", 5),
]


def edit(folder, name, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_no_model_can_have_is_refused(tmp_path, name, value):
    base = tmp_path / "base"
    shutil.copytree(_BASE, base)
    edit(base, name, value)
    with pytest.raises(ArtifactError, match=rf"config of '{base}' is not valid: .*Correct its"):
        load_config(base)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_of_every_family_are_good(name):
    config_class, _ = FAMILIES[name].load_classes()
    assert find_bad_value(config_class()) is None


def test_a_long_value_is_cut():
    config_class, _ = FAMILIES["llama"].load_classes()
    config = config_class()
    config.hidden_act = "x" * 1000
    assert len(find_bad_value(config)) < 200


@pytest.mark.parametrize("value", [{"rope_theta": 1e4}, ROPE, None])
def test_good_positions_are_good(value):
    config_class, _ = FAMILIES["llama"].load_classes()
    config = config_class()
    config.rope_parameters = value
    assert find_bad_value(config) is None

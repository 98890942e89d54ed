"""NaN, infinity and overflow are refused where they arise, by the name of the weight."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.config import PruneConfig
from lpdeploy.engines.export import export_folder
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.adapters import load_adapter
from lpdeploy.models.compact import compact
from lpdeploy.models.finite import round_weight
from lpdeploy.models.loading import load_model
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model
from tests.models.families import choose_kept, make_run

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
)
SMALL = {
    "steps": 1, "batch_size": 2, "micro_batch_size": 2, "seq_len": 16, "round_to": 4,
    "prune_every": 1, "calibration_samples": 2, "device": "cpu",
}  # fmt: skip


def edit(folder, **changes):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        tensors[name][-1, ...] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base", head_dim=16, heads=4, intermediate_size=64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_with_one_that_is_no_number_is_refused(base, tmp_path, name, value):
    edit(base, **{name: value})
    readers = {
        "torch": lambda: load_model(base),
        "ort": lambda: export_folder("ort", base, tmp_path / "ort"),
        "onnx": lambda: export_folder("onnx", base, tmp_path / "onnx"),
        "ort int8": lambda: export_folder("ort", base, tmp_path / "int8", precision="int8"),
        "prune": lambda: prune(
            str(base), tmp_path / "run", data=str(make_text(tmp_path / "text.txt")),
            options=PruneConfig(**SMALL),
        ),
        "compact": lambda: compact(
            make_run(tmp_path / "made", base, choose_kept(base, heads=1, channels=32))
        ),
    }  # fmt: skip
    for reader, read in readers.items():
        if name == "model.norm.weight" and reader == "ort int8":
            continue  # said by another reader
        with pytest.raises(ArtifactError, match=f"{name} holds NaN or infinity") as caught:
            read()
        assert caught.value, reader
    assert not list(tmp_path.glob("*/model.onnx*"))


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_quantized_one_too(base, load_in):
    pytest.importorskip("bitsandbytes")
    edit(base, **{NAMES[1]: float("nan")})
    with pytest.raises(ArtifactError, match=f"{NAMES[1]} holds NaN or infinity"):
        load_model(base, dtype="fp32", load_in=load_in)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["ort", "onnx"])
def test_what_fp16_cannot_hold_is_refused(base, tmp_path, engine, name):
    edit(base, **{name: 7e4})
    with pytest.raises(LpdeployError, match=rf"{name} holds 70000, and fp16 ends at 65504\. Use"):
        export_folder(engine, base, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
    export_folder(engine, base, tmp_path / "out", precision="bf16")


def test_a_merge_that_overflows_is_refused(base, tmp_path):
    model = load_model(base, dtype="fp16")
    model.save_pretrained(base)
    edit(base, **{NAMES[1]: 6.5e4})
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=1, channels=32))
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor * 100 for key, tensor in tensors.items()}, file, {"format": "pt"})
    record = (
        json.loads((run / "manifest.json").read_text()) if (run / "manifest.json").is_file() else {}
    )
    for stage in record.get("stages", {}).values():
        stage["outputs"].pop("adapter", None)
    (run / "manifest.json").write_text(json.dumps(record or {"stages": {}}))
    with pytest.raises(LpdeployError, match=r"The merged model\..* fp16 ends at 65504\. Save the"):
        compact(run)
    assert not (run / "model").exists()


def test_a_rounded_weight_is_what_torch_rounds_it_to():
    weight = torch.tensor([1.0, -65504.0, 1e-9])
    rounded = round_weight(weight, torch.float16, name="w", fix="")
    assert torch.equal(rounded, weight.half())


ADAPTERS = {
    "rank 0": ({"r": 0}, "has rank 0"),
    "a negative rank": ({"r": -8}, "has rank -8"),
    "another rank": ({"r": 2}, "is of rank 2 by its config, and .* of rank 4"),
    "rslora": ({"use_rslora": True}, "use_rslora=True, and only plain LoRA"),
    "dora": ({"use_dora": True}, "use_dora=True, and only plain LoRA"),
    "a pattern": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern=.* and only plain LoRA"),
}


@pytest.mark.parametrize(("changes", "said"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_of_another_kind_is_refused(base, tmp_path, changes, said):
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=1, channels=32))
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtifactError, match=said):
        load_adapter(run / "adapter")


def test_an_adapter_that_is_no_number_is_refused(base, tmp_path):
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=1, channels=32))
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{name} holds NaN or infinity"):
        load_adapter(run / "adapter")

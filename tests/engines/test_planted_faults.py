"""A fault that compact or an exporter could make is found in every precision and engine.

Each is planted in a checkpoint as if compact had written it, or in the checkpoint that an export is
made of: two heads in each other's place, one FFN channel off by one, one layer without its LoRA.
"""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.artifacts import save_json
from lpdeploy.config import PruneConfig
from lpdeploy.engines import get_engine
from lpdeploy.engines.export import export
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import FOLDER_RECORD, atomic_folder
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model

pytestmark = pytest.mark.slow

OPTIONS = PruneConfig(
    steps=2, batch_size=2, micro_batch_size=2, seq_len=16, lr=1e-2, prune_every=1, prune_warmup=0.0,
    round_to=32, ratio=0.3, device="cpu", calibration_samples=2,
)  # fmt: skip
HEAD = 16
LAYER = "model.layers.1."
SWAPPED, SHIFTED, UNMERGED = "two heads swapped", "a channel off by one", "a layer unmerged"
WEIGHT = {SWAPPED: "self_attn.o_proj", SHIFTED: "mlp.down_proj", UNMERGED: "self_attn.v_proj"}
EXPORTS = [
    *(("onnx", precision) for precision in ("fp32", "fp16")),
    *(("ort", precision) for precision in ("fp32", "fp16", "int8", "int4")),
]
# Each export with one of the faults; all three where weights are hardest to tell apart.
CASES = sorted(
    {(*export, fault) for export, fault in zip(EXPORTS, itertools.cycle(WEIGHT), strict=False)}
    | {("ort", "int4", fault) for fault in WEIGHT}
)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = make_tiny_model(
        folder / "base", heads=4, kv_heads=2, head_dim=HEAD, intermediate_size=128,
        num_hidden_layers=2,
    )  # fmt: skip
    if request.param == "bf16":
        tensors = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
        (base / "config.json").write_text(json.dumps(config))
    run = folder / "run"
    prune(str(base), run, data=str(make_text(folder / "text.txt")), options=OPTIONS)
    compact(run)
    compact(run, keep_adapter=True)
    return run


def plant(run, fault, tensors):
    o_proj, down = f"{LAYER}self_attn.o_proj.weight", f"{LAYER}mlp.down_proj.weight"
    if fault == SWAPPED:  # the columns of two query heads
        one, other, *rest = tensors[o_proj].split(HEAD, dim=1)
        tensors[o_proj] = torch.cat([other, one, *rest], dim=1)
    elif fault == SHIFTED:  # the column of the channel after it
        tensors[down] = torch.cat(
            [tensors[down][:, :5], tensors[down][:, 6:7], tensors[down][:, 6:]], dim=1
        )
    else:
        unmerged = load_file(run / "unmerged" / "model.safetensors")
        for name in tensors:
            if name.startswith(LAYER) and "_proj" in name:
                tensors[name] = unmerged[name]


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def write_fault(run, fault):
    """Write a model with a fault, as compact itself would have recorded it."""
    whole = run / "whole"
    (run / "model").rename(whole)
    with atomic_folder(run / "model", kind="model") as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / FOLDER_RECORD).unlink()
        tensors = load_file(folder / "model.safetensors")
        plant(run, fault, tensors)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return whole


def restore(run, whole):
    shutil.rmtree(run / "model")
    whole.rename(run / "model")


@pytest.mark.parametrize("fault", WEIGHT)
def test_in_the_checkpoint(run, fault):
    write_fault(run, fault)
    result = verify(run, engine="torch")
    (pair,) = (pair for pair in result.pairs if not pair.ok)
    assert pair.b == "compact/torch"
    assert pair.first_layer == 1
    (check,) = result.weights
    assert not check.ok
    assert f"{LAYER}{WEIGHT[fault]}.weight" in check.wrong
    assert all(name.startswith(LAYER) for name in check.wrong)


def export_fault(run, fault, engine, precision):
    """Export a faulty checkpoint, and put the export beside the right one."""
    whole = write_fault(run, fault)
    export(str(run), engine=engine, precision=precision)
    restore(run, whole)
    made = run / engine
    contract = get_engine(engine).contract_file
    data = json.loads((made / contract).read_text())
    data["source"]["sha256"] = compute_model_sha256(run / "model")
    made.rename(run / "made")
    with atomic_folder(made, kind="export") as folder:
        shutil.copytree(run / "made", folder, dirs_exist_ok=True)
        (folder / FOLDER_RECORD).unlink()
        save_json(folder / contract, data)


@pytest.mark.parametrize("made", ["fp32"], indirect=True)
@pytest.mark.parametrize(("engine", "precision", "fault"), CASES)
def test_in_an_export(run, fault, engine, precision):
    export_fault(run, fault, engine, precision)
    result = verify(run, engine=engine)
    assert not result.ok
    ours, check = result.weights
    assert ours.ok
    assert (check.a, check.b, check.ok) == ("compact/torch", engine, False)
    assert f"{LAYER}{WEIGHT[fault]}.weight" in check.wrong
    assert all(name.startswith(LAYER) for name in check.wrong)


@pytest.mark.parametrize("made", ["bf16"], indirect=True)
@pytest.mark.parametrize("fault", WEIGHT)
@pytest.mark.parametrize("engine", ["onnx", "ort"])
def test_in_an_export_that_no_cpu_runs(run, fault, engine):
    def check():
        return get_engine(engine).check_weights(
            run / "made", run / "model", adapter=None, precision="bf16", a="torch", b=engine
        )

    export(str(run), engine=engine, precision="bf16", output=run / "made")
    assert check().ok
    with pytest.raises(ArtifactError, match="in bf16, which ONNX Runtime does not on a"):
        get_engine(engine).load(run / "made")
    whole = write_fault(run, fault)
    export(str(run), engine=engine, precision="bf16", output=run / "made", overwrite=True)
    restore(run, whole)
    assert f"{LAYER}{WEIGHT[fault]}.weight" in check().wrong


@pytest.mark.parametrize("made", ["bf16"], indirect=True)
@pytest.mark.parametrize(
    ("engine", "precision"), [("onnx", "fp16"), ("ort", "fp32"), ("ort", "int8"), ("ort", "int4")]
)
def test_what_is_right_passes_with_and_without_its_adapter(run, engine, precision):
    export(str(run), engine=engine, precision=precision)
    export(str(run), engine=engine, precision=precision, unmerged=True)
    result = verify(run, engine=engine)
    assert result.ok, result
    assert [(check.a, check.b) for check in result.weights] == [
        ("unmerged/torch", f"{engine}-unmerged"),
        ("merged/torch", "compact/torch"),
        ("compact/torch", engine),
    ]
    # 9 weights a layer, and 3 around them; LoRA has two for each of the seven projections.
    assert [check.num_weights for check in result.weights] == [21 + 2 * 14, 21, 21]


@pytest.mark.parametrize(
    ("engine", "precision"), [("onnx", "fp32"), ("ort", "fp16"), ("ort", "int4")]
)
def test_tied_embeddings_are_one_weight(tmp_path, engine, precision):
    model = make_tiny_model(
        tmp_path / "model", head_dim=HEAD, intermediate_size=64, tie_word_embeddings=True,
        num_hidden_layers=1,
    )  # fmt: skip
    export(str(model), engine=engine, precision=precision)
    result = verify(model, engine=engine)
    assert result.ok, result
    assert result.weights[0].num_weights >= 11

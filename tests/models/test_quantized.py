"""A quantized base: its rows, its cuts, and what is refused. Expected: codes times scales."""

import copy
import importlib.util
import sys

import pytest
import torch
from torch import nn

from lpdeploy.errors import ArtifactError, LpdeployError, MissingDependencyError
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora, get_base_linear
from lpdeploy.models.cutting import apply_cut, apply_cut_to_adapter, apply_masks
from lpdeploy.models.loading import load_model
from lpdeploy.models.quantized import (
    build_quantization,
    check_load_in,
    cut_quantized,
    get_quantization,
    get_weight_shape,
    read_weight,
)
from tests.helpers import fill_lora
from tests.models.families import TOKENS, choose_kept, compute_logits, edit_json
from tests.models.test_cutting import as_masks, as_tensors

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
# (10, 100) has rows that end within a block of 64 weights, and more weights than whole blocks;
# (300, 96) has 450 blocks, which end within a block of 256 scales.
SHAPES = [(10, 100), (300, 96), (64, 64)]


# The 16 levels of nf4 (QLoRA, arXiv:2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


def make_weight(out, columns, *, seed=0):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    return weight * torch.logspace(-2, 0, out).unsqueeze(1)  # rows and blocks of unlike scales


def make_int8(weight, *, bias=None):
    import bitsandbytes as bnb

    linear = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False
    )
    linear.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear.to("cpu")  # quantizes


def make_nf4(weight, *, double=True, dtype=torch.float32, storage=torch.uint8):
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype,
        compress_statistics=double, quant_type="nf4", quant_storage=storage,
    )  # fmt: skip
    linear.weight = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, compress_statistics=double, quant_type="nf4",
        quant_storage=storage, module=linear,
    )  # fmt: skip
    return linear.to("cpu")


def dequantize(linear):
    """Multiply the codes of the whole weight by their scales, in float32, by hand.

    Not by bitsandbytes: its 4-bit kernel is wrong on some CPUs, see ``check_4bit_widths``.
    """
    if hasattr(linear, "state"):
        scales = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
        return linear.weight.data * scales.unsqueeze(1) * (1 / 127)
    state = linear.weight.quant_state
    packed = linear.weight.data.contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()  # the high half comes first
    scales = state.absmax
    if state.nested:
        scales = take_scaled(state.state2.code, scales, state.state2) + state.offset
    values = take_scaled(NF4, codes, state, scales=scales)
    return values[: state.shape.numel()].view(state.shape)


def take_scaled(table, codes, state, *, scales=None):
    scales = state.absmax if scales is None else scales
    return table[codes.long()] * scales.repeat_interleave(state.blocksize)[: len(codes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_plain_weight_is_read_as_it_is(dtype):
    linear = nn.Linear(6, 9, dtype=dtype)
    assert get_quantization(linear) is None
    assert get_weight_shape(linear) == (9, 6)
    weight = read_weight(linear)
    assert not weight.requires_grad
    assert weight.data_ptr() == linear.weight.data_ptr()
    assert torch.equal(weight, linear.weight.detach())


@needs_bitsandbytes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        make_int8,
        make_nf4,
        lambda weight: make_nf4(weight, double=False),
        lambda weight: make_nf4(weight, storage=torch.bfloat16),
    ],
    ids=["8bit", "nf4-double", "nf4", "nf4-bf16-storage"],
)
def test_a_quantized_weight_is_read_in_float32(make, shape):
    linear = make(make_weight(*shape))
    assert get_weight_shape(linear) == shape
    read = read_weight(linear)
    assert read.dtype == torch.float32
    assert torch.equal(read, dequantize(linear))  # the same products of code and scale


@needs_bitsandbytes
def test_an_8bit_weight_is_read_after_a_forward_too():
    linear = make_int8(make_weight(10, 100))
    expected = dequantize(linear)
    linear(torch.randn(2, 100))
    assert linear.weight.SCB is None  # bitsandbytes has moved the scales
    assert torch.equal(read_weight(linear), expected)


@needs_bitsandbytes
def test_a_4bit_weight_is_not_rounded_to_the_dtype_it_is_computed_in():
    linear = make_nf4(make_weight(10, 100), dtype=torch.bfloat16)
    read = read_weight(linear)
    assert not torch.equal(read, read.bfloat16().float())
    assert torch.equal(read, dequantize(linear))
    assert linear.weight.quant_state.dtype == torch.bfloat16  # as it was
    assert tuple(linear.weight.quant_state.shape) == (10, 100)


@needs_bitsandbytes
def test_a_4bit_weight_in_the_layout_for_inference_is_refused():
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    linear = make_nf4(make_weight(64, 128))
    linear.weight.data, _ = _convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    with pytest.raises(ValueError, match="repacked for inference .*; load the model with load_mo"):
        read_weight(linear)


INDEX = torch.tensor([0, 3, 4, 8])


@needs_bitsandbytes
@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_stays_of_an_8bit_weight_is_the_same_numbers(dim, forwards):
    linear = make_int8(make_weight(10, 12))
    whole, codes = dequantize(linear), linear.weight.data.clone()
    for _ in range(forwards):
        linear(torch.randn(2, 12))
    cut_quantized(linear, dim=dim, index=INDEX)
    expected = whole.index_select(dim, INDEX)
    assert torch.equal(linear.weight.data, codes.index_select(dim, INDEX))
    assert torch.equal(read_weight(linear), expected)
    assert get_weight_shape(linear) == tuple(expected.shape)
    linear(torch.randn(2, expected.shape[1]))
    assert torch.equal(dequantize(linear), expected)
    cut_quantized(linear, dim=1 - dim, index=torch.tensor([1, 2]))  # and again
    assert torch.equal(
        read_weight(linear),
        expected.index_select(1 - dim, torch.tensor([1, 2])),
    )


@needs_bitsandbytes
@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_forward_and_backward_use_the_cut_8bit_weight(dim, forwards):
    linear = make_int8(make_weight(10, 12)).train()
    for _ in range(forwards):
        linear(torch.randn(2, 12, requires_grad=True)).sum().backward()
    weight = dequantize(linear).double().index_select(dim, INDEX)
    cut_quantized(linear, dim=dim, index=INDEX)
    x = torch.randn(2, 3, weight.shape[1], requires_grad=True)
    grad = torch.randn(2, 3, weight.shape[0])
    output = linear(x)
    output.backward(grad)
    # float32 sums of at most twelve products up to 9, against float64.
    torch.testing.assert_close(output.double(), x.double() @ weight.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=0, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dim", [0, 1])
def test_an_8bit_kernel_gives_the_same_bits_cut_as_masked(dim, threshold):
    """In eval mode inputs become int8 too; sums of whole numbers have no order."""
    torch.manual_seed(0)
    linear = make_int8(make_weight(10, 12), bias=torch.randn(10)).eval()
    linear.state.threshold = threshold
    cut = copy.deepcopy(linear)
    cut_quantized(cut, dim=dim, index=INDEX)
    x = torch.randn(5, 12)
    x[0, 3] = x[2, 7] = 20.0  # outliers, one in a column that stays and one in one that goes
    mask = torch.zeros(12).index_fill(0, INDEX, 1.0)
    if dim == 0:
        cut.bias = nn.Parameter(linear.bias[INDEX], requires_grad=False)
        # Outliers are multiplied in float32, by a kernel that fits the number of rows: three terms
        # of at most 64, whose roundings are 64 * 2 ** -24 each. Without outliers nothing differs.
        atol = 3 * 64 * 2**-24 if threshold else 0
        torch.testing.assert_close(cut(x), linear(x)[:, INDEX], rtol=0, atol=atol)
    else:
        # In fp16, what an outlier's column adds is summed beside zeros: the same bits here too.
        assert torch.equal(cut(x[:, INDEX]), linear(x * mask))


@needs_bitsandbytes
def test_4bit_weights_are_not_cut():
    linear = make_nf4(make_weight(10, 100))
    with pytest.raises(ValueError, match="cannot be cut in place; mask their groups instead"):
        cut_quantized(linear, dim=0, index=INDEX)


def load_quantized(base, load_in, *, dtype="fp32"):
    model = load_model(base, dtype=dtype, load_in=load_in)
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=1)
    fill_lora(model)
    return wrapped, model, list_group_specs(model.config)


@needs_bitsandbytes
@pytest.mark.parametrize(("load_in", "name"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_only_the_projections_are_quantized(bases, load_in, name):
    for family in ("llama-64-bias", "llama-64"):
        model = load_model(bases(family), dtype="fp32", load_in=load_in)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                expected = "Linear" if path == "lm_head" else name
                assert type(module).__name__ == expected, path
        assert model.model.embed_tokens.weight.dtype == torch.float32
        assert not model.training


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_what_is_loaded_is_what_bitsandbytes_quantizes(bases, load_in):
    plain = load_model(bases("llama-64"))
    model = load_model(bases("llama-64"), dtype="fp32", load_in=load_in)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        weight = plain.get_submodule(path).weight.detach()
        expected = dequantize((make_int8 if load_in == "8bit" else make_nf4)(weight))
        read = read_weight(model.get_submodule(path))
        assert torch.equal(read, expected)
        assert 0 < (read - weight).abs().max() < 0.3  # coarse, and of the same layer


@needs_bitsandbytes
@pytest.mark.parametrize("training", [True, False])
def test_a_4bit_model_computes_with_the_weights_that_are_read(bases, training):
    model = load_model(bases("llama-64"), dtype="fp32", load_in="4bit").train(training)
    linears = [m for m in model.modules() if get_quantization(m) == "4bit"]
    assert len(linears) == 14
    for linear in linears:
        x = torch.randn(3, linear.in_features)
        expected = x.double() @ dequantize(linear).double().T
        # float32 sums of 64 products below 10.
        torch.testing.assert_close(linear(x).double(), expected, rtol=0, atol=1e-4)


@needs_bitsandbytes
def test_widths_that_a_cpu_computes_wrong_in_4_bits_are_refused(bases):
    with pytest.raises(LpdeployError, match="32 inputs, .* no multiple of 64.*load_in='8bit'"):
        load_model(bases("llama-gqa"), dtype="fp32", load_in="4bit")
    load_model(bases("llama-gqa"), dtype="fp32", load_in="8bit")


@needs_bitsandbytes
def test_a_4bit_model_keeps_its_layout_in_eval_mode(bases):
    model = load_model(bases("llama-64"), dtype="fp32", load_in="4bit")
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen2"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_cutting_an_8bit_model_equals_masking_it(bases, family, forwards):
    kept = choose_kept(bases(family), heads=2, channels=20)
    cut, model, specs = load_quantized(bases(family), "8bit")
    masked, masked_model, _ = load_quantized(bases(family), "8bit")
    for _ in range(forwards):
        cut(TOKENS)
    apply_cut(model, specs, as_tensors(kept))
    apply_masks(masked_model, specs, as_masks(specs, kept))
    losses = [m.train()(TOKENS, labels=TOKENS).loss for m in (cut, masked)]
    for loss in losses:
        loss.backward()
    # In training a CPU multiplies in float32; terms are added in another order, over two layers,
    # as in test_cutting.py.
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(compute_logits(cut), compute_logits(masked), rtol=0, atol=1e-5)
    for path in ("model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.mlp.up_proj.lora_A"):
        gradients = [m.get_submodule(f"{path}.default").weight.grad for m in (model, masked_model)]
        assert gradients[0].abs().max() > 1e-3
        torch.testing.assert_close(*gradients, rtol=0, atol=2e-6)


@needs_bitsandbytes
def test_a_4bit_model_is_masked_and_only_its_adapter_cut(bases):
    kept = choose_kept(bases("llama-64"), heads=2, channels=20)
    _, model, specs = load_quantized(bases("llama-64"), "4bit")
    before = {n: m.weight.clone() for n, m in model.named_modules() if get_quantization(m)}
    with pytest.raises(ValueError, match="mask their groups instead"):
        apply_cut(model, specs, as_tensors(kept))
    whole = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    apply_cut_to_adapter(model, specs, as_tensors(kept))
    for spec in specs:
        for piece in spec.slices:
            linear = model.get_submodule(piece.module)
            factor, width = ("lora_B", 0) if piece.dim == 0 else ("lora_A", 1)
            rows = [g * piece.block + i for g in kept[spec.name] for i in range(piece.block)]
            name = f"{piece.module}.{factor}.default"
            cut = model.get_submodule(name).weight
            expected = whole[f"{name}.weight"]
            assert torch.equal(cut, expected[rows] if width == 0 else expected[:, rows])
            base = get_base_linear(linear)
            assert torch.equal(base.weight.data, before[f"{piece.module}.base_layer"].data)


@needs_bitsandbytes
def test_a_damaged_base_is_refused_quantized_as_it_is_plain(bases, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    base = shutil.copytree(bases("llama-64"), tmp_path / "base")
    for load_in in ("8bit", "4bit"):
        edit_json(base / "config.json", intermediate_size=128)
        with pytest.raises(ArtifactError, match="or has them in another shape, first .*down_proj"):
            load_model(base, dtype="fp32", load_in=load_in)
        edit_json(base / "config.json", intermediate_size=64)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for load_in in ("8bit", "4bit"):
        with pytest.raises(ArtifactError, match=r"lacks 1 weights .*1.mlp.up_proj.weight"):
            load_model(base, dtype="fp32", load_in=load_in)


def test_a_missing_bitsandbytes_is_named_with_the_command(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    sentence = r"bitsandbytes is not installed; .* pip install 'lpdeploy\[quant\]'"
    with pytest.raises(MissingDependencyError, match=sentence):
        check_load_in("8bit")
    with pytest.raises(MissingDependencyError, match=sentence):
        load_model(bases("llama-gqa"), load_in="4bit")
    check_load_in(None)
    load_model(bases("llama-gqa"))  # a plain model needs none


def test_another_number_of_bits_is_a_value_error():
    with pytest.raises(ValueError, match="load_in is '2bit'; it must be 8bit or 4bit"):
        build_quantization("2bit", dtype=torch.float32)
    with pytest.raises(ValueError, match="load_in is '2bit'; it must be 8bit or 4bit"):
        check_load_in("2bit")

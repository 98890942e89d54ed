"""The plan of a run's memory, against the tensors that are alive in real passes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from lpdeploy.benchmark.random_models import build_random_model
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora
from lpdeploy.models.quantized import import_bitsandbytes
from lpdeploy.pruning import loss as loss_module
from lpdeploy.pruning.loss import compute_loss
from lpdeploy.pruning.memory import plan_memory
from lpdeploy.pruning.scoring import Scorer
from lpdeploy.pruning.setup import apply_checkpointing

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that are alive, and those that are gone again."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.sizes, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key = storage._cdata
        if key not in self.known and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.live -= self.sizes.pop(key)


def measure(config, options, *, dtype):
    """Return the peak of live tensors in the second micro-batch, beside weights and LoRA."""
    model = build_random_model(config, dtype=dtype, device="cpu", load_in=options.load_in)
    if options.gradient_checkpointing:
        apply_checkpointing(model)
    wrapped = attach_lora(
        model, rank=options.lora_rank, alpha=8, dropout=options.lora_dropout, seed=0
    ).train()
    scorer = Scorer(CRITERIA[options.criterion], model, list_group_specs(config))
    shape = (options.micro_batch_size, options.seq_len)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    with LiveTensors(wrapped.parameters()) as live, scorer.observe():
        for _ in range(2):
            live.peak = live.live
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = compute_loss(hidden, model.lm_head.weight, ids, targets=ids.numel())
            loss.backward()
            del hidden, loss
    lora = sum(p.grad.nbytes for p in wrapped.parameters() if p.grad is not None)
    return live.peak - lora


def make_options(**changes):
    return PruneConfig(**{"batch_size": 4, "micro_batch_size": 2, "seq_len": 64, "lora_rank": 4,
                           **changes})  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_are_those_that_are_alive(dtype, dropout, checkpointing, kv_heads):
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": kv_heads})
    options = make_options(lora_dropout=dropout, gradient_checkpointing=checkpointing)
    plan = plan_memory(config, options, dtype=dtype, device="cpu")
    # Left out: rotary angles, labels, LoRA's casts; what one layer's backward pass makes and
    # frees is known to a few tensors only, and counts where all others are computed again.
    tolerance = 0.1 if checkpointing else 0.025
    assert plan.activations == pytest.approx(measure(config, options, dtype=dtype), rel=tolerance)


def test_dropout_keeps_a_byte_on_a_gpu_and_a_float_on_a_cpu():
    columns = 4 * (3 * 64 + 64 + 2 * 64 + 160)  # inputs of q k v, o, gate up, down in each layer
    first = 3 * 64  # over frozen embeddings, the first three keep nothing
    plans = [
        plan_memory(LlamaConfig(**SHAPE), make_options(), dtype="fp32", device=device)
        for device in ("cpu", "cuda")
    ]
    difference = 2 * 64 * (4 - 1) * (columns - first)
    assert plans[0].activations - plans[1].activations == difference


@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_the_loss_counts_where_the_vocabulary_is_large(vocab_size):
    config = LlamaConfig(**{**SHAPE, "vocab_size": vocab_size})
    for checkpointing in (False, True):
        options = make_options(gradient_checkpointing=checkpointing)
        plan = plan_memory(config, options, dtype="fp32", device="cpu")
        measured = measure(config, options, dtype="fp32")
        assert plan.activations == pytest.approx(measured, rel=0.07)


def test_logits_count_for_a_chunk_of_tokens(monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", 4 * 3000 * 32)
    config = LlamaConfig(**{**SHAPE, "vocab_size": 3000})
    options = make_options(gradient_checkpointing=True)
    plan = plan_memory(config, options, dtype="fp32", device="cpu")
    assert plan.activations == pytest.approx(measure(config, options, dtype="fp32"), rel=0.1)


def test_true_gradients_keep_inputs_and_a_model():
    config = LlamaConfig(**SHAPE)
    options = make_options(criterion="gradient")
    plan = plan_memory(config, options, dtype="fp32", device="cpu")
    measured = measure(config, options, dtype="fp32")
    assert plan.activations + plan.gradients == pytest.approx(measured, rel=0.03)
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 160)
    assert plan.gradients == 4 * (weights + 64 * 160)  # and that of one Linear on its way


def test_true_gradients_of_one_micro_batch_come_while_activations_go():
    whole = make_options(criterion="gradient", batch_size=2)
    plan = plan_memory(LlamaConfig(**SHAPE), whole, dtype="fp32", device="cpu")
    parts = plan_memory(
        LlamaConfig(**SHAPE), make_options(criterion="gradient"), dtype="fp32", device="cpu"
    )
    assert plan.activations == parts.activations
    assert plan.gradients < parts.gradients


def test_off_loaded_gradients_leave_one_on_the_device():
    config = LlamaConfig(**SHAPE)
    options = make_options(criterion="gradient", offload_gradients=True)
    plan = plan_memory(config, options, dtype="bf16", device="cuda")
    assert plan.gradients == 2 * 64 * 160


def test_protected_layers_have_no_gradients():
    options = make_options(criterion="gradient", protect_first=1, protect_last=1)
    plan = plan_memory(LlamaConfig(**SHAPE), options, dtype="fp32", device="cpu")
    assert plan.gradients == 4 * (2 * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 160)


def test_gate_keeps_the_input_of_the_last_projection():
    config = LlamaConfig(**SHAPE)
    options = make_options(criterion="gate")
    plan = plan_memory(config, options, dtype="fp32", device="cpu")
    assert plan.activations == pytest.approx(measure(config, options, dtype="fp32"), rel=0.025)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_8bit_products_keep_their_inputs_but_not_under_checkpointing(checkpointing):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**SHAPE)
    options = make_options(load_in="8bit", gradient_checkpointing=checkpointing)
    plan = plan_memory(config, options, dtype="fp32", device="cpu")
    measured = measure(config, options, dtype="fp32")
    assert plan.activations == pytest.approx(measured, rel=0.1 if checkpointing else 0.025)


def test_8bit_checkpointing_gives_the_same_gradients():
    pytest.importorskip("bitsandbytes")
    ids = torch.arange(24).view(2, 12)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_random_model(LlamaConfig(**SHAPE), dtype="fp32", device="cpu", load_in="8bit")
        if checkpointing:
            apply_checkpointing(model)
        wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.5, seed=0).train()
        torch.manual_seed(1)  # of dropout, which checkpointing repeats
        wrapped(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 4 * 7
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "load_in", "projection"),
    [("fp32", None, 4.0), ("bf16", None, 2.0), ("bf16", "8bit", 1.0), ("bf16", "4bit", 0.51586914)],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_adapters_are_counted(dtype, load_in, projection, tied):
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    plan = plan_memory(config, make_options(load_in=load_in), dtype=dtype, device="cuda")
    itemsize = 4 if dtype == "fp32" else 2
    embeddings = 300 * 64 * (1 if tied else 2)
    norms = 9 * 64
    rows = 4 * (4 * 64 + 2 * 160 + 64)
    scales = 4 * rows if load_in == "8bit" else 0
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 160)
    assert plan.weights == pytest.approx(
        int(weights * projection) + scales + itemsize * (embeddings + norms), abs=1
    )
    factors = 4 * 4 * (4 * 128 + 3 * 224)  # layers, rank, in + out
    assert plan.adapters == factors * (16 if dtype == "fp32" else 18)
    assert plan.process == 0
    assert plan.total == plan.weights + plan.beside


def test_4bit_weights_are_as_large_as_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    assert import_bitsandbytes() is bnb
    linear = bnb.nn.Linear4bit(1024, 1024, bias=False, quant_type="nf4", compress_statistics=True)
    state = linear.to("cpu").weight.quant_state
    held = linear.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    config = LlamaConfig(**SHAPE)
    plan = plan_memory(config, make_options(load_in="4bit"), dtype="fp32", device="cpu")
    plain = plan_memory(config, make_options(), dtype="fp32", device="cpu")
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 160)
    share = (plan.weights - (plain.weights - 4 * weights)) / weights
    assert share == pytest.approx(held / 1024**2, rel=1e-3)  # tables of codes left out

"""The GGUF file, read back by gguf and by transformers, neither of which wrote it."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lpdeploy.errors import ArtifactError, LpdeployError, MissingDependencyError
from lpdeploy.models.loading import load_config
from lpdeploy.servers.gguf_vocab import _SPLITS, build_vocabulary
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tests.models.families import edit_json
from tests.servers.models import DEMO, ROWS, make_demo_run, make_family

gguf = pytest.importorskip("gguf", reason="lpdeploy[gguf] is not installed")

# Our own list of names, since gguf's made the file.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
FAMILIES = {
    "llama-gqa": {}, "llama-bias": {}, "llama-tied": {}, "mistral": {}, "qwen2": {},
    "qwen3": {"attention_bias": False},
}  # fmt: skip


def package_for_llamacpp(model, output, **options):
    result = package(str(model), kind="llamacpp", output=output, **options).to_json()
    return result, gguf.GGUFReader(output / result["file"])


def translate(name):
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def undo_rotation(rows, head_dim):
    """Put rows 2i and 2i + 1 of each head back to i and i + head_dim / 2, one by one."""
    ordered = np.empty_like(rows)
    half = head_dim // 2
    for start in range(0, len(rows), head_dim):
        for index in range(half):
            ordered[start + index] = rows[start + 2 * index]
            ordered[start + half + index] = rows[start + 2 * index + 1]
    return ordered


def read_tensors(reader):
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type.name not in ("F32", "F16")
        else np.array(tensor.data, dtype=np.float32)
        for tensor in reader.tensors
    }


def read_field(reader, name):
    return reader.fields[name].contents()


def check_tensors(model, reader, *, rotated):
    config = load_config(model)
    stored = {k: v.float().numpy() for k, v in load_file(model / "model.safetensors").items()}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    written = read_tensors(reader)
    assert {translate(name) for name in stored} == written.keys()
    for name, tensor in stored.items():
        found = written[translate(name)]
        if rotated and ("q_proj" in name or "k_proj" in name):
            found = undo_rotation(found, config.head_dim)
        assert np.array_equal(found, tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_checkpoints(tmp_path, family):
    model = make_family(tmp_path / "model", family, **FAMILIES[family])
    edit_json(model / "config.json", head_dim=8 if family != "qwen2" else 4)
    _, reader = package_for_llamacpp(model, tmp_path / "out")
    check_tensors(model, reader, rotated=family != "qwen3")
    architecture = "qwen3" if family == "qwen3" else "llama"
    assert read_field(reader, "general.architecture") == architecture


def test_a_pruned_model_whose_heads_are_not_its_hidden_size(tmp_path):
    run = make_demo_run(tmp_path / "run")
    _, reader = package_for_llamacpp(run, tmp_path / "out")
    check_tensors(run / "model", reader, rotated=True)
    shape = {name: read_field(reader, f"llama.{name}") for name in (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "rope.dimension_count",
    )}  # fmt: skip
    assert shape == {
        "block_count": 4, "context_length": 512, "embedding_length": 128,
        "feed_forward_length": 96, "vocab_size": 512, "attention.head_count": 5,
        "attention.head_count_kv": 5, "attention.key_length": 16, "attention.value_length": 16,
        "rope.dimension_count": 16,
    }  # fmt: skip
    assert read_field(reader, "llama.rope.freq_base") == 10000.0
    assert read_field(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)


def test_a_window_ends_the_context(tmp_path):
    model = make_family(tmp_path / "model", "mistral")  # a window of five tokens
    result, reader = package_for_llamacpp(model, tmp_path / "out")
    assert read_field(reader, "llama.context_length") == 5
    assert result["command"].endswith("-c 5 --port 8080")
    with pytest.raises(LpdeployError, match="`max_seq_len` 6 does not fit a model of 5 positions"):
        package_for_llamacpp(model, tmp_path / "again", max_seq_len=6)


@pytest.mark.parametrize(("precision", "kind"), [("fp16", "F16"), ("bf16", "BF16")])
def test_half_precisions_round_once(tmp_path, precision, kind):
    result, reader = package_for_llamacpp(DEMO, tmp_path / "out", precision=precision)
    assert result["file"] == f"out-{kind.lower()}.gguf"
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[kind]
    stored = load_file(DEMO / "model.safetensors")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    written = read_tensors(reader)
    for name, tensor in stored.items():
        if tensor.dim() == 1:
            assert kinds[translate(name)] == "F32"
        elif "q_proj" not in name and "k_proj" not in name:
            assert kinds[translate(name)] == kind
            assert np.array_equal(written[translate(name)], tensor.to(dtype).float().numpy())


def test_int8_keeps_each_block_within_half_a_step(tmp_path):
    run = make_demo_run(tmp_path / "run")  # 80 columns of o_proj are no multiple of 32
    result, reader = package_for_llamacpp(run, tmp_path / "out", precision="int8")
    assert "80 is none: such tensors stay in f16" in " ".join(result["notes"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_output.weight"] == "F16"
    written = read_tensors(reader)
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        if kinds.get(translate(name)) != "Q8_0" or "q_proj" in name or "k_proj" in name:
            continue
        blocks = tensor.reshape(-1, 32)
        errors = np.abs(written[translate(name)].reshape(-1, 32) - blocks.numpy()).max(1)
        largest = blocks.abs().amax(1).numpy()
        # Half a step of largest / 127, and the scale itself is rounded to fp16 (2^-11).
        assert (errors <= largest * (0.5 / 127 + 2**-11) + 1e-7).all()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_transformers_computes_the_same_from_the_file(tmp_path, precision):
    result, _ = package_for_llamacpp(DEMO, tmp_path / "out", precision=precision)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=result["file"], dtype=torch.float32
    )
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(ids).logits - other(ids).logits).abs().max()
    assert difference == 0 if precision == "fp32" else 0 < difference < 0.5


def make_sentencepiece_tokenizer(folder):
    """Save BPE of SentencePiece's kind: bytes, then letters, then merges in an order of its own."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({"\u2581", *"aelonpcitm"})
    # "on" goes before "no" and after "up", though it is the last by its number.
    merges = [("\u2581", "u"), ("\u2581u", "p"), ("o", "n"), ("n", "o"), ("\u2581", "on")]
    letters = sorted({*letters, "u"})
    made = ["\u2581on", "no", "\u2581up", "\u2581u", "on"]
    vocabulary = {piece: row for row, piece in enumerate([*pieces, *letters, *made])}
    tokenizer = Tokenizer(models.BPE(
        vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    ))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return fast


def test_sentencepiece_scores_are_the_order_of_merges(tmp_path):
    tokenizer = make_sentencepiece_tokenizer(tmp_path)
    vocabulary = build_vocabulary(tokenizer, rows=300)
    assert (vocabulary.model, vocabulary.add_space_prefix, vocabulary.split) == (
        "llama", True, None,
    )  # fmt: skip
    scores = dict(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    ordered = ["\u2581u", "\u2581up", "on", "no", "\u2581on"]
    assert sorted(ordered, key=scores.get, reverse=True) == ordered
    assert [vocabulary.kinds[row] for row in (0, 1, 2, 3, 258, 259, 299)] == [2, 3, 3, 6, 6, 1, 5]
    assert vocabulary.pieces[-1] == "[PAD299]"


def test_transformers_reads_the_sentencepiece_tokenizer_back(tmp_path):
    model = make_tiny_model(tmp_path / "model", vocab_size=300)
    tokenizer = make_sentencepiece_tokenizer(model)
    result, _ = package_for_llamacpp(model, tmp_path / "out")
    other = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=result["file"])
    for text in ("up on once", "no one until noon", "é up"):
        found = other(text, add_special_tokens=False).input_ids
        assert found == tokenizer(text, add_special_tokens=False).input_ids


def make_byte_tokenizer(pattern, *, ignore_merges=False):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.normalizer = None
    if pattern is not None:
        from tokenizers import Regex

        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    tokenizer.model.ignore_merges = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("pattern", "name"), _SPLITS.items())
def test_patterns_of_words_have_names(pattern, name):
    tokenizer = make_byte_tokenizer(pattern, ignore_merges=name == "llama-bpe")
    assert build_vocabulary(tokenizer, rows=ROWS).split == name


def test_the_pattern_of_qwen_is_that_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert _SPLITS[PRETOKENIZE_REGEX] == "qwen2"


def test_special_tokens(tmp_path):
    _, reader = package_for_llamacpp(DEMO, tmp_path / "out")
    ids = [read_field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")]
    assert ids == [1, 2]
    assert read_field(reader, "tokenizer.ggml.add_bos_token") is True
    merges = json.loads((DEMO / "tokenizer.json").read_text())["model"]["merges"]
    assert read_field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


def copy_demo(folder, *, stops=None, adds_bos=True):
    shutil.copytree(DEMO, folder)
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    if not adds_bos:
        data["post_processor"] = None
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_file_says_whether_bos_is_added(adds_bos, tmp_path):
    model = copy_demo(tmp_path / "model", adds_bos=adds_bos)
    _, reader = package_for_llamacpp(model, tmp_path / "out")
    assert read_field(reader, "tokenizer.ggml.add_bos_token") is adds_bos
    assert read_field(reader, "tokenizer.ggml.add_eos_token") is False


@pytest.mark.parametrize(
    ("stops", "written", "said"),
    [([2], [2], False), ([5, 2], [2, 5], False), ([5, 6, 7, 2], [2, 5, 6], True)],
)
def test_every_token_that_ends_an_answer_is_written(stops, written, said, tmp_path):
    result, reader = package_for_llamacpp(
        copy_demo(tmp_path / "model", stops=stops), tmp_path / "out"
    )
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [read_field(reader, name) for name in names[: len(written)]] == written
    assert (reader.get_field(names[-1]) is not None) is (len(written) == 3)
    assert any("tokens that end an answer. Stop at" in note for note in result["notes"]) is said


def compute_llama3_factor(frequency, rope):
    """What Llama 3.1 divides a rotary frequency by, from Meta's description of it."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    length = 2 * math.pi / frequency
    if length < old / rope["high_freq_factor"]:
        return 1.0
    if length > old / rope["low_freq_factor"]:
        return factor
    smooth = (old / length - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    return 1 / ((1 - smooth) / factor + smooth)


def test_rotary_frequencies_of_llama_3(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model = make_family(tmp_path / "model", "llama-gqa", rope_parameters=rope)
    _, reader = package_for_llamacpp(model, tmp_path / "out")
    expected = [compute_llama3_factor(10000 ** (-2 * i / 8), rope) for i in range(4)]
    assert 1 in expected
    assert 8 in expected
    assert read_tensors(reader)["rope_freqs.weight"] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    model = make_tiny_model(tmp_path / "words")
    with pytest.raises(ArtifactError, match="no tokenizer like this one: its kind is WordLevel"):
        package_for_llamacpp(model, tmp_path / "out")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="has no tokenizer. Copy its tokenizer files beside"):
        package_for_llamacpp(model, tmp_path / "out")
    with pytest.raises(LpdeployError, match="`target=llamacpp` does not write `precision=int4`"):
        package_for_llamacpp(DEMO, tmp_path / "out", precision="int4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="Install with: pip install 'lpdeploy.gguf.'"):
        package(str(DEMO), kind="llamacpp", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_positions_and_biases_without_a_place(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    model = make_family(tmp_path / "yarn", "llama-gqa", rope_parameters=rope)
    with pytest.raises(LpdeployError, match="does not write rotary positions of type 'yarn' for a"):
        package_for_llamacpp(model, tmp_path / "out")
    model = make_family(tmp_path / "bias", "qwen3", attention_bias=True)
    with pytest.raises(ArtifactError, match="llama.cpp does not load .* no place for a bias of o_"):
        package_for_llamacpp(model, tmp_path / "out")


def test_weights_too_large_for_half_precision(tmp_path):
    model = make_family(tmp_path / "model", "llama-gqa")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        LpdeployError, match=r"lm_head.weight holds 1e.06, and fp16 ends at 65504.* `precision"
    ):
        package_for_llamacpp(model, tmp_path / "out", precision="fp16")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks 1 weights .* first lm_head.weight"):
        package_for_llamacpp(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.NFKD()), "it changes text by NFKD first"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "words are not split"),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )), "its pattern of words has no name there"),
        (lambda t: setattr(t.model, "ignore_merges", True), "whole words go before merges is fix"),
    ],
)  # fmt: skip
def test_tokenizers_of_another_kind(change, sentence):
    tokenizer = make_byte_tokenizer(None)
    backend = tokenizer.backend_tokenizer
    change(backend)
    with pytest.raises(ArtifactError, match=sentence):
        build_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), rows=ROWS)

"""Real servers, each in an environment of its own: `python3 tools/dev.py test --servers`."""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lpdeploy.models.compact import compact
from lpdeploy.servers.gguf_vocab import _SPLITS
from lpdeploy.servers.package import package
from tests.helpers import ROOT
from tests.models.families import choose_kept, make_run
from tests.servers.models import (
    DEMO,
    PROMPT,
    TOKENS,
    copy_demo_tokenizer,
    generate,
    make_demo_run,
    make_family,
)
from tests.servers.serving import complete, serve
from tests.servers.test_llamacpp import make_sentencepiece_tokenizer

pytestmark = pytest.mark.servers

ENVIRONMENTS = ROOT / ".venv-servers"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
MIXED = [
    "once upon a time", "there's 12345 apples;  and  \n\n she said: 'hello world!' ",
    "a\n b  c   d", "it's i'll 7 77 777 7777 -- ...!?", "x=y+1; z(3)",
]  # fmt: skip
SAME = f"the {TOKENS} greedy tokens of transformers"


def find_python(name):
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no {python}: python3 tools/dev.py test --servers makes it")
    return python


def make_pruned(folder, family, *, keep, channels, **config):
    base = make_family(folder / "base", family, **config)
    run = make_run(folder / "run", base, choose_kept(base, heads=keep, channels=channels))
    compact(run)
    copy_demo_tokenizer(run / "model")
    return run / "model"


# Shape -> what makes it in a folder. What is not the demo has random weights.
SHAPES = {
    "demo, 8 heads of 16": lambda _: DEMO,
    "demo pruned to 5 heads of 16 at hidden 128": lambda folder: (
        make_demo_run(folder / "run") / "model"
    ),
    "llama, grouped heads, pruned": lambda folder: make_pruned(
        folder, "llama-gqa", keep=3, channels=20
    ),
    "llama with biases, pruned": lambda folder: make_pruned(
        folder, "llama-bias", keep=2, channels=32
    ),
    "llama, rotary positions of Llama 3": lambda folder: make_family(
        folder / "model", "llama-gqa", rope_parameters=LLAMA3
    ),
    "qwen2, pruned to 6 heads of 4 at hidden 32": lambda folder: make_pruned(
        folder, "qwen2", keep=3, channels=32
    ),
    "qwen3, grouped heads, pruned": lambda folder: make_pruned(
        folder, "qwen3", keep=3, channels=32, attention_bias=False
    ),
}


def run_llama(file, ids, *, tokens=TOKENS, texts=()):
    worker = Path(__file__).parent / "llama_worker.py"
    words = [find_python("llama-cpp-python"), worker, file, ids, tokens, list(texts)]
    words = [json.dumps(word) if isinstance(word, list) else str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_llamacpp_gives_the_tokens_of_transformers(tmp_path, record, shape):
    find_python("llama-cpp-python")
    model = SHAPES[shape](tmp_path)
    result = package(str(model), kind="llamacpp", output=tmp_path / "out").to_json()
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    found = run_llama(tmp_path / "out" / result["file"], ids, texts=[PROMPT])
    assert found["texts"] == [ids]
    expected = generate(model, ids)
    assert found["tokens"] == expected
    assert len(set(expected)) > 2
    record(
        server="llama.cpp", version=f"llama-cpp-python {found['version']}", shape=shape, result=SAME
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_llamacpp_loads_each_type(tmp_path, record, precision):
    find_python("llama-cpp-python")
    run = make_demo_run(tmp_path / "run")
    result = package(
        str(run), kind="llamacpp", output=tmp_path / "out", precision=precision
    ).to_json()
    ids = AutoTokenizer.from_pretrained(run / "model")(PROMPT).input_ids
    found = run_llama(tmp_path / "out" / result["file"], ids)
    # Rounded weights may turn a close choice later on; the first is not close.
    assert found["tokens"][0] == generate(run / "model", ids, tokens=1)[0]
    version = f"llama-cpp-python {found['version']}"
    shape = f"demo pruned to 5 heads of 16, {precision}"
    record(server="llama.cpp", version=version, shape=shape, result="loads, the first greedy token")


def package_with_llama(model, output, precision):
    """Run the command in the Python that has llama-cpp-python, with the libraries of this one."""
    python = find_python("llama-cpp-python")
    words = [python, "-m", "lpdeploy", "package", model, "--target", "llamacpp", "--output", output,
             "--precision", precision, "--json"]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


# Its 128 columns are no multiple of 256, and its 96 none either: no K-quant takes them.
@pytest.mark.parametrize(
    ("precision", "types"),
    [("q4_k_m", {"Q5_0", "Q8_0", "F16"}), ("q6_k", {"Q8_0", "F16"}), ("q4_0", {"Q4_0", "F16"}),
     ("iq4_nl", {"IQ4_NL", "F16"})],
)  # fmt: skip
def test_llamacpp_makes_and_loads_small_types(tmp_path, record, precision, types):
    run = make_demo_run(tmp_path / "run")
    result, said = package_with_llama(run, tmp_path / "out", precision)
    assert types <= result["types"].keys()
    assert sum(result["types"].values()) == pytest.approx(1)
    assert "llama_model_quantize" not in said
    if "_k" in precision:
        assert "100.0% lie in rows of no multiple of 256" in said
        assert "Prune with --round-to 256" in said
    ids = AutoTokenizer.from_pretrained(run / "model")(PROMPT).input_ids
    found = run_llama(tmp_path / "out" / result["file"], ids)
    assert found["tokens"][0] == generate(run / "model", ids, tokens=1)[0]
    record(
        server="llama.cpp",
        version=f"llama-cpp-python {found['version']}",
        shape=f"demo pruned to 5 heads of 16, {precision}",
        result="loads, the first greedy token",
    )


def test_rows_of_256_are_k_quants(tmp_path):
    model = make_family(tmp_path / "model", "llama-gqa", hidden_size=256, intermediate_size=512)
    result, said = package_with_llama(model, tmp_path / "out", "q4_k_m")
    assert {name for name in result["types"] if name.endswith("_K")} == {"Q4_K", "Q6_K"}
    assert "in rows of no multiple" in said  # those of o_proj, which follow the heads
    assert run_llama(tmp_path / "out" / result["file"], [1, 5], tokens=4)["tokens"]


def make_tokenizer_like(name):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.normalizer = None
    pattern = next(pattern for pattern, split in _SPLITS.items() if split == name)
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    tokenizer.model.ignore_merges = name == "llama-bpe"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2", "sentencepiece"])
def test_llamacpp_splits_text_as_transformers_does(tmp_path, record, name):
    find_python("llama-cpp-python")
    model = make_family(tmp_path / "model", "llama-gqa")
    if name == "sentencepiece":
        tokenizer, texts = make_sentencepiece_tokenizer(model), ["up on once", "no one: é\n up"]
    else:
        tokenizer, texts = make_tokenizer_like(name), MIXED
        tokenizer.save_pretrained(model)
    result = package(str(model), kind="llamacpp", output=tmp_path / "out").to_json()
    found = run_llama(tmp_path / "out" / result["file"], [1, 5], tokens=1, texts=texts)
    bos = [1] if name == "sentencepiece" else []  # its template adds none; the worker asks for one
    assert found["texts"] == [bos + tokenizer(text).input_ids for text in texts]
    version = f"llama-cpp-python {found['version']}"
    record(
        server="llama.cpp", version=version, shape=f"tokenizer, {name}", result="the same tokens"
    )


# On a CPU vLLM has attention for heads of 32 numbers and more, which the demo's are not.
_WIDE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
VLLM_SHAPES = {
    "llama pruned to 3 heads of 32 at hidden 128": ("llama-mha", {"heads": 4}, 3),
    "llama, grouped heads, pruned": ("llama-gqa", {"heads": 8, "kv_heads": 4}, 3),
}


@pytest.mark.parametrize("shape", VLLM_SHAPES)
def test_vllm_gives_the_tokens_of_transformers(tmp_path, record, shape):
    python = find_python("vllm")
    family, config, keep = VLLM_SHAPES[shape]
    model = make_pruned(tmp_path, family, keep=keep, channels=96, **_WIDE, **config)
    result = package(str(model), kind="vllm", output=tmp_path / "out").to_json()
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    answer = ask_vllm(python, tmp_path, result["command"], tokens=TOKENS)
    assert answer["choices"][0]["prompt_token_ids"] == ids
    expected = generate(model, ids)
    assert answer["choices"][0]["token_ids"] == expected
    assert len(set(expected)) > 2
    record(server="vllm", version=find_version(python), shape=shape, result=SAME)


def ask_vllm(python, folder, command, *, tokens):
    words = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "out",
        *command.split()[3:], "--host", "127.0.0.1", "--port", "PORT", "--enforce-eager",
    ]  # fmt: skip
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": ""}
    with serve(words, folder / "log.txt", seconds=420, env=variables) as address:
        return complete(
            address, model=folder / "out", prompt=PROMPT, tokens=tokens, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip


def find_version(python):
    words = [python, "-c", "import vllm; print(vllm.__version__)"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]


def compute_in_fp8(model, folder, ids):
    """The logits with weights as they are stored in FP8, and their inputs rounded by token."""
    model = AutoModelForCausalLM.from_pretrained(model)
    stored = load_file(folder / "model.safetensors")

    def round_input(_, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / 448
        return ((inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        if f"{name}.weight_scale" in stored:
            weight = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
            module.weight = torch.nn.Parameter(weight)
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def call(python, *words):
    # -P: the folder of a worker has a `triton` of its own, which is not the library.
    done = subprocess.run(
        [python, "-P", *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compute_logits(python, folder, ids):
    worker = Path(__file__).parent / "logits_worker.py"
    return torch.tensor(json.loads(call(python, worker, folder, json.dumps(ids)).splitlines()[-1]))


def test_compressed_tensors_reads_fp8(tmp_path):
    python = find_python("vllm")
    model = make_pruned(tmp_path, "llama-gqa", keep=3, channels=96, **_WIDE, heads=8, kv_heads=4)
    package(str(model), kind="vllm", output=tmp_path / "out", precision="fp8")
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    found = compute_logits(python, tmp_path / "out", ids)
    expected = compute_in_fp8(model, tmp_path / "out", ids)
    plain = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0]
    error = (found - expected).abs().max()
    # A sum in another order may round an input to the next number of FP8, a sixteenth of it away,
    # which moves a logit by less than a tenth of what FP8 moves it by.
    assert error < 0.1 * (plain - expected).abs().max()


def test_vllm_answers_in_fp8(tmp_path, record):
    python = find_python("vllm")
    model = make_pruned(tmp_path, "llama-gqa", keep=3, channels=96, **_WIDE, heads=8, kv_heads=4)
    result = package(str(model), kind="vllm", output=tmp_path / "out", precision="fp8").to_json()
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    answer = ask_vllm(python, tmp_path, result["command"], tokens=4)
    logits = compute_in_fp8(model, tmp_path / "out", ids)[-1]
    # A sum in another order may turn a close choice; the three likeliest are apart.
    assert answer["choices"][0]["token_ids"][0] in logits.topk(3).indices.tolist()
    record(
        server="vllm",
        version=find_version(python),
        shape="llama, grouped heads, pruned, fp8",
        result="loads, a likely first token",
    )


def round_with_llm_compressor(model, folder, method):
    """Run the example on a model in bfloat16: what it writes of float32 does not load again."""
    python = find_python("llm-compressor")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    text = [DEMO.parent / "train.txt"] if method == "gptq" else []
    call(python, ROOT / "examples/quantize_for_vllm.py", model, folder, method, *text)
    version = call(python, "-c", "import llmcompressor; print(llmcompressor.__version__)")
    return python, f"llm-compressor {version.split()[-1]}"


@pytest.mark.parametrize("method", ["gptq", "nvfp4"])
def test_what_llm_compressor_rounds_computes_about_the_same(tmp_path, record, method):
    model = shutil.copytree(DEMO, tmp_path / "model")
    python, version = round_with_llm_compressor(model, tmp_path / "out", method)
    text = (DEMO.parent / "valid.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(DEMO)(text).input_ids[:256]
    rounded = compute_logits(python, tmp_path / "out", ids).log_softmax(-1)
    dense = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    with torch.no_grad():
        whole = dense(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert float((rounded.argmax(-1) == whole.argmax(-1)).float().mean()) > 0.9
    losses = [
        -scores[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)) for scores in (rounded, whole)
    ]
    assert abs(float(losses[0].mean() - losses[1].mean())) < 0.1
    record(
        server="compressed-tensors",
        version=version,
        shape=f"demo, {method} of 4 bits",
        result="about the loss of fp32",
    )


def test_vllm_answers_with_what_llm_compressor_rounded(tmp_path, record):
    vllm = find_python("vllm")
    shape = {**_WIDE, "heads": 8, "kv_heads": 4}
    model = make_pruned(tmp_path, "llama-gqa", keep=2, channels=128, **shape)
    python, version = round_with_llm_compressor(model, tmp_path / "out", "gptq")
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    rounded = compute_logits(python, tmp_path / "out", ids)
    command = "vllm serve out --dtype bfloat16 --max-model-len 64"
    answer = ask_vllm(vllm, tmp_path, command, tokens=4)
    assert answer["choices"][0]["token_ids"][0] in rounded[-1].topk(3).indices.tolist()
    record(
        server="vllm",
        version=f"{find_version(vllm)}, {version}",
        shape="llama, grouped heads, pruned, gptq of 4 bits",
        result="loads, a likely first token",
    )

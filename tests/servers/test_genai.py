"""The folder of ONNX Runtime GenAI: the tokens of transformers, and exports taken over."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from lpdeploy.engines.export import export
from lpdeploy.servers.package import package
from tests.servers.models import DEMO, PROMPT, TOKENS, generate, make_demo_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruned run whose five heads do not divide the hidden size, with its export."""
    run = make_demo_run(tmp_path_factory.mktemp("genai") / "run")
    export(str(run), engine="ort")
    return run


def package_for_genai(target, output, **options):
    return package(str(target), kind="genai", output=output, **options).to_json()


def continue_by_genai(folder, ids):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(ids) + TOKENS
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(ids) :]


def test_the_tokens_of_transformers(run, tmp_path):
    result = package_for_genai(run, tmp_path / "out", max_seq_len=128)
    assert result["reused"] is None  # of another length than the export
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for model in (run / "model", DEMO):
        folder = tmp_path / f"{model.name}-genai"
        package_for_genai(model, folder)
        ids = tokenizer(PROMPT).input_ids
        assert continue_by_genai(folder, ids) == generate(model, ids)


def test_the_command_of_the_readme(run, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    result = package_for_genai(run, tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert result["command"] in readme
    script = tmp_path / "out" / "generate.py"
    done = subprocess.run(
        [sys.executable, script, PROMPT, str(TOKENS)], capture_output=True, text=True, check=True
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(PROMPT).input_ids
    expected = tokenizer.decode(ids + generate(run / "model", ids), skip_special_tokens=True)
    assert done.stdout.strip() == expected.strip()


def test_an_export_of_this_checkpoint_is_taken_over(run, tmp_path):
    result = package_for_genai(run, tmp_path / "out")
    assert result["reused"] == str(run / "ort")
    for name, shared in (("model.onnx.data", True), ("genai_config.json", False)):
        assert (tmp_path / "out" / name).samefile(run / "ort" / name) is shared


def test_an_export_in_another_precision_is_not(tmp_path):
    run = make_demo_run(tmp_path / "run")
    export(str(run), engine="ort")
    options = {"precision": "int8", "block_size": 16}
    result = package_for_genai(run, tmp_path / "out", **options)
    assert result["reused"] is None
    contract = json.loads((tmp_path / "out" / "io.json").read_text())
    assert contract["precision"] == options["precision"]
    assert contract["block_size"] == options["block_size"]


def test_a_model_with_a_chat_template_is_asked_through_it(tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ bos_token + message['role'] + ' said ' "
        "+ message['content'] + '. ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'then ' }}{% endif %}"
    )
    package_for_genai(model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "generate.py", "hello", str(TOKENS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    expected = tokenizer.decode(generate(model, ids), skip_special_tokens=True)
    assert done.stdout.strip() == expected.strip()
    assert "apply_chat_template" in (tmp_path / "out" / "README.md").read_text()

"""The Python API: what it loads, what it takes, and that it does what the commands do."""

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lpdeploy
from lpdeploy.cli.main import main
from lpdeploy.errors import ArtifactError, DataError, LpdeployError, ParityError

CONFIG = lpdeploy.PruneConfig(
    steps=4, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=4, device="cpu",
    calibration_samples=2, lr=1e-2,
)  # fmt: skip
WORDS = [
    "--steps", "4", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--device", "cpu", "--calibration-samples", "2",
    "--lr", "1e-2",
]  # fmt: skip


def load_results(run):
    return {name: load_file(run / name) for name in
            ("adapter/adapter_model.safetensors", "importance.safetensors")}  # fmt: skip


def assert_same(left, right):
    for name, tensors in load_results(left).items():
        others = load_results(right)[name]
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name


def test_importing_it_loads_nothing_heavy():
    code = (
        "import sys, lpdeploy; lpdeploy.PruneConfig; lpdeploy.Run; lpdeploy.prune\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there():
    assert set(lpdeploy.__all__) <= set(dir(lpdeploy))
    for name in lpdeploy.__all__:
        assert getattr(lpdeploy, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lpdeploy.nothing


def test_runs_of_one_process_know_nothing_of_each_other(base, data, tmp_path):
    """Neither a precision nor a seed of one run is left for the next."""
    given = {"data": str(data), "config": CONFIG}
    first = lpdeploy.prune(str(base), output=tmp_path / "first", **given)
    half = dataclasses.replace(CONFIG, dtype="bf16", seed=1)
    lpdeploy.prune(str(base), data=str(data), output=tmp_path / "half", config=half)
    again = lpdeploy.prune(str(base), output=tmp_path / "again", **given)
    assert_same(first.path, again.path)


def test_it_does_what_the_command_does(base, data, tmp_path, capsys):
    run = lpdeploy.prune(str(base), data=str(data), output=tmp_path / "api", config=CONFIG)
    assert capsys.readouterr() == ("", "")  # a library does not print
    words = ["prune", base, "--data", data, "--output", tmp_path / "cli", *WORDS]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert isinstance(run, lpdeploy.Run)
    assert_same(tmp_path / "api", tmp_path / "cli")


@pytest.mark.slow
def test_objects_are_as_good_as_paths(base, data, tmp_path):
    by_path = lpdeploy.prune(base, data=data, output=tmp_path / "paths", config=CONFIG)
    rows = [{"text": text} for text in data.read_text().split("\n<|endoftext|>\n")]
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, source in (("dataset", Dataset.from_list(rows)), ("list", rows)):
        run = lpdeploy.prune(
            model, data=source, output=tmp_path / name, config=CONFIG, tokenizer=tokenizer
        )
        assert_same(by_path.path, run.path)
        run.compact()
        assert run.verify(engine="torch").ok
    again = lpdeploy.prune(
        model, rows, tmp_path / "list", config=CONFIG, tokenizer=tokenizer, overwrite=True
    )
    assert again.base.is_dir()
    assert not again.model.exists()
    replaced = lpdeploy.prune(base, data, tmp_path / "list", config=CONFIG, overwrite=True)
    assert not replaced.base.exists()
    with pytest.raises(ArtifactError, match="already holds a run"):
        lpdeploy.prune(model, rows, tmp_path / "list", config=CONFIG, tokenizer=tokenizer)


def test_a_model_in_memory_needs_a_tokenizer_and_no_adapter(base, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="`tokenizer`"):
        lpdeploy.prune(model, data=data, output=tmp_path / "run", config=CONFIG)
    model.peft_config = {}
    with pytest.raises(ValueError, match="adapter"):
        lpdeploy.prune(model, data=data, output=tmp_path / "run", config=CONFIG, tokenizer=object())
    assert not (tmp_path / "run").exists()


def test_a_mistake_beside_a_model_in_memory_costs_no_older_run(base, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = lpdeploy.prune(model, data, tmp_path / "run", config=CONFIG, tokenizer=tokenizer)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    given = {"config": CONFIG, "tokenizer": tokenizer, "overwrite": True}
    with pytest.raises(DataError, match="called 'nothing.txt'"):
        lpdeploy.prune(model, data, run, valid="nothing.txt", **given)
    with pytest.raises(LpdeployError, match="no tracker 'excel'"):
        lpdeploy.prune(model, data, run, report_to="excel", **given)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_whole_line(tmp_path, data):
    from tests.helpers import make_tiny_model

    base = make_tiny_model(tmp_path / "base", head_dim=16, num_hidden_layers=1)
    run = lpdeploy.prune(base, data=data, output=tmp_path / "run", config=CONFIG)
    assert run.compact().record.architecture == "LlamaForCausalLM"
    assert run.export("ort").contract.engine == "ort"
    assert run.verify(engine="ort").ok
    with pytest.raises(ParityError, match="differ by"):
        run.verify(engine="ort", atol=0.0)
    run.evaluate(perplexity=[str(data)], seq_len=16)
    run.bench(["torch"], tokens=4, repeats=1)
    texts = [
        run.generate(["w1 w2", "w3"], engine=name, max_new_tokens=5) for name in ("torch", "ort")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])
    run.package("vllm", tmp_path / "served")
    run.push("owner/name")
    assert run.report() == run.page
    assert run.page.is_file()


def test_it_logs(base, data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lpdeploy"):
        lpdeploy.prune(base, data=data, output=tmp_path / "run", config=CONFIG)
    assert any("pruning events: " in message for message in caplog.messages)

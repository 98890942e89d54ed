"""Nothing that comes with a checkpoint runs unless the user says so."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

import lpdeploy
from lpdeploy.cli.main import main
from lpdeploy.environment import is_remote_code_trusted
from lpdeploy.errors import ArtifactError
from lpdeploy.models.loading import load_config, load_model, load_tokenizer
from tests.helpers import make_text, make_tiny_model

PRUNE = ["--steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
         "--prune-every", "1", "--round-to", "4", "--device", "cpu",
         "--calibration-samples", "2"]  # fmt: skip


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


@pytest.fixture
def hostile(tmp_path):
    """A model with code in every place that transformers knows, which leaves a mark."""
    base = make_tiny_model(tmp_path / "base", heads=4, kv_heads=2)
    (base / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).write_text('')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    own = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit_json(base / "tokenizer_config.json", auto_map=own)
    edit_json(
        base / "config.json",
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        _attn_implementation="stranger/kernel",
        attn_implementation="stranger/kernel",
    )
    return base


def run_commands(base, data, folder, *extra):
    """Run every command that reads a model, with somebody who says yes to everything."""
    run = folder / "run"
    commands = [
        ["prune", base, "--data", data, "--output", run, *PRUNE],
        ["compact", run],
        ["export", run, "--engine", "ort"],
        ["verify", run, "--engine", "ort"],
        ["eval", run, "--perplexity", data, "--seq-len", "16"],
        ["bench", "latency", run, "--tokens", "4", "--repeats", "1"],
        ["package", run, "--target", "vllm", "--output", folder / "vllm"],
        ["check", base],
        ["report", run],
        ["push", run, "--repo", "me/model"],
    ]
    for command in commands:
        yield CliRunner().invoke(main, [*map(str, command), *extra], input="y\ny\n")


@pytest.mark.slow
def test_no_command_runs_code_of_a_checkpoint(hostile, tmp_path):
    data = make_text(tmp_path / "text.txt")
    for result in run_commands(hostile, data, tmp_path):
        assert isinstance(result.exception, SystemExit | None), result.exc_info
        assert not (tmp_path / "mark").exists(), result.output
        assert "[y/N]" not in result.output  # transformers asks like this


def test_a_model_is_loaded_by_our_classes_and_kernels(hostile, tmp_path):
    config = load_config(hostile)
    assert load_model(hostile).config._attn_implementation == config._attn_implementation == "sdpa"
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_that_is_code_is_refused(hostile, tmp_path):
    edit_json(hostile / "tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(ArtifactError, match="is code of its own.* `trust_remote_code=True`"):
        load_tokenizer(hostile, load_config(hostile))
    assert not (tmp_path / "mark").exists()


def test_one_that_can_be_loaded_without_its_code_says_so(hostile, tmp_path, told):
    load_tokenizer(hostile, load_config(hostile))
    assert "names code of its own, which was not run" in told[-1]
    assert not (tmp_path / "mark").exists()


def test_trust_lasts_as_long_as_it_is_given(hostile, tmp_path):
    code = "from lpdeploy.environment import is_remote_code_trusted as t; print(t())"
    with lpdeploy.trust_remote_code():
        assert is_remote_code_trusted()
        load_tokenizer(hostile, load_config(hostile))
        asked = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    assert (tmp_path / "mark").exists()
    assert asked.stdout == "True\n"  # in processes that were started meanwhile too
    assert not is_remote_code_trusted()


def test_only_the_command_line_gives_trust(hostile, tmp_path):
    data = make_text(tmp_path / "text.txt")
    words = ["prune", str(hostile), "--data", str(data), "--output", str(tmp_path / "run"), *PRUNE]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune:\n  trust_remote_code: true\n")
    refused = CliRunner().invoke(main, [*words, "--recipe", str(recipe)])
    assert refused.exit_code == 2
    assert "trust_remote_code" in refused.output
    assert not (tmp_path / "mark").exists()
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert CliRunner().invoke(main, [*words, "--trust-remote-code"]).exit_code == 0
    assert (tmp_path / "mark").exists()
    assert not is_remote_code_trusted()

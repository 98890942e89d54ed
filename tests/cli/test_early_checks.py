"""What is not there is told before anything heavy is imported."""

import os
import subprocess
import sys

import pytest

from tests.helpers import make_tiny_model

MISSING = (
    "compact ./nothing",
    "export ./nothing --engine ort",
    "verify ./nothing",
    "bench latency ./nothing",
    "eval ./nothing --perplexity text.txt",
    "eval model --perplexity ./nothing",
    "eval nothing --perplexity text.txt",
    "generate ./nothing hello",
    "chat ./nothing",
    "serve ./nothing",
    "report ./nothing",
    "push ./nothing --repo owner/name",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    make_tiny_model(folder / "model", num_hidden_layers=1)
    return folder


def test_a_missing_path_is_told_before_torch_is_imported(folder):
    """In one process, as each command leaves what it imported."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from lpdeploy.cli.main import main\n"
        f"for words in {MISSING}:\n"
        "    result = CliRunner().invoke(main, words.split())\n"
        "    assert result.exit_code in (1, 2), (words, result.output)\n"
        "    assert 'nothing' in result.stderr, (words, result.stderr)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

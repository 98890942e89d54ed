"""What a user sees on the terminal is ours: no library speaks before or between our lines."""

import os
import subprocess
import sys

import pytest

from tests.helpers import make_text, make_tiny_model

# Words of what libraries say when they are imported; no line of ours has one of them.
FOREIGN = ("kernels", "bitsandbytes", "Warning", "warn(", "Failed to load")
MEASURE = ("--tokens", "8", "--repeats", "1", "--device", "cpu")
TRAIN = ("--steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
         "--round-to", "4", "--device", "cpu")  # fmt: skip
COMMANDS = (
    ("prune", "base", "--data", "text.txt", "--output", "run", "--ratio", "0.5", *TRAIN),
    ("compact", "run"),
    ("compact", "run", "--keep-adapter"),
    ("verify", "run", "--engine", "torch"),
    ("bench", "latency", "run", "--engine", "torch", *MEASURE),  # in processes of their own
)


@pytest.mark.slow
def test_no_library_speaks_to_the_user(tmp_path):
    make_tiny_model(tmp_path / "base", num_hidden_layers=1)
    make_text(tmp_path / "text.txt")
    code = (
        "from lpdeploy.cli.main import main\n"
        f"for words in {COMMANDS}: main(words, standalone_mode=False)"
    )
    # As a user's shell: no variable is set that would silence anything.
    quiet = ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "Loading 'base'."
    assert lines[1].startswith("memory: about"), lines[1]
    assert not [line for line in lines for word in FOREIGN if word in line]

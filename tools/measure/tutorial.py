"""Measure how long the commands of the tutorial take, on a model that lies on this machine.

    python -m tools.measure.tutorial SmolLM2-135M-Instruct --output docs/measurements/tutorial.json

The commands run one after the other in a folder of their own, as they stand in docs/tutorial.md;
only the name of the model is replaced.
"""

import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.doc_commands import list_blocks, list_commands
from tools.measure.common import build_parser, report, save_measurement

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    """Read the command line, run the commands, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    options = parser.parse_args()
    model, output = options.model.resolve(), options.output.resolve()
    commands = list(list_commands(DOCUMENT))
    stages = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for language, block in list_blocks(DOCUMENT):
            if language == "python":
                subprocess.run([sys.executable, "-c", block], check=True)
        for number, words in enumerate(commands, start=1):
            own = [str(model) if word == HUB_NAME else word for word in words]
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "lpdeploy", *own], capture_output=True, check=False
            )
            seconds = time.perf_counter() - start
            # doctor fails where this machine lacks something that the tutorial does not need.
            if done.returncode and words[0] != "doctor":
                raise SystemExit(f"lpdeploy {shlex.join(words)}\n{done.stderr.decode()}")
            stages.append({"command": shlex.join(["lpdeploy", *words]), "seconds": seconds})
            report(number, len(commands))
    save_measurement(output, {"model": model.name, "stages": stages})


if __name__ == "__main__":
    main()

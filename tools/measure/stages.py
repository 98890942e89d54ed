"""Take a model of LLaMA-7B's shape through every stage: seconds, peak memory and bytes of each.

    python -m tools.measure.stages --output docs/measurements/stages-7b-cpu.json [--layers 2]

The weights are random and in bf16, 13.5 GB of them, so the disk needs about 40 GB. It says what
fits into a machine, not how good a model is. Peak memory is that of the largest process of a stage.
"""

import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import LlamaConfig

from lpdeploy.benchmark.random_models import save_random_model
from lpdeploy.machine import read_process_bytes
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import count_parameters
from tools.measure.common import build_parser, save_measurement, save_word_tokenizer

WORDS = [f"word{number}" for number in range(1000)]
TRAINING = (
    "--steps", "2", "--batch-size", "1", "--micro-batch-size", "1", "--seq-len", "64",
    "--calibration-samples", "1", "--prune-every", "1", "--dtype", "bf16",
    "--checkpoint-every", "0",
)  # fmt: skip


def list_stages(folder: Path) -> dict[str, list[str | Path]]:
    """List the commands of the line, in their order."""
    base, run, text = folder / "base", folder / "run", folder / "text.txt"
    return {
        "check": ["check", base, "--ratio", "0.5"],
        "prune": ["prune", base, "--data", text, "--output", run, "--ratio", "0.5", *TRAINING],
        "compact": ["compact", run],
        "export ort int4": ["export", run, "--engine", "ort", "--precision", "int4"],
        "package genai int4": [
            "package",
            run,
            "--target",
            "genai",
            "--precision",
            "int4",
            "--output",
            folder / "genai",
        ],
        "export onnx fp16": ["export", run, "--engine", "onnx", "--precision", "fp16"],
        "package vllm": ["package", run, "--target", "vllm", "--output", folder / "vllm"],
    }


def make_base(folder: Path, *, layers: int) -> Path:
    """Write the model, with a tokenizer of a word a token, and a text for it."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join([" ".join(WORDS)] * 8))
    base = save_random_model(config, folder / "base", dtype="bf16")
    save_word_tokenizer(base, WORDS)
    return base


def measure_stage(words: list[str | Path], folder: Path) -> dict[str, float]:
    """Run a command; return its seconds, its peak memory, and the bytes that it left on disk."""
    log, before = folder / "log.txt", count_bytes(folder)
    command = [sys.executable, "-m", "lpdeploy", *map(str, words)]
    print("+ lpdeploy", *words, file=sys.stderr, flush=True)
    start = time.perf_counter()
    with log.open("wb") as stream, psutil.Popen(command, stdout=stream, stderr=stream) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, read_peak(process))
            time.sleep(0.05)
    seconds, said = time.perf_counter() - start, log.read_text()
    log.unlink()
    if process.returncode:
        sys.exit(f"{words[0]} failed: {said[-2000:]}")
    return {"seconds": seconds, "peak_bytes": peak, "bytes": count_bytes(folder) - before}


def read_peak(process: psutil.Process) -> int:
    """Return the most memory that a process or one of its children has held so far, in bytes.

    The kernel keeps it for each process, so nothing between two readings is missed.
    """
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return max(read_process_bytes(each.pid, peak=True) or 0 for each in family)


def count_bytes(folder: Path) -> int:
    """Add up the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Read the command line, make the model, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpdeploy-measure-") as scratch:
        folder = Path(scratch)
        base = make_base(folder, layers=options.layers)
        document = {
            "parameters": count_parameters(load_config(base)),
            "layers": options.layers,
            "bytes": count_bytes(base),
            "stages": {
                name: measure_stage(words, folder) for name, words in list_stages(folder).items()
            },
        }
    save_measurement(options.output, document)


if __name__ == "__main__":
    main()

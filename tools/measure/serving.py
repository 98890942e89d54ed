"""Compare Triton under load with the same runner called in one process with the same batch.

    python -m tools.measure.serving --output docs/measurements/triton-cpu.json

The model is a LLaMA of 109 M parameters with random weights (12 layers, hidden size 768, tied
embeddings). Each client asks for one answer after another over a gRPC stream. Rounds of the two
kinds take turns. Compare their ratio: other work on the machine slows both down.
"""

import argparse
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpdeploy.engines.generation import generate
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.servers.package import package
from tools.measure.common import build_parser, save_measurement, save_word_tokenizer
from tools.measure.engines import SHAPES, VOCAB, save_models
from tools.servers.triton_server import VENV, VERSION, setup

NAME = "llama"
_HTTP, _GRPC = 18100, 18101
SERVERS = Path(__file__).parent.parent / "servers"
_SETTLE = 5  # seconds at the start of a round that do not count: clients join one by one


def make_prompts(count: int, tokens: int) -> list[list[int]]:
    """Draw prompts."""
    rng = random.Random(0)
    return [[rng.randrange(VOCAB) for _ in range(tokens)] for _ in range(count)]


def start_server(repository: Path, log: Path, *, seconds: int) -> subprocess.Popen[bytes]:
    """Start Triton and wait until it is ready."""
    words = ["serve", repository, "--http-port", _HTTP, "--grpc-port", _GRPC]
    words += ["--stop-after", seconds]
    script = SERVERS / "triton_server.py"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, script, *map(str, words)], stdout=file, stderr=subprocess.STDOUT
        )
    while True:
        if process.poll() is not None:
            sys.exit(f"Triton ended: {log.read_text(encoding='utf-8')[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{_HTTP}/v2/health/ready"):
                return process
        except OSError:
            time.sleep(0.2)


def load_server(questions: Path, scratch: Path, *, clients: int, seconds: float) -> list[Any]:
    """Let clients ask for some time; return what each was told."""
    told = scratch / "told.json"
    words = [VENV / "bin" / "python", SERVERS / "triton_load.py"]
    words += ["--http", f"127.0.0.1:{_HTTP}", "--grpc", f"127.0.0.1:{_GRPC}", "--model", NAME]
    words += ["--questions", questions, "--transports", "stream", "--clients", clients]
    words += ["--seconds", seconds, "--output", told]
    subprocess.run([*map(str, words)], check=True)
    records: list[Any] = json.loads(told.read_text(encoding="utf-8"))
    if wrong := [record for record in records if not record["right"]]:
        sys.exit(f"{len(wrong)} answers were not what they should be, such as {wrong[0]}")
    return records


def compute_rate(records: Sequence[dict[str, Any]], *, seconds: float) -> float:
    """Return tokens a second, of the time in which every client was asking."""
    arrivals = [record["begin"] + time for record in records for time in record["times"]]
    begin = min(record["begin"] for record in records)
    counted = [when for when in arrivals if begin + _SETTLE < when <= begin + seconds]
    return len(counted) / (seconds - _SETTLE)


def describe_times(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the tail, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{cut}_ms": cuts[cut - 1] * 1000 for cut in (50, 95, 99)}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure both, in turns."""
    model = save_models(scratch / "models")[options.ratio]
    save_word_tokenizer(model, [f"w{index}" for index in range(VOCAB)])
    repository = scratch / "repository"
    package(
        str(model), kind="triton", output=repository, name=NAME, max_batch=options.clients,
        max_seq_len=options.prompt + options.tokens, precision=options.precision,
    )  # fmt: skip
    runner = load_ort_runner(repository / f"{NAME}_engine" / "1")
    prompts = make_prompts(options.clients, options.prompt)

    def run_alone() -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        rows = generate(runner, prompts, max_new_tokens=options.tokens, eos_ids=set())
        return options.clients * options.tokens / (time.perf_counter() - begin), rows

    _, expected = run_alone()  # and warm
    questions = scratch / "questions.json"
    asked = [
        {
            "inputs": {
                "text_input": " ".join(f"w{token}" for token in prompt),
                "max_tokens": options.tokens,
                "ignore_eos": True,
            },
            "tokens": tokens,
        }
        for prompt, tokens in zip(prompts, expected, strict=True)
    ]
    questions.write_text(json.dumps(asked), encoding="utf-8")
    rounds, times = [], {"first": [], "next": []}
    lasting = int(options.rounds * (options.seconds + 120)) + 300
    process = start_server(repository, scratch / "log.txt", seconds=lasting)
    try:
        for _ in range(options.rounds):
            before = [run_alone()[0] for _ in range(options.alone)]
            records = load_server(
                questions, scratch, clients=options.clients, seconds=options.seconds
            )
            served = compute_rate(records, seconds=options.seconds)
            # Before and after, since the speed of a shared machine drifts.
            alone = statistics.median(before + [run_alone()[0] for _ in range(options.alone)])
            print(f"alone {alone:.0f}, served {served:.0f} tokens/s", flush=True)
            rounds.append({"alone": alone, "served": served, "relative": served / alone})
            for record in records:
                arrived = record["times"]
                times["first"].append(arrived[0])
                times["next"] += [later - earlier for earlier, later in itertools.pairwise(arrived)]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return {
        "rounds": rounds,
        "relative": statistics.median(each["relative"] for each in rounds),
        "first_token": describe_times(times["first"]),
        "next_token": describe_times(times["next"]),
        "answers": len(times["first"]),
    }


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--ratio", type=float, choices=sorted(SHAPES), default=0.0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer")
    parser.add_argument("--seconds", type=float, default=20, help="length of a round")
    parser.add_argument(
        "--alone", type=int, default=2, help="batches in one process before and after a round"
    )
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    setup()
    with tempfile.TemporaryDirectory(prefix="lpdeploy-") as scratch:
        measured = measure(options, Path(scratch))
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    save_measurement(options.output, {"triton": VERSION, "options": chosen, **measured})


if __name__ == "__main__":
    main()

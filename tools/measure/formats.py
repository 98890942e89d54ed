"""Compare the number formats of one model: bytes, quality against fp32, and decode speed.

    python -m tools.measure.formats MODEL --text valid.txt --output docs/measurements/formats.json

The model is exported for ONNX Runtime in each precision, converted by GenAI's own builder, and
packaged for llama.cpp (run it where llama-cpp-python is installed). Perplexity is over the same
segments for all; "same next token" is the share of their positions where a format and fp32 in torch
find the same token most likely. Decode takes turns, format by format.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpdeploy.data.batches import build_token_stream
from lpdeploy.data.sources import load_corpus
from lpdeploy.engines.generation import generate
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.servers.package import package
from tools.measure.common import build_parser, report, save_measurement
from tools.measure.engines import build_with_genai, open_genai_model

PROMPT, DECODED, ROUNDS = 64, 64, 8


@dataclass(frozen=True)
class Format:
    """A model in one format.

    Attributes:
        name: As the table has it.
        bytes: Size of its weights and graph on disk.
        score: Returns the logits of all positions of some tokens: (T,) -> (T, vocab).
        extend: Continues tokens greedily by ``DECODED``; returns the new ones, and the seconds that
            each took after the first.
    """

    name: str
    bytes: int
    score: Callable[[list[int]], Tensor]
    extend: Callable[[list[int]], tuple[list[int], float]]


def open_runner(name: str, runner: Runner, size: int) -> Format:
    """Take a model that a runner of lpdeploy runs."""

    def score(ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids])
        return runner.forward(tokens, attention_mask=torch.ones_like(tokens)).logits[0]

    def extend(ids: list[int]) -> tuple[list[int], float]:
        times: list[float] = []
        (row,) = generate(
            runner,
            [ids],
            max_new_tokens=DECODED,
            eos_ids=set(),
            on_token=lambda *_: times.append(time.perf_counter()),
        )
        return row, (times[-1] - times[0]) / (DECODED - 1)

    return Format(name, size, score, extend)


def open_genai(name: str, folder: Path, size: int) -> Format:
    """Take a folder that GenAI runs."""
    import onnxruntime_genai as genai  # noqa: PLC0415 - optional

    model = open_genai_model(folder, threads=torch.get_num_threads())

    def start(ids: list[int], length: int) -> Any:
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        running = genai.Generator(model, settings)
        running.append_tokens(np.array([ids], dtype=np.int32))
        return running

    def score(ids: list[int]) -> Tensor:
        return torch.from_numpy(start(ids, len(ids) + 1).get_output("logits"))[0].float()

    def extend(ids: list[int]) -> tuple[list[int], float]:
        running = start(ids, len(ids) + DECODED)
        running.generate_next_token()
        begun = time.perf_counter()
        while not running.is_done():
            running.generate_next_token()
        seconds = time.perf_counter() - begun
        return running.get_sequence(0).tolist()[len(ids) :], seconds / (DECODED - 1)

    return Format(name, size, score, extend)


def open_llama(name: str, file: Path, *, length: int) -> Format:
    """Take a GGUF file that llama.cpp runs."""
    import llama_cpp  # noqa: PLC0415 - optional

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(file),
        n_ctx=max(length, PROMPT + DECODED),
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )

    def evaluate(ids: list[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(model.scores[: model.n_tokens])

    def extend(ids: list[int]) -> tuple[list[int], float]:
        row = [int(evaluate(ids)[-1].argmax())]
        begun = time.perf_counter()
        while len(row) < DECODED:
            model.eval(row[-1:])
            row.append(int(model.scores[model.n_tokens - 1].argmax()))
        return row, (time.perf_counter() - begun) / (DECODED - 1)

    return Format(name, file.stat().st_size, lambda ids: evaluate(ids).clone(), extend)


def measure_quality(each: Format, segments: Sequence[list[int]], best: list[Tensor]) -> Any:
    """Measure perplexity, and how often the most likely next token is that of the first format."""
    loss, same, count = 0.0, 0, 0
    for index, ids in enumerate(segments):
        logits = each.score(ids)[:-1].float()
        targets = torch.tensor(ids[1:])
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        chosen = logits.argmax(-1)
        if len(best) <= index:
            best.append(chosen)
        same += int((chosen == best[index]).sum())
        count += len(targets)
        report(index + 1, len(segments))
    return {"perplexity": float(np.exp(loss / count)), "same_next_token": same / count}


def measure_speed(formats: Sequence[Format], prompt: list[int]) -> dict[str, Any]:
    """Time decode in turn, and compare what is written with the first format."""
    times: dict[str, list[float]] = {each.name: [] for each in formats}
    written: dict[str, list[int]] = {}
    for turn in range(-1, ROUNDS):  # the first one warms up
        for each in formats:
            tokens, seconds = each.extend(prompt)
            written.setdefault(each.name, tokens)
            if turn >= 0:
                times[each.name].append(1000 * seconds)
        report(turn + 1, ROUNDS)
    first = written[formats[0].name]
    return {
        name: {
            "decode_ms": statistics.median(all_times),
            "decode_p10_ms": float(np.percentile(all_times, 10)),
            "decode_p90_ms": float(np.percentile(all_times, 90)),
            "same_greedy_tokens": next(
                (
                    i
                    for i, pair in enumerate(zip(first, written[name], strict=True))
                    if len({*pair}) > 1
                ),
                DECODED,
            ),
        }
        for name, all_times in times.items()
    }


def measure_bytes(folder: Path) -> int:
    """Count the bytes of weights and graph, without GenAI's second graph over the same data."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def list_formats(options: argparse.Namespace, scratch: Path) -> list[Format]:
    """Write and open the model in all formats; torch in fp32 comes first."""
    model = options.model
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    formats = [open_runner("torch fp32", load_torch_runner(model, dtype="fp32"), weights)]
    formats += [
        open_runner(folder.name, load_ort_runner(folder), measure_bytes(folder))
        for folder in options.export
    ]
    for precision in options.precisions.split(","):
        folder = scratch / precision
        export_ort(model, folder, precision=precision)
        runner = load_ort_runner(folder)
        formats.append(open_runner(f"ort {precision}", runner, measure_bytes(folder)))
    for precision in filter(None, options.genai.split(",")):
        folder = build_with_genai(model, scratch / f"genai-{precision}", precision=precision)
        formats.append(open_genai(f"genai builder {precision}", folder, measure_bytes(folder)))
    for precision in filter(None, options.llama.split(",")):
        name = f"llama.cpp {precision}"
        result = package(model, kind="llamacpp", output=scratch / name, precision=precision)
        file = scratch / name / result.details["file"]
        formats.append(open_llama(name, file, length=options.seq_len))
    return formats


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--precisions", default="fp32,int8,int4")
    parser.add_argument("--genai", default="int4", help="precisions of GenAI's own builder")
    parser.add_argument("--llama", default="", help="precisions of llama.cpp, such as q4_k_m")
    parser.add_argument(
        "--export", type=Path, action="append", default=[], help="a further ort export of the model"
    )
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--segments", type=int, default=40)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model, load_config(options.model))
    stream = build_token_stream(load_corpus(options.text, split="test"), tokenizer).tolist()
    size = options.seq_len
    segments = [stream[i * size : (i + 1) * size] for i in range(options.segments)]
    segments = [ids for ids in segments if len(ids) == size]
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        formats = list_formats(options, Path(scratch))
        best: list[Tensor] = []
        rows = {each.name: measure_quality(each, segments, best) for each in formats}
        for name, found in measure_speed(formats, stream[:PROMPT]).items():
            rows[name] |= found
        for each in formats:
            rows[each.name]["bytes"] = each.bytes
    save_measurement(
        options.output,
        {
            "model": options.model.name,
            "text": Path(options.text).name,
            "segments": len(segments),
            "seq_len": size,
            "prompt_tokens": PROMPT,
            "decoded_tokens": DECODED,
            "rounds": ROUNDS,
            "formats": rows,
        },
    )


if __name__ == "__main__":
    main()

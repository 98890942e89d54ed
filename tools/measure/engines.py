"""Time every engine on a LLaMA of random weights, dense and pruned, beside ONNX Runtime GenAI.

    python -m tools.measure.engines --output docs/measurements/engines-cpu.json

The model has 109 M parameters (12 layers, hidden size 768, tied embeddings). GenAI runs the model
that its own builder makes from the same dense checkpoint. Each engine runs in its own process, and
all of them take turns. Compare ratios rather than milliseconds: other work on the machine slows
every engine down alike.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from lpdeploy.benchmark.latency import Subject, measure_latency
from lpdeploy.benchmark.random_models import save_random_adapter, save_random_model
from lpdeploy.benchmark.stage import start_workers
from lpdeploy.benchmark.variants import TimedModel, Variant, build_variant
from lpdeploy.benchmark.worker import Loaded, Served, Timing, Worker, Workload
from lpdeploy.models.loading import load_model
from tools.measure.common import build_parser, report, save_measurement, save_word_tokenizer

VOCAB = 32000
# What --ratio 0.2 and 0.5 leave of 12 heads and 2,048 channels with --round-to 32.
SHAPES = {0.0: (12, 2048), 0.2: (10, 1632), 0.5: (6, 1024)}


def save_models(folder: Path) -> dict[float, Path]:
    """Save the dense and the pruned shapes as Mistral, whose config takes any number of heads."""
    saved = {}
    for ratio, (heads, channels) in SHAPES.items():
        config = MistralConfig(
            vocab_size=VOCAB,
            hidden_size=768,
            intermediate_size=channels,
            num_hidden_layers=12,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=64,
            max_position_embeddings=2048,
            sliding_window=None,
            tie_word_embeddings=True,
        )
        saved[ratio] = save_random_model(config, folder / f"pruned-{ratio:.0%}")
        save_random_adapter(load_model(saved[ratio]), saved[ratio] / "adapter", rank=8, alpha=16)
    return saved


def list_all(
    saved: dict[float, Path], engines: Sequence[str], *, unmerged: bool, scratch: Path
) -> list[Variant]:
    """List all shapes on all engines, and export them for the engines that need an export."""
    checkpoints = [
        TimedModel(path.name, path, ratio, adapter)
        for ratio, path in saved.items()
        for adapter in ([None, path / "adapter"] if unmerged else [None])
    ]
    return [
        build_variant(checkpoint, engine=engine, device="cpu", scratch=scratch)
        for engine in engines
        for checkpoint in checkpoints
        if ":" not in engine or checkpoint.adapter is None  # packed weights: merged only
    ]


def build_with_genai(model: Path, output: Path, *, precision: str) -> Path:
    """Convert a checkpoint with GenAI's own builder, which expects a tokenizer in the folder."""
    if not (model / "tokenizer.json").is_file():
        save_word_tokenizer(model, ["<unk>"])
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", output]
    command += ["-p", precision, "-e", "cpu", "-c", output / "cache"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return output


def open_genai_model(folder: Path, *, threads: int) -> Any:
    """Open a folder in GenAI, with a number of threads."""
    import onnxruntime_genai as genai  # noqa: PLC0415 - optional, and only timed here

    config = genai.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return genai.Model(config)


def load_genai(folders: Sequence[tuple[str, Path]], threads: int) -> Served:
    """Open folders in GenAI, inside a worker process."""
    import onnxruntime_genai as genai  # noqa: PLC0415 - optional, and only timed here

    opened = []
    for _, folder in folders:
        opened.append(open_genai_model(folder, threads=threads))

    def answer(index: int, workload: Workload, phase: str) -> Timing:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCAB, (1, workload.tokens), generator=generator).int().numpy()
        settings = genai.GeneratorParams(opened[index])
        length = workload.tokens + workload.decode + 1
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        start = time.perf_counter()
        running = genai.Generator(opened[index], settings)
        running.append_tokens(ids)
        running.get_logits()
        if phase == "prefill":
            return Timing(time.perf_counter() - start, None)
        start = time.perf_counter()
        for _ in range(workload.decode):
            running.generate_next_token()
        running.get_logits()
        return Timing((time.perf_counter() - start) / workload.decode, None)

    return [Loaded(precision, 2048, None) for precision, _ in folders], answer


@contextmanager
def start_genai(
    dense: Variant, precisions: Sequence[str], *, scratch: Path
) -> Iterator[list[Subject]]:
    """Build and open the dense model in GenAI, in each precision."""
    folders = [
        (name, build_with_genai(dense.folder, scratch / f"genai-{name}", precision=name))
        for name in precisions
    ]
    with Worker(functools.partial(load_genai, folders, torch.get_num_threads())) as worker:
        subjects = []
        for index, loaded in enumerate(worker.described):
            stored = (folders[index][1] / "model.onnx.data").stat().st_size
            variant = dataclasses.replace(
                dense, model="genai", engine="genai", bytes=stored, exported=None
            )
            subjects.append(Subject(variant, loaded, functools.partial(worker.time, index)))
        yield subjects


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--engines", default="torch,ort,ort:int4")
    parser.add_argument(
        "--genai", default="fp32,int4", help="precisions of GenAI; empty to leave it out"
    )
    parser.add_argument("--unmerged", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    workload = Workload(options.tokens, options.decode, repeats=options.repeats)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lpdeploy-engines-")))
        (folder / "scratch").mkdir()
        saved = save_models(folder)
        variants = list_all(
            saved,
            options.engines.split(","),
            unmerged=options.unmerged,
            scratch=folder / "scratch",
        )
        subjects, probe = stack.enter_context(start_workers(variants, device="cpu"))
        if options.genai:
            names = options.genai.split(",")
            subjects += stack.enter_context(start_genai(variants[0], names, scratch=folder))
        result = measure_latency(subjects, [workload], probe=probe, on_progress=report).to_json()
    # GenAI's own graph decides which bytes a token reads, so its share of the limit is unknown.
    rows = [
        {**row, "limit_share": None} if row["engine"] == "genai" else row for row in result["rows"]
    ]
    save_measurement(options.output, {**result, "rows": rows})


if __name__ == "__main__":
    main()

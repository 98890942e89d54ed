"""Measure what needs a GPU, on random weights of LLaMA-7B's and 65B's shapes that are made there.

    python -m tools.gpu.suite --output docs/measurements/gpu.json                 all parts
    python -m tools.gpu.suite table-3 decode --output docs/measurements/gpu.json  some of them
    python -m tools.gpu.suite --size tiny --device cpu --output gpu.json          the same, on a CPU

The suite needs no network and no checkpoint. Each part takes less than ten minutes and adds its
result to the JSON; a part whose engine is not installed says so there. Every engine is compared
with torch in the same precision before it is timed.
"""

import functools
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from lpdeploy.artifacts import save_json
from lpdeploy.benchmark.latency import Probe, Subject, measure_latency
from lpdeploy.benchmark.limits import LimitsProbe
from lpdeploy.benchmark.random_models import fill_random_adapter
from lpdeploy.benchmark.variants import Variant
from lpdeploy.benchmark.worker import Loaded, TimedRunner, Workload, time_work
from lpdeploy.engines import TORCH, get_engine, list_exporting
from lpdeploy.engines.export import export_folder
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import TorchRunner
from lpdeploy.engines.verify import build_inputs, collect_logits
from lpdeploy.errors import LpdeployError
from lpdeploy.machine import describe_machine
from lpdeploy.models.shapes import count_parameters
from lpdeploy.records import load_json
from tools.gpu.modes import COMPILED, GRAPH, DecodeStep, StaticModel
from tools.gpu.pruning import run_65b, run_offloading, run_pruning
from tools.measure.common import build_parser, describe_command, report

RANK = 8
ROUNDED = "rounded"


@dataclass(frozen=True)
class Size:
    """The shapes and workloads to measure: LLaMA-7B, or something small enough for a test."""

    hidden_size: int
    layers: int
    heads: int
    channels: int
    vocab_size: int
    round_to: int
    workload: Workload
    decode: Workload


SIZES = {
    "7b": Size(4096, 32, 32, 11008, 32000, 128, Workload(2048, repeats=50),
               Workload(2048, decode=32, repeats=10)),
    "tiny": Size(64, 2, 4, 100, 128, 32, Workload(16, repeats=2),
                 Workload(16, decode=2, repeats=2)),
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """What to measure, where, and in which precision."""

    name: str
    device: str
    precision: str

    @property
    def size(self) -> Size:
        """The shapes of that name."""
        return SIZES[self.name]

    def list_shapes(self) -> list[tuple[float, bool, Any]]:
        """List (ratio, whether channels are rounded, config); the dense shape counts as rounded."""
        shapes = []
        for ratio in (0.0, 0.2, 0.5):
            heads = round(self.size.heads * (1 - ratio))
            exact = round(self.size.channels * (1 - ratio))
            rounded = max(1, int(exact / self.size.round_to + 0.5)) * self.size.round_to
            for channels in dict.fromkeys((rounded, exact) if ratio else (exact,)):
                is_round = ratio == 0 or channels == rounded
                shapes.append((ratio, is_round, self.build_config(heads, channels)))
        return shapes

    def build_config(self, heads: int, channels: int) -> MistralConfig:
        """Return a LLaMA of any number of heads, which Mistral's config takes."""
        size = self.size
        return MistralConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden_size,
            intermediate_size=channels,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=size.hidden_size // size.heads,
            max_position_embeddings=4096,
            sliding_window=None,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
                self.precision
            ],
        )

    def build_model(self, config: MistralConfig) -> MistralForCausalLM:
        """Return a model with random weights, made on the device in its own precision."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()

    def build_unmerged(self, model: MistralForCausalLM) -> Any:
        """Return the model with LoRA beside its projections; it shares the weights of ``model``."""
        with torch.device("meta"):
            twin = MistralForCausalLM(model.config)
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.model.rotary_emb = model.model.rotary_emb  # its buffers are not in the state
        wrapped = fill_random_adapter(twin, rank=RANK, alpha=2 * RANK).to(self.device)
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.to(model.dtype)
        return wrapped.eval()

    def describe(self, config: Any, ratio: float, engine: str, *, rounded: bool) -> Variant:
        """Describe a model for the rows of the result."""
        channels = config.intermediate_size
        name = f"{config.num_attention_heads} heads, {channels} channels"
        bits = {"fp32": 4, "fp16": 2, "bf16": 2}[self.precision]
        parameters = count_parameters(config)
        folder = Path(ROUNDED if rounded else "exact")
        return Variant(
            model=name,
            ratio=ratio,
            engine=engine,
            merged=True,
            parameters=parameters,
            bytes=parameters * bits,
            device=self.device,
            folder=folder,
        )


def measure(
    suite: Suite,
    subjects: Sequence[Subject],
    workloads: Sequence[Workload],
    phases: Collection[str] = ("prefill", "decode"),
) -> Any:
    """Time the models of this process, and the machine's limits in between."""
    works = LimitsProbe(device=suite.device, precision=suite.precision)
    probe = Probe(
        works.units, lambda _, work: time_work(lambda: works.run(work), device=suite.device)
    )
    result = measure_latency(
        subjects, workloads, probe=probe, phases=phases, on_progress=report
    ).to_json()
    return {key: result[key] for key in ("limits", "rows")}


def build_subject(variant: Variant, runner: Runner, config: Any) -> Subject:
    """Wrap a runner of this process."""
    timed = TimedRunner(runner, device=variant.device)
    loaded = Loaded(runner.precision, runner.max_positions, None)
    return Subject(variant, loaded, timed.time, config=config)


@dataclass(frozen=True)
class Form:
    """A model of one shape, merged or with LoRA beside its weights."""

    variant: Variant
    model: Any
    config: MistralConfig

    def build_eager(self) -> Subject:
        """Return the model as the product runs it."""
        return build_subject(self.variant, TorchRunner(self.model), self.config)

    def build_faster(self, mode: str) -> Subject:
        """Return the model compiled, or as a CUDA graph."""
        fast = StaticModel(self.model, mode=mode, device=self.variant.device)
        runner = TorchRunner(self.model)
        loaded = Loaded(runner.precision, runner.max_positions, None)
        return Subject(replace(self.variant, engine=mode), loaded, fast.time, config=self.config)


def list_forms(suite: Suite, *, only_rounded: bool = False) -> list[Form]:
    """Build every shape in torch, each merged and unmerged; the two share their weights."""
    forms = []
    for ratio, rounded, config in suite.list_shapes():
        if rounded or not only_rounded:
            model = suite.build_model(config)
            variant = suite.describe(config, ratio, TORCH.name, rounded=rounded)
            apart = replace(variant, merged=False, rank=RANK)
            forms.append(Form(variant, model, config))
            forms.append(Form(apart, suite.build_unmerged(model), config))
    return forms


def run_table_3(suite: Suite) -> Any:
    """Measure the paper's Table 3 in torch: prefill, merged and unmerged, widths rounded or not.

    The rounded shapes also run compiled, and as CUDA graphs.
    """
    forms = list_forms(suite)
    rounded = [form for form in forms if form.variant.folder.name == ROUNDED]
    subjects = [form.build_eager() for form in forms]
    subjects += [form.build_faster(mode) for form in rounded for mode in (COMPILED, GRAPH)]
    parity = [compare_modes(form, suite.size.workload) for form in rounded]
    return {"parity": parity, **measure(suite, subjects, [suite.size.workload])}


def run_decode(suite: Suite) -> Any:
    """Measure decoding in torch: merged and unmerged at batch 1, merged at batch 8.

    Eager and as CUDA graphs; compiled only at batch 1 and for two shapes, since that takes minutes.
    """
    forms = list_forms(suite, only_rounded=True)
    merged = [form for form in forms if form.variant.merged]
    ends = [form for form in merged if form.variant.ratio in (0.0, 0.5)]
    alone = [form.build_eager() for form in forms] + [form.build_faster(GRAPH) for form in forms]
    alone += [form.build_faster(COMPILED) for form in ends]
    first = measure(suite, alone, [suite.size.decode], phases=("decode",))
    del alone  # and with it the caches of the graphs
    together = [form.build_eager() for form in merged]
    together += [form.build_faster(GRAPH) for form in merged]
    workload = replace(suite.size.decode, batch=8)
    second = measure(suite, together, [workload], phases=("decode",))
    return {**first, "rows": [*first["rows"], *second["rows"]]}


def compare_modes(form: Form, workload: Workload) -> dict[str, Any]:
    """Compare the logits of a prefill and of one decoded token with those of the eager model."""
    runner = TorchRunner(form.model)
    model = StaticModel(form.model, mode=GRAPH, device=form.variant.device)
    ids = model.build_ids(workload)
    ones = torch.ones_like(ids)
    eager = runner.forward(ids, attention_mask=ones, last_only=True)
    longer = torch.cat([ones, ones[:, :1]], dim=1)
    next_one = runner.forward(ids[:, -1:], attention_mask=longer, past=eager.past, last_only=True)
    step = DecodeStep(form.model, ids, max_len=workload.tokens + 1)
    compiled = StaticModel(form.model, mode=COMPILED, device=form.variant.device)
    found = {
        "graph prefill": (model.build_prefill(ids)(), eager.logits),
        "compiled prefill": (compiled.build_prefill(ids)(), eager.logits),
        "decode": (step.run(), next_one.logits),
    }
    differences = {
        name: (own.float() - expected).abs().max().item() for name, (own, expected) in found.items()
    }
    largest = eager.logits.abs().max().item()
    variant = form.variant
    return {"model": variant.model, "merged": variant.merged, "max_abs_logit": largest,
            "max_abs_diff": differences}  # fmt: skip


def run_engine(engine: str, suite: Suite) -> Any:
    """Compare an engine's logits with torch's, then time the dense and the 50 % model in both."""
    try:
        get_engine(engine).check(suite.device)
    except LpdeployError as error:
        return {"skipped": str(error)}
    subjects, parity = [], []
    shapes = [s for s in suite.list_shapes() if s[1] and s[0] in (0.0, 0.5)]
    for ratio, rounded, config in shapes:
        model = suite.build_model(config)
        runner, seconds = export_and_load(engine, suite, model)
        parity.append({"ratio": ratio, "export_s": seconds, **compare(TorchRunner(model), runner)})
        for name, own in ((TORCH.name, TorchRunner(model)), (engine, runner)):
            variant = suite.describe(config, ratio, name, rounded=rounded)
            subjects.append(build_subject(variant, own, config))
    workloads = [replace(suite.size.workload, decode=suite.size.decode.decode, repeats=20)]
    return {"parity": parity, **measure(suite, subjects, workloads)}


def export_and_load(engine: str, suite: Suite, model: Any) -> tuple[Runner, float]:
    """Export a live model through a temporary folder, and load the result."""
    size = suite.size
    with tempfile.TemporaryDirectory(prefix="lpdeploy-gpu-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        start = time.perf_counter()
        export_folder(
            engine,
            folder,
            Path(scratch) / engine,
            precision=suite.precision,
            max_batch=8,
            max_seq_len=size.decode.tokens + size.decode.decode,
        )
        seconds = time.perf_counter() - start
        shutil.rmtree(folder)
        return get_engine(engine).load(Path(scratch) / engine, device=suite.device), seconds


def compare(reference: Runner, runner: Runner) -> dict[str, float]:
    """Compare logits over a padded prefill and cached steps, as ``verify`` does."""
    rows = build_inputs(reference.vocab_size, limit=runner.max_positions)
    left, right = collect_logits(reference, rows), collect_logits(runner, rows)
    return {
        "max_abs_diff": (left - right).abs().max().item(),
        "max_abs_logit": left.abs().max().item(),
        "top1_agreement": (left.argmax(-1) == right.argmax(-1)).float().mean().item(),
    }


PARTS: dict[str, Callable[[Suite], Any]] = {
    "table-3": run_table_3,
    "decode": run_decode,
    **{engine.name: functools.partial(run_engine, engine.name) for engine in list_exporting()},
    "pruning": run_pruning,
    "pruning-offload": run_offloading,
    "pruning-65b": run_65b,
}


def main() -> None:
    """Read the command line, run the parts, and keep each result."""
    parser = build_parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"))
    options = parser.parse_args()
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part '{sorted(unknown)[0]}'; choose from {', '.join(PARTS)}")
    precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    suite = Suite(options.size, options.device, precision)
    for name in options.parts or PARTS:
        print(f"== {name}", file=sys.stderr, flush=True)
        keep(options.output, name, run_part(suite, name))


def run_part(suite: Suite, name: str) -> Any:
    """Run one part; an error becomes its result, so that the other parts still run."""
    start = time.perf_counter()
    try:
        result = PARTS[name](suite)
    except Exception as error:  # noqa: BLE001 - GPU time is too dear to lose the other parts
        result = {"failed": f"{type(error).__name__}: {str(error).strip()[:500]}"}
    gc.collect()
    if suite.device != "cpu":
        torch.cuda.empty_cache()
    seconds = round(time.perf_counter() - start, 1)
    return {**result, "precision": suite.precision, "seconds": seconds}


def keep(path: Path, name: str, result: Any) -> None:
    """Add the result of a part to the JSON, beside the others."""
    document = load_json(path, fix="Delete it.") if path.is_file() else {"parts": {}}
    machine = {**describe_machine().to_json(), "command": describe_command()}
    document["parts"][name] = {"machine": machine, **result}
    save_json(path, document)


if __name__ == "__main__":
    main()

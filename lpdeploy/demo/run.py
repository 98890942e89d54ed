"""The demo: the whole workflow on the model that comes with the package, in one folder."""

import functools
import logging
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from lpdeploy.api import Run, prune
from lpdeploy.benchmark.results import LatencyRow
from lpdeploy.benchmark.stage import save_latency
from lpdeploy.benchmark.table import format_relative
from lpdeploy.config import PruneConfig
from lpdeploy.data.sources import load_corpus
from lpdeploy.demo.timing import time_larger_shape
from lpdeploy.engines.generation import generate
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.environment import ignore_interrupts, quieten_libraries
from lpdeploy.errors import ArtifactError
from lpdeploy.evaluation.results import Evaluation, Figures
from lpdeploy.folders import remove_leftovers
from lpdeploy.generation.samples import DENSE, PRUNED, Sample, save_samples
from lpdeploy.models.loading import load_tokenizer

logger = logging.getLogger(__name__)

RATIOS = (0.2, 0.5)
_TRAIN_SEQ_LEN = 128
_EVAL_SEQ_LEN = 256
_NEW_TOKENS = 110
_STORIES = 3

_ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"
_BASE = _ASSETS / "story-llama-1M"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        page: The HTML page that shows it.
        seconds: How long the demo took.
        perplexity: Held-out perplexity of the ``dense`` model and of the one ``pruned`` by half.
        rows: Rows of the latency benchmark.
        note: What they were measured on.
    """

    page: Path
    seconds: float
    perplexity: dict[str, float]
    rows: tuple[LatencyRow, ...]
    note: str

    @property
    def summary(self) -> str:
        """The result, in a few lines."""
        perplexity = "{dense:.2f} dense, {pruned:.2f} pruned".format(**self.perplexity)
        rows = [
            f"{row.engine:6} {row.ratio:4.0%} {'merged' if row.merged else 'unmerged':9}"
            f"{row.median_ms:8.2f} ms {format_relative(row):>7}"
            for row in self.rows
        ]
        first = f"perplexity {perplexity}; every stage computes the same"
        last = f"{self.seconds:.0f} s; open {self.page}"
        return "\n".join([first, "", *textwrap.wrap(self.note, 80), *rows, "", last])

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, with the summary."""
        return {**asdict(self), "page": str(self.page), "summary": self.summary}


Progress = Callable[[str, int, int], None]
"""Is told (part, done, total) as a part goes on; total is 0 where it cannot say how far it is."""


def run_demo(
    output: Path,
    *,
    overwrite: bool = False,
    steps: int = 80,
    repeats: int = 8,
    on_progress: Progress = lambda *_: None,
) -> DemoResult:
    """Prune by 20 and 50 %, compact, export, verify, evaluate, measure latency, and report.

    Args:
        output: Folder for everything; ``index.html`` in it is the page.
        overwrite: Replace an earlier demo.
        steps: Number of optimizer steps of each pruning run.
        repeats: Number of trials of each variant of the benchmark.
        on_progress: Is told how far the demo is.

    Raises:
        ArtifactError: ``output`` exists and ``overwrite`` is false.
        ParityError: Two stages differ.
    """

    def begin(part: str) -> Callable[[int, int], None]:
        logger.info(part)
        on_progress(part, 0, 0)
        return functools.partial(on_progress, part)

    _claim(output, overwrite=overwrite)
    start = time.perf_counter()
    runs = _list_runs(output)
    for ratio, run in runs.items():
        _build(run, begin(f"prune {ratio:.0%}, fine-tune, compact"), ratio=ratio, steps=steps)
    begin("export to ONNX")
    _export_all(list(runs.values()))
    half = runs[RATIOS[-1]]
    begin("verify every stage")
    half.verify()
    begin("evaluate")
    valid = _ASSETS / "valid.txt"
    measured = half.evaluate(
        perplexity=[str(valid)], seq_len=_EVAL_SEQ_LEN, with_base=True, device="cpu"
    )
    on_trial = begin("time a larger shape, dense and pruned, merged and unmerged")
    bench = time_larger_shape(RATIOS, repeats=repeats, on_progress=on_trial)
    save_latency(bench, half.benchmark)
    begin("generate a few lines")
    openings = _read_openings(valid)
    models = {DENSE: _BASE, PRUNED: half.model}
    save_samples(half, [s for item in models.items() for s in _write_lines(openings, *item)])
    page = half.report(output=output / "index.html")
    seconds = round(time.perf_counter() - start, 1)
    return DemoResult(page, seconds, _list_perplexities(measured), bench.rows, bench.note)


def _list_runs(output: Path) -> dict[float, Run]:
    return {ratio: Run(output / f"pruned-{ratio * 100:.0f}") for ratio in RATIOS}


def _claim(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not empty, or remove the runs of an earlier demo from it."""
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ArtifactError(
                f"'{output}' is not empty. Use `overwrite=True` to replace the demo in it, or "
                "another `output`."
            )
        for run in _list_runs(output).values():
            if run.path.exists():
                run.check_free(base=_BASE, resume=False, overwrite=True)
                run.clear()
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output / "index.html")


def _build(run: Run, tell: Callable[[int, int], None], *, ratio: float, steps: int) -> None:
    config = PruneConfig(
        ratio=ratio,
        steps=steps,
        batch_size=8,
        micro_batch_size=8,
        seq_len=_TRAIN_SEQ_LEN,
        lr=2e-3,
        prune_every=4,
        prune_cooldown=0.4,
        device="cpu",
    )
    prune(
        *(_BASE, _ASSETS / "train.txt", run),
        config=config,
        on_step=lambda info: tell(info.step, info.steps),
    )
    for keep_adapter in (False, True):
        run.compact(keep_adapter=keep_adapter)


def _export_all(runs: list[Run]) -> None:
    # Tracing a graph is Python on one core, so each run has its own process. They are spawned,
    # since a fork of a process that has run torch's threads may hang.
    others = set(active_children())
    with ProcessPoolExecutor(len(runs), mp_context=get_context("spawn")) as pool:
        with ignore_interrupts():
            exports = [pool.submit(_export_run, run) for run in runs]
        try:
            for export in exports:
                export.result()
        except BaseException:  # the pool would wait for the others
            for process in {*active_children()} - others:
                process.terminate()
            raise


def _export_run(run: Run) -> None:
    quieten_libraries()  # as the command line does
    for unmerged in (False, True):
        run.export(unmerged=unmerged)


def _read_openings(path: Path) -> list[str]:
    """Return the first sentences of held-out stories, for both models to continue."""
    stories = load_corpus(path).examples[:_STORIES]
    return [".".join(story.text.split(".")[:3]) + "." for story in stories]


def _write_lines(openings: list[str], name: str, model: Path) -> list[Sample]:
    runner = load_torch_runner(model)
    tokenizer = load_tokenizer(model, runner.config)
    samples = []
    for opening in openings:
        prompt = tokenizer(opening)["input_ids"]
        written = generate(
            runner, [prompt], max_new_tokens=_NEW_TOKENS, eos_ids={tokenizer.eos_token_id}
        )[0]
        text = tokenizer.decode(written, skip_special_tokens=True)
        samples.append(Sample(name, opening, text))
    return samples


def _list_perplexities(measured: Evaluation) -> dict[str, float]:
    parts = {"dense": measured.base or Figures(), "pruned": measured.figures}
    return {
        name: text.perplexity for name, part in parts.items() for text in part.perplexity.values()
    }

"""The Python API: what each command of lpdeploy does, as one call."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpdeploy.config import PruneConfig
from lpdeploy.folders import atomic_folder
from lpdeploy.run_folder import BASE, RunFolder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lpdeploy.benchmark.results import LatencyResult
    from lpdeploy.engines.export import ExportResult
    from lpdeploy.engines.verification import VerifyResult
    from lpdeploy.evaluation.results import Evaluation
    from lpdeploy.models.compact import CompactResult
    from lpdeploy.pruning.training import StepInfo
    from lpdeploy.publish.push import PushResult
    from lpdeploy.report.comparison import Comparison
    from lpdeploy.servers.package import PackageResult


def prune(  # noqa: PLR0913 - what the command takes
    model: "str | os.PathLike[str] | PreTrainedModel",
    data: "str | os.PathLike[str] | Dataset",
    output: str | os.PathLike[str],
    *,
    config: PruneConfig | None = None,
    valid: "str | os.PathLike[str] | Dataset | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    report_to: str | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    on_step: "Callable[[StepInfo], None]" = lambda _: None,
) -> "Run":
    """Prune a model while it fine-tunes with LoRA, and write a run folder.

    Progress goes to the logger ``lpdeploy``.

    Args:
        model: Folder or hub name of a LLaMA-family model, or a transformers model in memory, which
            is saved in the run folder first.
        data: File, folder or hub name of text or conversations, or rows with such columns, for
            example a ``datasets.Dataset``.
        output: The run folder.
        config: What to remove, how to choose it and how to train; the defaults if None.
        valid: Text or conversations that are not trained on. Their loss is measured every
            ``eval_every`` steps.
        tokenizer: The tokenizer of a model in memory.
        report_to: Experiment trackers that are told of each step: ``tensorboard``, ``trackio``,
            ``wandb`` or ``mlflow``.
        resume: Go on with the interrupted run in ``output``.
        overwrite: Replace the run in ``output``.
        stop: Set it, from another thread or a signal handler, to end the run after the current
            step, with a checkpoint that ``resume`` goes on from.
        on_step: Called with a ``StepInfo`` after every optimizer step.

    Returns:
        The run. Its ``compact`` is what usually follows.

    Raises:
        LpdeployError: Model, data or output cannot be used, memory will not suffice, or a loss is
            not finite.
        RunEndedError: ``stop`` was set.
        ValueError: A model in memory has no tokenizer beside it, or carries an adapter.
    """
    from lpdeploy.benchmark.target import resolve_options
    from lpdeploy.pruning.inputs import check_data, check_place
    from lpdeploy.pruning.run import prune as run_prune

    run, config = Run(output), config or PruneConfig()
    trackers = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    beside: dict[str, Any] = {"valid": _name_path(valid), "report_to": trackers}
    check_data(config, data=_name_path(data), **beside)  # before an older run is replaced
    if not isinstance(model, str | os.PathLike):
        model = _save_base(run, model, tokenizer, resume=resume, overwrite=overwrite)
    name = os.fspath(model)
    place: dict[str, Any] = {"output": run.path, "resume": resume, "overwrite": overwrite}
    given = {"data": _name_path(data), **place, "stop": stop}
    check_place(name, **place)
    config, target = resolve_options(name, config, **given)
    run_prune(name, **given, **beside, options=config, target=target, on_step=on_step)
    return run


def _name_path(data: Any) -> Any:
    return os.fspath(data) if isinstance(data, os.PathLike) else data


def compare(
    runs: Sequence[str | os.PathLike[str]], *, output: str | os.PathLike[str] | None = None
) -> "Comparison":
    """Put runs of one model side by side: size, quality and speed, and what no other run beats.

    Args:
        runs: Run folders, two or more.
        output: HTML file to write the comparison to as well.

    Returns:
        The comparison.

    Raises:
        LpdeployError: A folder is no run, the runs are of different models, or they were measured
            on different texts or questions.
        ValueError: There are fewer than two runs, or one is given twice.
    """
    from lpdeploy.report.compare import compare as compare_runs

    return compare_runs(runs, output=None if output is None else Path(output))


def _save_base(
    run: RunFolder,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    resume: bool,
    overwrite: bool,
) -> Path:
    """Save a model that is in memory, so that ``compact`` and later stages find it again."""
    if resume:
        return run.base
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer; give `tokenizer`")
    if hasattr(model, "peft_config"):
        raise ValueError("the model carries an adapter; merge it, or give its base model")
    with run.hold():
        run.check_free(base=None, resume=False, overwrite=overwrite)
        run.claim(clear=True)
        with atomic_folder(run.base, kind=BASE) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return run.base


class Run(RunFolder):
    """A run folder, and what can be done with it.

    .. code-block:: python

        run = lpdeploy.Run("run")
        run.compact()
        run.export("ort", precision="int4")
    """

    def compact(
        self,
        *,
        keep_adapter: bool = False,
        output: Path | None = None,
        base: Path | None = None,
        overwrite: bool = False,
    ) -> "CompactResult":
        """Write the dense pruned model: cut the base and merge LoRA.

        Args and errors as in ``lpdeploy.models.compact.compact``.
        """
        from lpdeploy.models.compact import compact

        return compact(
            self, keep_adapter=keep_adapter, output=output, base=base, overwrite=overwrite
        )

    def export(
        self,
        engine: str = "onnx",
        *,
        unmerged: bool = False,
        output: Path | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> "ExportResult":
        """Export the compacted model for an engine; ``options`` include its ``precision``.

        Args and errors as in ``lpdeploy.engines.export.export``.
        """
        from lpdeploy.engines.export import export

        return export(
            self, engine=engine, unmerged=unmerged, output=output, overwrite=overwrite, **options
        )

    def verify(
        self,
        *,
        engine: str = "onnx",
        base: Path | None = None,
        atol: float | None = None,
        integrity: bool = False,
    ) -> "VerifyResult":
        """Compare the logits of all stages.

        Args as in ``lpdeploy.engines.verify.verify``.

        Raises:
            ParityError: Two stages differ by more than their tolerance, or a weight is wrong.
        """
        from lpdeploy.engines.verify import verify

        result = verify(self, engine=engine, base=base, atol=atol, integrity=integrity)
        result.check()
        return result

    def evaluate(
        self,
        *,
        perplexity: Sequence[str] = (),
        tasks: Sequence[str] = (),
        engine: str = "torch",
        with_base: bool = False,
        base: Path | None = None,
        device: str = "auto",
        **options: Any,
    ) -> "Evaluation":
        """Measure perplexity on texts and accuracy on tasks; ``options`` of ``EvalOptions``.

        Args and errors as in ``lpdeploy.evaluation.evaluate.evaluate``.
        """
        from lpdeploy.evaluation.evaluate import evaluate
        from lpdeploy.evaluation.options import EvalOptions

        chosen = EvalOptions(perplexity=tuple(perplexity), tasks=tuple(tasks), **options)
        return evaluate(self, chosen, engine=engine, with_base=with_base, base=base, device=device)

    def bench(
        self,
        engines: Sequence[str] = ("torch",),
        *,
        forms: Sequence[bool] = (True,),
        device: str = "auto",
        base: Path | None = None,
        **workload: Any,
    ) -> "LatencyResult":
        """Time the dense and the pruned model; ``workload`` are the fields of ``Workload``.

        Args and errors as in ``lpdeploy.benchmark.stage.bench_latency``.
        """
        from lpdeploy.benchmark.stage import bench_latency
        from lpdeploy.benchmark.worker import Workload

        result, _ = bench_latency(
            [str(self)],
            engines=engines,
            forms=forms,
            workloads=[Workload(**workload)],
            device=device,
            base=base,
        )
        return result

    def generate(
        self,
        prompts: Sequence[str],
        *,
        engine: str = "torch",
        device: str = "auto",
        max_new_tokens: int | None = None,
        prompt_format: str | None = None,
        system: str | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Answer prompts, or continue texts, with the compacted model.

        Args:
            prompts: Texts, of any lengths.
            engine: What runs the model: torch, or an engine that the model was exported to.
            device: ``auto``, ``cpu`` or ``cuda``.
            max_new_tokens: Largest number of tokens added to each text; None for 256, or as many
                as there is room for.
            prompt_format: ``raw`` continues each text as it is; the others make it the turn of a
                user, as in ``lpdeploy.generation.options.GenerateOptions``. None does so if the
                model has a chat template.
            system: A turn of the system before each.
            sampling: Fields of ``lpdeploy.engines.sampling.Sampling``: ``temperature``, where 0,
                the default, takes the most likely token, ``top_k``, ``top_p`` and ``seed``.

        Returns:
            The new text of each prompt.

        Raises:
            LpdeployError: The model, an export or a prompt cannot be used.
            ValueError: An option is out of range.
        """
        from lpdeploy.engines.sampling import Sampling
        from lpdeploy.generation.options import GenerateOptions
        from lpdeploy.generation.stage import generate_texts

        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            prompt_format=prompt_format,
            system=system,
        )
        (found,) = generate_texts(self, prompts, options, engine=engine, device=device)
        return [answer.text for answer in found.answers]

    def package(
        self, target: str, output: Path, *, overwrite: bool = False, **options: Any
    ) -> "PackageResult":
        """Write a ready-to-serve folder for a server.

        Args and errors as in ``lpdeploy.servers.package.package``.
        """
        from lpdeploy.servers.package import package

        return package(self, kind=target, output=Path(output), overwrite=overwrite, **options)

    def push(self, repo: str, *, private: bool = False, execute: bool = False) -> "PushResult":
        """Show what would be uploaded to the Hugging Face hub, and upload it with ``execute``.

        Args and errors as in ``lpdeploy.publish.push.push``.
        """
        from lpdeploy.publish.push import push

        return push(self, repo, private=private, execute=execute)

    def report(self, *, output: Path | None = None) -> Path:
        """Write the page about the run, ``report.html`` by default, and return its path."""
        from lpdeploy.report.page import save_report

        return save_report(self, output=output)

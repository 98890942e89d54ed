"""What was measured of a model, on its card: for people as a table, for the hub as metadata."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lpdeploy.evaluation.results import PAPER_METRICS, Evaluation, Metrics, Perplexity
from lpdeploy.models.find import is_local

_TEXT, _CHOICE = "text-generation", "multiple-choice"


def add_evaluation(card: str, evaluation: Evaluation, *, repo: str) -> str:
    """Add what was measured to a card.

    Figures of other engines follow in tables of their own. The metadata (``model-index``) has those
    of the first alone, since it knows no engines.

    Args:
        card: Markdown with metadata.
        evaluation: Of the model of the card.
        repo: ``owner/name``.
    """
    parsed = ModelCard(card)
    assert isinstance(parsed.data, ModelCardData)
    results = [
        *(_describe_text(*item) for item in evaluation.figures.perplexity.items()),
        *(_describe_task(*item) for item in evaluation.figures.tasks.items()),
    ]
    if not results:
        return card
    parsed.data.model_name = repo.rpartition("/")[2]
    parsed.data.eval_results = results
    tables = [_write_table(each) for each in (evaluation, *evaluation.others)]
    return "\n\n".join([str(parsed).rstrip("\n"), "## Evaluation", *tables]) + "\n"


def _name(source: str) -> str:
    return Path(source).name if is_local(source) or Path(source).exists() else source


def _describe_text(source: str, measured: Perplexity) -> EvalResult:
    return EvalResult(
        task_type=_TEXT,
        dataset_type=_name(source),
        dataset_name=_name(source),
        metric_type="perplexity",
        metric_value=measured.perplexity,
    )


def _describe_task(task: str, metrics: Metrics) -> EvalResult:
    metric = PAPER_METRICS.get(task, "acc")
    return EvalResult(
        task_type=_CHOICE,
        dataset_type=task,
        dataset_name=task,
        metric_type=metric,
        metric_value=metrics.get(metric),
        metric_args={"num_fewshot": metrics.get("num_fewshot"), "n": metrics.get("n")},
    )


def _write_table(evaluation: Evaluation) -> str:
    base = evaluation.base
    rows = [
        (
            f"perplexity of {_name(source)} in segments of {evaluation.seq_len} tokens",
            f"{measured.perplexity:.2f}",
            f"{base.perplexity[source].perplexity:.2f}"
            if base and source in base.perplexity
            else "",
        )
        for source, measured in evaluation.figures.perplexity.items()
    ]
    for task, metrics in evaluation.figures.tasks.items():
        metric = PAPER_METRICS.get(task, "acc")
        few = metrics.get("num_fewshot")
        shots = f", {few:.0f} examples in the prompt" if few else ""
        label = f"{task}, {metric}, {metrics.get('n') or 0:.0f} documents{shots}"
        unpruned = (base.tasks if base else {}).get(task, {})
        rows.append((label, _write_accuracy(metrics, metric), _write_accuracy(unpruned, metric)))
    lines = ["| | pruned | unpruned |", "|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return f"On {evaluation.engine} in {evaluation.precision}:\n\n" + "\n".join(lines)


def _write_accuracy(metrics: Metrics, metric: str) -> str:
    value, error = metrics.get(metric), metrics.get(f"{metric}_stderr")
    if value is None:
        return ""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"

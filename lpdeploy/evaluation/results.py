"""What an evaluation measured, as ``eval.json`` holds it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lpdeploy.records import find_record, read_record

PAPER_METRICS = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""Task -> the accuracy that the average takes; ``evaluation.tasks`` says why."""
Metrics = dict[str, float | None]
"""Of one task: ``acc``, ``acc_stderr`` and the like, ``n`` (documents) and ``num_fewshot``."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (nats) of the predicted tokens.
        bits_per_byte: That mean in bits, times the tokens of the text (bos and eos of each
            document included, since they are predicted, too) over its UTF-8 bytes; of a part of
            the text, or of the answers in conversations, over the bytes that the predicted tokens
            stand for. Unlike the perplexity, it compares models with different tokenizers.
        tokens: Number of predicted tokens.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Figures:
    """What was measured of one model.

    Attributes:
        perplexity: Perplexity of each text, by its source.
        tasks: Metrics of each task, by its name.
    """

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, Metrics] = field(default_factory=dict)

    @property
    def average_over(self) -> list[str]:
        """Those of the paper's seven tasks that were run."""
        return list(self._list_accuracies())

    @property
    def average(self) -> float | None:
        """Mean accuracy over ``average_over``, as in the paper; None over nothing."""
        accuracies = self._list_accuracies().values()
        return sum(accuracies) / len(accuracies) if accuracies else None

    @property
    def errors(self) -> dict[str, float]:
        """Standard error over the documents: of the accuracy of each of ``average_over``.

        ``average`` is there too, as the tasks are independent samples. A task of one document has
        none, and then neither has the average.
        """
        found = {
            name: self.tasks[name].get(f"{PAPER_METRICS[name]}_stderr")
            for name in self.average_over
        }
        errors = {name: error for name, error in found.items() if error is not None}
        if errors and len(errors) == len(found):
            errors["average"] = math.hypot(*errors.values()) / len(errors)
        return errors

    def is_within(self, other: "Figures") -> bool:
        """Tell whether all of these figures are among others."""
        return (
            self.perplexity.items() <= other.perplexity.items()
            and {name: other.tasks.get(name) for name in self.tasks} == self.tasks
        )

    def _list_accuracies(self) -> dict[str, float]:
        found = {
            name: self.tasks[name].get(metric)
            for name, metric in PAPER_METRICS.items()
            if name in self.tasks
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; without ``tasks`` and their average where none were run."""
        data = asdict(self)
        if not self.tasks:
            del data["tasks"]
            return data
        return {**data, "average": self.average, "average_over": self.average_over}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The quality of a model on one engine: ``eval.json``.

    Attributes:
        model: The model as it was named.
        model_sha256: Hash of the model that ``compact`` recorded; None for other models.
        engine: The engine that ran it.
        precision: What it computed in.
        seq_len: Tokens in a segment of a text.
        figures: What was measured; in JSON its fields stand beside the others.
        base: The same of the unpruned base; None where it was not asked for.
        others: Earlier evaluations of the same model on other engines or in other precisions.
    """

    model: str
    model_sha256: str | None
    engine: str
    precision: str
    seq_len: int
    figures: Figures
    base: Figures | None = None
    others: tuple["Evaluation", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what ``eval.json`` holds; without ``base`` and ``others`` where there are none."""
        names = ("model", "model_sha256", "engine", "precision", "seq_len")
        data = {name: getattr(self, name) for name in names} | self.figures.to_json()
        if self.base is not None:
            data["base"] = self.base.to_json()
        if self.others:
            data["others"] = [other.to_json() for other in self.others]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Evaluation":
        """Read it back.

        Raises:
            ValueError: A key is missing, or a value has the wrong type.
        """
        return read_record(cls, data, known={"figures": read_record(Figures, data)})

    def merge(self, old: "Evaluation", *, in_part: bool = False) -> "Evaluation":
        """Keep what an earlier evaluation of the same model says besides.

        Figures on the same engine in the same precision stand beside the new ones, perplexities
        only of the same segment length. Those of other engines and precisions become ``others``.

        Args:
            old: The earlier evaluation.
            in_part: Whether this one was limited by ``max_segments`` or ``limit``: a quick look,
                which does not replace figures of more of the same text or task.
        """
        merged, others = self, []
        for part in (replace(old, others=()), *old.others):
            if part.model_sha256 != self.model_sha256:
                continue
            if (part.engine, part.precision) == (self.engine, self.precision):
                merged = self._add(part, in_part=in_part)
            else:
                others.append(part)
        return replace(merged, others=tuple(others))

    def _add(self, old: "Evaluation", *, in_part: bool) -> "Evaluation":
        seq_len = self.seq_len if self.figures.perplexity else old.seq_len

        def join(new: Figures, former: Figures) -> Figures:
            kept = former.perplexity if seq_len == old.seq_len else {}
            texts = {
                name: text
                for name, text in new.perplexity.items()
                if not (in_part and name in kept and text.tokens < kept[name].tokens)
            }
            tasks = {
                name: task
                for name, task in new.tasks.items()
                if not (in_part and _is_part(task, former.tasks.get(name, {})))
            }
            return Figures(kept | texts, former.tasks | tasks)

        figures, base = join(self.figures, old.figures), None
        if self.base or old.base:
            base = join(self.base or Figures(), old.base or Figures())
            base = _select_comparable(base, figures)
        if base == Figures():
            base = None
        return replace(self, seq_len=seq_len, figures=figures, base=base)


def _is_part(new: Metrics, old: Metrics) -> bool:
    """Tell whether metrics are of fewer documents of what others are of."""
    new_n, old_n = new.get("n") or 0, old.get("n") or 0
    return new_n < old_n and new.get("num_fewshot") == old.get("num_fewshot")


def _select_comparable(base: Figures, figures: Figures) -> Figures:
    """Leave out figures of the base that were measured otherwise than those of the model.

    ``max_segments``, ``limit`` or ``num_fewshot`` may have been different.
    """
    perplexity = {
        source: measured
        for source, measured in base.perplexity.items()
        if figures.perplexity.get(source, measured).tokens == measured.tokens
    }
    tasks = {
        task: metrics
        for task, metrics in base.tasks.items()
        if all(
            figures.tasks.get(task, metrics).get(name) == metrics.get(name)
            for name in ("n", "num_fewshot")
        )
    }
    return Figures(perplexity, tasks)


def load_evaluation(path: Path, *, fix: str) -> Evaluation | None:
    """Read an ``eval.json``; None where there is none.

    Args:
        path: The file.
        fix: Sentence that tells the user what to do where the file cannot be read.

    Raises:
        ArtifactError: It cannot be read.
    """
    return find_record(Evaluation, path, fix=fix)

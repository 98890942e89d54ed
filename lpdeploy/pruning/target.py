"""The record of how what a user left open was chosen, such as ratios: ``target.json``."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError
from lpdeploy.plan import HEADS
from lpdeploy.records import load_record, read_record
from lpdeploy.run_folder import RunFolder

Asked = Mapping[str, int | float | str]
"""``parameters``, ``bytes``, ``ratio``, or the fields of ``LatencyTarget`` -> what the user asked
for; ``depth``, ``heads`` and ``lr`` where they were left open."""
Chosen = Mapping[str, int | float | str]
"""Fields of ``PruneConfig`` -> what was chosen for them."""

_CHOSEN = ("ratio", "head_ratio", "channel_ratio", "drop_layers", "heads")
# What the record of a trial holds at least.
_SHAPES = ({"drop_layers", "ratio"}, {"drop_layers", "head_ratio", "channel_ratio"})
_PHASE, _TOKENS = "prefill", 512


@dataclass(frozen=True)
class LatencyTarget:
    """How fast the pruned model must be, and on what.

    Attributes:
        latency_ms: Longest time of a prefill, or of one decoded token.
        engine: What runs the model; a precision may follow a colon.
        phase: ``prefill`` or ``decode``.
        tokens: Number of prompt tokens, in a batch of one.
    """

    latency_ms: float
    engine: str
    phase: str = _PHASE
    tokens: int = _TOKENS


@dataclass(frozen=True)
class SizeFound:
    """What a target of size led to, in parameters or bytes.

    Attributes:
        before: Size of the unpruned model.
        after: Size of the pruned one.
    """

    before: int
    after: int


@dataclass(frozen=True)
class LatencyFound:
    """What a target of latency led to.

    Attributes:
        heads: Query heads that a layer keeps.
        kv_heads: KV heads that a layer keeps.
        channels: FFN channels that a layer keeps.
        expected_loss: Sum of the scores of the groups that are removed.
        least_possible_loss: No shape that is fast enough has a lower sum.
        criterion: How groups were scored.
        repeats: Trials per measurement.
        measurements: ``heads``, ``kv_heads``, ``channels`` and ``median_ms`` of each shape that was
            measured.
        again: ``dense_ms`` and ``chosen_ms`` of a last, interleaved measurement.
        machine: Hardware, versions and date.
    """

    heads: int
    kv_heads: int
    channels: int
    expected_loss: float
    least_possible_loss: float
    criterion: str
    repeats: int
    measurements: list[dict[str, Any]]
    again: dict[str, float]
    machine: dict[str, Any]


@dataclass(frozen=True)
class DepthTrial:
    """A shape that was tried with a one-shot pruning.

    Attributes:
        ratios: What met the target, ``drop_layers`` among it, and ``heads`` if they were open.
        loss: Mean loss of rows that were held out, in nats a token, before any fine-tuning.
    """

    ratios: Chosen
    loss: float


@dataclass(frozen=True)
class RateTrial:
    """A learning rate that was tried for a few steps.

    Attributes:
        lr: The rate.
        loss: Mean loss of rows that were held out, in nats a token; infinity where it diverged.
    """

    lr: float
    loss: float

    @property
    def diverged(self) -> bool:
        """Whether the loss ceased to be a number."""
        return self.loss == math.inf


@dataclass(frozen=True)
class TargetRecord:
    """How what was left open was chosen.

    Attributes:
        asked: What the user asked for.
        ratios: What was chosen.
        found: What that gives; None if the ratios were given.
        trials: The shapes that were tried, if the depth or the kind of heads was open.
        rates: The learning rates that were tried, the chosen one first, if the rate was open.
    """

    asked: Asked
    ratios: Chosen
    found: SizeFound | LatencyFound | None = None
    trials: tuple[DepthTrial, ...] = ()
    rates: tuple[RateTrial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what ``target.json`` holds."""
        data: dict[str, Any] = {"asked": dict(self.asked), "ratios": dict(self.ratios)}
        if self.found is not None:
            data |= asdict(self.found)
        if self.trials:
            data["trials"] = [asdict(trial) for trial in self.trials]
        if self.rates:
            data["rates"] = [asdict(trial) for trial in self.rates]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TargetRecord":
        """Read a record back.

        Raises:
            ValueError: A key is missing, or a value has the wrong type.
        """
        found = None
        if data.get("ratios"):
            found = read_record(SizeFound if "before" in data else LatencyFound, data)
        record = read_record(cls, data, known={"found": found})
        _check_chosen(record.ratios)
        for trial in record.trials:
            _check_chosen(trial.ratios)
            if not _SHAPES[0] <= trial.ratios.keys() and not _SHAPES[1] <= trial.ratios.keys():
                raise ValueError("a trial lacks its ratios")
        return record


def _check_chosen(chosen: Chosen) -> None:
    for name, value in chosen.items():
        if name not in _CHOSEN:
            raise ValueError(f"`{name}` is no ratio")
        if (value not in HEADS) if name == "heads" else isinstance(value, str):
            raise ValueError(f"`{name}` is {value!r}")


def get_latency_target(options: PruneConfig) -> LatencyTarget | None:
    """Return the latency that the options ask for, if they do."""
    if options.target_latency is None or options.engine is None:
        return None
    return LatencyTarget(
        options.target_latency,
        options.engine,
        phase=options.latency_phase or _PHASE,
        tokens=options.latency_tokens or _TOKENS,
    )


def describe_asked(options: PruneConfig) -> Asked:
    """Return what is asked for or left open, as ``target.json`` records it."""
    latency = get_latency_target(options)
    asked: dict[str, int | float | str] = {}
    if latency is not None:
        asked = asdict(latency)
    elif options.target_params is not None:
        asked = {"parameters": options.target_params}
    elif options.target_memory is not None:
        asked = {"bytes": options.target_memory}
    elif options.ratio is not None:
        asked = {"ratio": options.ratio}
    left_open = {"depth": options.depth, "heads": options.heads, "lr": options.lr}
    return asked | {name: value for name, value in left_open.items() if value == "auto"}


def load_target(run: str | os.PathLike[str], asked: Asked) -> TargetRecord:
    """Read how the ratios of a run were chosen when it began, so that a resumed run keeps them.

    Raises:
        ArtifactError: The run began without a target, or with another one.
    """
    folder = RunFolder(run)
    path = folder.target
    if not folder.recipe.exists():
        raise ArtifactError(
            f"Nothing to resume: '{run}' holds no run. Run without `resume=True` to start anew."
        )
    if not path.is_file():
        raise ArtifactError(
            f"No {path.name} in '{path.parent}'. The run began with nothing left open: resume it "
            "with the same options, a number for `ratio` and `lr` among them."
        )
    folder.check_files(path)
    record = load_record(TargetRecord, path, fix="Use `overwrite=True` to start anew.")
    # An open rate may be given in the end, as any rate may be changed.
    began = {n: v for n, v in record.asked.items() if n != "lr" or n in asked}
    if began != dict(asked):
        raise ArtifactError(
            f"The run in '{run}' began with another target: {_write(record.asked)}, not "
            f"{_write(asked)}. Give the same target, or use `overwrite` to start anew."
        )
    return record


def _write(asked: Asked) -> str:
    return ", ".join(f"{name} {value}" for name, value in asked.items())

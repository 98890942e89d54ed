"""What the benchmarks measured, as ``bench.json`` and ``bench-pruning.json`` hold it."""

from dataclasses import asdict, dataclass
from typing import Any

from lpdeploy.machine import Machine


@dataclass(frozen=True)
class LatencyRow:
    """One variant in one phase; times are of one prefill, or of one decoded token.

    Attributes:
        model: Folder or hub name.
        ratio: Share of groups removed.
        engine: Of ``ENGINES``.
        precision: What it computes in.
        merged: Whether LoRA is merged into the weights.
        phase: ``prefill`` or ``decode``.
        tokens: Prompt tokens.
        batch: Rows.
        median_ms: Median over the repeats.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        tokens_per_s: Tokens of all rows a second, at the median.
        relative: Median over that of the merged dense model on the same engine and precision.
        limit_share: Of a prefill, its operations a second over the machine's in a product of
            large matrices; of a decoded token, its bytes a second over the machine's when it
            copies. Both were measured in between. None where they were not.
        peak_bytes: Memory of the loaded model and of the largest trial; None where that cannot
            be told.
        repeats: Trials.
        parameters: Of the model, adapter included where it is unmerged.
        bytes: Of what is loaded from disk, likewise.
    """

    model: str
    ratio: float
    engine: str
    precision: str
    merged: bool
    phase: str
    tokens: int
    batch: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_s: float
    relative: float | None
    limit_share: float | None
    peak_bytes: int | None
    repeats: int
    parameters: int
    bytes: int

    @property
    def spread(self) -> float:
        """The 90th percentile over the 10th: 1 on a machine that nothing disturbs."""
        return self.p90_ms / self.p10_ms if self.p10_ms else 1.0


@dataclass(frozen=True)
class LatencyResult:
    """The latency benchmark: ``bench.json``.

    Attributes:
        machine: What it was measured on.
        limits: What the machine reached in between, ``flops_per_s`` and ``bytes_per_s``; without
            those that were not measured.
        rows: One for each variant and phase, prefill before decode.
        note: What was timed, in sentences, where the models alone do not say it.
    """

    machine: Machine
    limits: dict[str, float]
    rows: tuple[LatencyRow, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what ``bench.json`` holds; without ``note`` where there is none."""
        data = {**asdict(self), "rows": [asdict(row) for row in self.rows]}
        return data if self.note else {k: v for k, v in data.items() if k != "note"}


@dataclass(frozen=True)
class PruningRow:
    """One variant. Times are medians of a step of the whole model; memory is the peak of its steps.

    Attributes:
        criterion: How groups are scored.
        load_in: ``8bit`` for a quantized base.
        offload_gradients: Whether the gradients of ``gradient`` lie in CPU memory.
        precision: What it computes in.
        step_ms: A step, scoring included.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        scoring_ms: The part of it that scoring took.
        cutting_ms: The one removal, of all groups that go; a run spreads it over its events.
        after_ms: A step after the removal, which is not scored.
        tokens_per_s: Tokens of a step over ``step_ms``.
        flops: Floating-point operations of a step, see ``compute_training_flops``, and of scoring.
        after_flops: Of a step after the removal.
        total_s: Time of all measured steps: training, scoring, cutting.
        peak_bytes: Peak memory, of the device, or on a CPU of the process; None if unknown.
        after_bytes: The same after the removal.
        weight_bytes: Of the frozen base.
        beside_bytes: The peak without the base and without what the process held before it.
        planned_bytes: What the plan says of ``peak_bytes``.
        relative_time: ``step_ms`` over that of ``gradient``; None where that was not measured.
        relative_memory: ``peak_bytes``, likewise.
        relative_beside: ``beside_bytes``, likewise.
        steps: Steps before the removal.
    """

    criterion: str
    load_in: str | None
    offload_gradients: bool
    precision: str
    step_ms: float
    p10_ms: float
    p90_ms: float
    scoring_ms: float
    cutting_ms: float
    after_ms: float
    tokens_per_s: float
    flops: float
    after_flops: float
    total_s: dict[str, float]
    peak_bytes: int | None
    after_bytes: int | None
    weight_bytes: int
    beside_bytes: int | None
    planned_bytes: int
    relative_time: float | None
    relative_memory: float | None
    relative_beside: float | None
    steps: int


@dataclass(frozen=True)
class PruningSetting:
    """What all variants of the pruning benchmark share.

    Attributes:
        layers: Layers of the model.
        hidden_size: Its hidden size.
        batch_size: Rows in a step.
        micro_batch_size: Rows in a forward pass.
        seq_len: Tokens in a row.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        ratio: Share of groups that one event removes.
        interleaved: Whether the variants took their steps in turn.
    """

    layers: int
    hidden_size: int
    batch_size: int
    micro_batch_size: int
    seq_len: int
    gradient_checkpointing: bool
    ratio: float | None
    interleaved: bool


@dataclass(frozen=True)
class PruningResult:
    """The pruning benchmark: ``bench-pruning.json``.

    Attributes:
        machine: What it was measured on.
        workload: What all variants share.
        rows: One for each variant.
    """

    machine: Machine
    workload: PruningSetting
    rows: tuple[PruningRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what ``bench-pruning.json`` holds."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

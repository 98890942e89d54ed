"""Everything that shapes a pruning run."""

from collections.abc import Sequence
from dataclasses import dataclass

from lpdeploy.criteria import CRITERIA
from lpdeploy.plan import SCHEDULES, GroupSpec
from lpdeploy.pruning.schedule import RAMPS


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Options of ``lpdeploy prune``, with the paper's values as defaults (section 4.1).

    Attributes:
        ratio: Share of groups (heads, FFN channels) to remove, in [0, 1).
        head_ratio: Share of the heads alone; None for ``ratio``.
        channel_ratio: Share of the FFN channels alone; None for ``ratio``.
        criterion: How groups are scored, one of ``CRITERIA``.
        score_form: ``squared`` (the paper) or ``absolute``: what is summed over a group.
        normalize: Divide the scores of each Linear by their L2 norm before summing.
        offload_gradients: Keep the gradients of the weights, if ``criterion`` needs them, in CPU
            memory.
        schedule: ``joint`` (Algorithm 1), ``separate`` (prune once, then fine-tune) or
            ``one-shot`` (no fine-tuning), one of ``SCHEDULES``.
        calibration_samples: Rows that are scored before the first step, without training on
            them; None for 128, or 0 in ``joint`` where the ramp does without.
        epochs: Passes over the data; ignored where ``steps`` is given.
        steps: Optimizer steps.
        batch_size: Sequences an optimizer step, over all ranks.
        micro_batch_size: Sequences a forward pass; divides ``batch_size``.
        seq_len: Tokens a sequence.
        lr: Peak learning rate of AdamW.
        lr_warmup: Share of the steps over which the rate rises to ``lr``.
        lr_hold: Share of the steps before the rate falls; None for what the ramp says: until
            the last pruning event, or not at all.
        max_grad_norm: Gradients are clipped to this norm.
        lora_rank: Rank of LoRA.
        lora_alpha: LoRA's alpha; scaling = alpha / rank.
        lora_dropout: Dropout on LoRA's input.
        ema_decay: lambda of Eq. 11, in [0, 1).
        prune_every: Steps between pruning events.
        ramp: How pruning is spread over the steps, one of ``RAMPS``.
        warmup: Share of the steps before the first event; None for that of the ramp.
        cooldown: Share of the steps after the last event; None for that of the ramp.
        scope: ``layer`` (the same widths everywhere) or ``global``.
        protect_first: Layers left whole at the input.
        protect_last: Layers left whole at the output.
        round_to: Kept channels are multiples of this.
        round_heads_to: Kept KV heads are multiples of this.
        removal: ``cut`` groups out at each event, or ``mask`` them until the end.
        shard: Spread the weights of the layers over the ranks (masked only).
        load_in: Quantise the frozen base to ``8bit`` or ``4bit`` (masked only); None for neither.
        train_on_prompt: Also learn the prompts of instruction data.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: torch.compile the decoder layers after the last pruning event.
        ignore_memory: Start even where the plan says that memory will not suffice.
        checkpoint_every: Steps between checkpoints; 0 for none.
        dtype: ``auto``, ``fp32`` or ``bf16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Of LoRA's start, the data order and dropout.
    """

    ratio: float = 0.5
    head_ratio: float | None = None
    channel_ratio: float | None = None
    criterion: str = "lora"
    score_form: str = "squared"
    normalize: bool = False
    offload_gradients: bool = False
    schedule: str = "joint"
    calibration_samples: int | None = None
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 128
    micro_batch_size: int = 4
    seq_len: int = 512
    lr: float = 1e-4
    lr_warmup: float = 0.03
    lr_hold: float | None = None
    max_grad_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    ema_decay: float = 0.9
    prune_every: int = 10
    ramp: str = "early"
    warmup: float | None = None
    cooldown: float | None = None
    scope: str = "layer"
    protect_first: int = 0
    protect_last: int = 0
    round_to: int = 32
    round_heads_to: int = 1
    removal: str = "cut"
    shard: bool = False
    load_in: str | None = None
    train_on_prompt: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    ignore_memory: bool = False
    checkpoint_every: int = 50
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_names()
        for ratio in (self.ratio, *self.ratios.values()):
            if not 0 <= ratio < 1:
                raise ValueError(
                    f"ratio {ratio} is outside [0, 1): it is the share of groups to remove, "
                    "0.5 for half of them"
                )
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"--micro-batch-size {self.micro_batch_size} does not divide --batch-size "
                f"{self.batch_size}; choose a divisor of it"
            )
        warmup, cooldown = self.pauses
        if warmup + cooldown >= 1:
            raise ValueError(
                f"warmup {warmup} and cooldown {cooldown} leave no steps for pruning; "
                "their sum must be below 1"
            )
        if self.load_in and CRITERIA[self.criterion].weight_gradients:
            raise ValueError(
                f"`criterion='{self.criterion}'` needs the gradients of the frozen weights, and a "
                f"base in {self.load_in} has none; use `criterion='{PruneOptions.criterion}'`, "
                "which needs LoRA's only, or leave `load_in` out"
            )
        if self.shard:
            self._check_shard()
        if self.schedule != "joint" and self.calibration_samples == 0:
            raise ValueError(
                f"--schedule {self.schedule} prunes before the first step, by the scores of "
                "--calibration-samples rows, which cannot be 0; leave it out for 128"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps {self.steps} is below 1")

    def _check_shard(self) -> None:
        for refused, why in (
            (self.removal == "cut" and "--removal cut", "no group can be cut out of its parts"),
            (self.load_in and f"--load-in {self.load_in}", "quantised weights are not divided"),
            (
                CRITERIA[self.criterion].weight_gradients and f"--criterion {self.criterion}",
                "the gradients of all its weights would take as much memory again",
            ),
        ):
            if refused:
                raise ValueError(
                    f"--shard cannot go with {refused}: {why}; use --removal mask, "
                    f"--criterion {PruneOptions.criterion} and no --load-in, or leave --shard out"
                )

    def _check_names(self) -> None:
        known = {"criterion": tuple(CRITERIA), "schedule": tuple(SCHEDULES), "ramp": tuple(RAMPS)}
        for name, names in known.items():
            if (value := getattr(self, name)) not in names:
                raise ValueError(f"no {name} '{value}'; use one of {', '.join(names)}")

    @property
    def ratios(self) -> dict[str, float]:
        """Share to remove of each kind of group."""
        own = {"heads": self.head_ratio, "channels": self.channel_ratio}
        return {kind: self.ratio if ratio is None else ratio for kind, ratio in own.items()}

    @property
    def multiples(self) -> dict[str, int]:
        """What the kept groups of each kind are a multiple of."""
        return {"heads": self.round_heads_to, "channels": self.round_to}

    def compute_ratio(self, specs: Sequence[GroupSpec]) -> float:
        """Return the share of all groups to remove: ``ratio`` unless heads and channels differ."""
        ratios = self.ratios
        if len(set(ratios.values())) == 1:
            return ratios["heads"]
        asked = sum(spec.num_groups * ratios[spec.kind] for spec in specs)
        return asked / sum(spec.num_groups for spec in specs)

    @property
    def pauses(self) -> tuple[float, float]:
        """Shares of the steps before the first event and after the last."""
        ramp = RAMPS[self.ramp]
        return (
            ramp.warmup if self.warmup is None else self.warmup,
            ramp.cooldown if self.cooldown is None else self.cooldown,
        )

    @property
    def num_calibration_rows(self) -> int:
        """Rows scored before the first step."""
        if self.calibration_samples is None:
            at_once = self.schedule != "joint"
            return 128 if at_once or RAMPS[self.ramp].calibrate else 0
        return self.calibration_samples

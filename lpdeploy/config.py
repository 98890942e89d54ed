"""How a model is pruned: every option with its type, range, default and help, checked once."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lpdeploy.conflicts import BUDGETS, LATENCY, list_conflicts
from lpdeploy.criteria import CRITERIA
from lpdeploy.fields import MAX_COUNT, check_fields, option
from lpdeploy.plan import HEADS, LORA_INITS, PROMPT_FORMATS, SCHEDULES, WidthRequest
from lpdeploy.presets import PRESETS, list_preset
from lpdeploy.ramps import RAMPS

REMOVE = "What to remove"
CHOOSE = "How to choose"
TRAINING = "Training"
DATA = "Data"
MACHINE = "Machine"
GROUPS = (REMOVE, CHOOSE, TRAINING, DATA, MACHINE)
"""Headings of the options, in the order in which they are listed."""

_remove, _choose, _train, _data, _machine = (partial(option, group=group) for group in GROUPS)
_SHARE = {"low": 0, "below": 1}
_COUNT = {"low": 1, "high": MAX_COUNT}
_COUNT_FROM_0 = {"low": 0, "high": MAX_COUNT}
_DEFAULT_RATIO = 0.5
_CALIBRATION_ROWS = 128
_OPEN = "is still open; call lpdeploy.benchmark.target.resolve_options first."


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a model is pruned, with the paper's values as defaults (section 4.1).

    Each field carries its range and its help; see ``lpdeploy.fields``. Without a budget, ``ratio``
    becomes 0.5. ``lpdeploy.benchmark.target.resolve_options`` turns a budget into ratios.

    Raises:
        ValueError: A field has a wrong type or value, or two fields contradict each other.
    """

    # fmt: off
    ratio: float | None = _remove(
        "Remove this share of the groups (heads and FFN channels).",
        default=None, **_SHARE, unset=f"{_DEFAULT_RATIO}",
    )
    head_ratio: float | None = _remove(
        "Remove this share of the heads.", default=None, **_SHARE, unset="`ratio`",
    )
    channel_ratio: float | None = _remove(
        "Remove this share of the FFN channels.", default=None, **_SHARE, unset="`ratio`",
    )
    target_params: int | None = _remove(
        "Leave at most this number of parameters, such as 3.5B. Replaces `ratio`.",
        default=None, low=1, high=10**18,
    )
    target_memory: int | None = _remove(
        "Leave at most this many bytes of weights in the checkpoint's own precision, such as "
        "7GiB. Replaces `ratio`.", default=None, low=1, high=10**18,
    )
    target_latency: float | None = _remove(
        "Stay within this latency on `engine`, such as 30ms. Candidate shapes are measured on "
        "this machine, and heads and channels are chosen separately. Replaces `ratio`.",
        default=None, above=0,
    )
    engine: str | None = _remove("Engine that `target_latency` is measured on.", default=None)
    latency_phase: str | None = _remove(
        "What `target_latency` limits: a whole prompt (prefill) or one token after it (decode).",
        default=None, choices=("prefill", "decode"), unset="prefill",
    )
    latency_tokens: int | None = _remove(
        "Number of prompt tokens that `target_latency` is measured with.",
        default=None, **_COUNT, unset="512",
    )
    scope: str = _remove(
        "Keep the same widths in every layer (a stock checkpoint), or let each layer have its "
        "own.", default="layer", choices=("layer", "global"),
    )
    protect_first: int = _remove(
        "Leave this many layers at the input whole.", default=0, **_COUNT_FROM_0,
    )
    protect_last: int = _remove(
        "Leave this many layers at the output whole.", default=0, **_COUNT_FROM_0,
    )
    round_to: int = _remove("Round kept FFN channels to a multiple of this.", default=32, **_COUNT)
    round_heads_to: int = _remove("Round kept heads to a multiple of this.", default=1, **_COUNT)
    heads: str | None = _remove(
        "Remove KV heads with all query heads that read them (kv-groups), or query heads alone, "
        "the same number for each KV head (query-heads). auto tries both with a one-shot pruning.",
        default=None, choices=(*HEADS, "auto"), unset="kv-groups",
    )
    drop_layers: int | None = _remove(
        "Drop this many whole layers before training, those whose absence raises the loss least. "
        "Ratios are then shares of the layers that stay.",
        default=None, **_COUNT_FROM_0, unset="0, or as `depth` says",
    )
    depth: str | None = _remove(
        "Choose the number of dropped layers (auto): several are tried with a one-shot pruning, "
        "each with the widths that leave as many parameters as asked.",
        default=None, choices=("auto",), unset="`drop_layers`",
    )
    removal: str | None = _remove(
        "Cut groups out at each event, or mask them until the end.",
        default=None, choices=("cut", "mask"), unset="cut; mask with `load_in='4bit'` or `shard`",
    )

    criterion: str = _choose(
        "How groups are scored. "
        + " ".join(f"{name}: {criterion.help}." for name, criterion in CRITERIA.items()),
        default="lora", choices=CRITERIA,
    )
    score_form: str = _choose(
        "Sum squared or absolute values over a group.",
        default="squared", choices=("squared", "absolute"),
    )
    normalize: bool = _choose(
        "Divide the scores of each linear layer by their L2 norm.", default=False,
    )
    refit: bool = _choose(
        "When groups are removed, recompute the remaining columns of o_proj and down_proj by least "
        "squares, so that each layer's output stays close to what it was. Needs no gradients.",
        default=False,
    )
    refit_samples: int | None = _choose(
        "Number of rows to refit over, and to score over with `criterion='obs'`.",
        default=None, **_COUNT,
        unset="enough for 20 tokens per remaining column; in a one-shot or separate run, at least "
        "`calibration_samples`",
    )
    max_loss_increase: float | None = _choose(
        "End the run before an event that raises the loss of held-out rows by more than this, in "
        "nats per token, with the groups that are left then. Fine-tuning ends there too.",
        default=None, above=0,
    )
    ema_decay: float = _choose(
        "Decay of the moving average of the scores (lambda of Eq. 11).", default=0.9, **_SHARE,
    )
    schedule: str = _choose(
        "Prune while fine-tuning (joint), prune once and then fine-tune (separate), or only "
        "prune (one-shot).", default="joint", choices=SCHEDULES,
    )
    calibration_samples: int | None = _choose(
        "Number of rows to score before the first step, without training on them.",
        default=None, **_COUNT_FROM_0,
        unset=f"{_CALIBRATION_ROWS}; 0 in a joint run unless `ramp='early'`",
    )
    prune_every: int = _choose("Number of steps between pruning events.", default=10, **_COUNT)
    ramp: str = _choose(
        "Prune mostly in the first third of the steps (early), as the authors' experiments do "
        "(authors), or in equal portions over all steps (paper).",
        default="early", choices=RAMPS,
    )
    prune_warmup: float | None = _choose(
        "Share of the steps before the first pruning event.",
        default=None, **_SHARE, unset="depends on `ramp`",
    )
    prune_cooldown: float | None = _choose(
        "Share of the steps after the last pruning event.",
        default=None, **_SHARE, unset="depends on `ramp`",
    )

    epochs: int = _train("Number of passes over the data.", default=2, **_COUNT)
    steps: int | None = _train(
        "Number of optimizer steps, in place of `epochs`.", default=None, **_COUNT,
    )
    batch_size: int = _train(
        "Number of sequences per optimizer step, over all ranks.", default=128, **_COUNT,
    )
    micro_batch_size: int = _train(
        "Number of sequences per forward pass. It must divide `batch_size`.", default=4, **_COUNT,
    )
    lr: float | str = _train(
        "Peak learning rate of AdamW. auto tries several for a tenth of the steps each, but at "
        "least 10 and at most 100, and compares the loss of held-out rows.",
        default=1e-4, above=0, words=("auto",),
    )
    lr_warmup: float = _train(
        "Share of the steps over which the learning rate rises to `lr`.", default=0.03, **_SHARE,
    )
    lr_hold: float | None = _train(
        "Share of the steps before the learning rate falls.",
        default=None, **_SHARE, unset="depends on `ramp`",
    )
    max_grad_norm: float = _train("Clip gradients to this norm.", default=1.0, above=0)
    distill: float | None = _train(
        "Weight of the divergence from the unpruned model in the loss, such as 0.5; the "
        "cross-entropy has the rest. The unpruned model runs once over the rows before training.",
        default=None, above=0, high=1,
    )
    distill_temperature: float | None = _train(
        "Divide logits by this for `distill`.", default=None, above=0, unset="1",
    )
    distill_top_k: int | None = _train(
        "Number of tokens that `distill` keeps for each position; all others count as one.",
        default=None, **_COUNT, unset="128",
    )
    distill_live: bool = _train(
        "Keep the unpruned model in memory during training, not its predictions on disk: "
        "slower, with more memory. It is loaded as the base is, so `load_in` makes it smaller.",
        default=False,
    )
    lora_rank: int = _train("Rank of LoRA's matrices A and B.", default=8, **_COUNT)
    lora_alpha: float = _train(
        "LoRA adds this, divided by `lora_rank`, times BA to each weight.", default=16.0, above=0,
    )
    lora_dropout: float = _train("Dropout on LoRA's input.", default=0.05, **_SHARE)
    lora_init: str | None = _train(
        "Start LoRA with B = 0 (peft), or with A = 0 in o_proj and down_proj (groups).",
        default=None, choices=LORA_INITS, unset="as `criterion` needs it",
    )
    seed: int = _train(
        "Seed of LoRA's initial weights, the order of the data and dropout.",
        default=0, low=0, high=2**32 - 1,
    )

    seq_len: int = _data("Number of tokens per sequence.", default=512, low=2, high=MAX_COUNT)
    train_on_prompt: bool = _data(
        "Compute the loss on the prompts of conversations as well.", default=False,
    )
    prompt_format: str | None = _data(
        "How conversations and instruction pairs are written: with the tokenizer's own template "
        "(chat-template), or with a heading for each instruction and response (instruction).",
        default=None, choices=PROMPT_FORMATS, unset="the template if there is one",
    )
    eval_every: int | None = _data(
        "Number of steps between measurements of the loss on `valid`.",
        default=None, **_COUNT, unset="a tenth of the steps",
    )
    eval_samples: int | None = _data(
        "Number of rows of `valid` to measure on.", default=None, **_COUNT, unset="64",
    )

    load_in: str | None = _machine(
        "Quantize the frozen base model while pruning. A 4-bit base is masked, not cut.",
        default=None, choices=("8bit", "4bit"),
    )
    shard: bool = _machine(
        "Spread the base model over the ranks (FSDP2) if it does not fit on one GPU. It is "
        "masked, not cut.", default=False,
    )
    offload_gradients: bool = _machine(
        "Keep the gradients of the weights in CPU memory, if the criterion needs them.",
        default=False,
    )
    gradient_checkpointing: bool = _machine(
        "Recompute activations in the backward pass: less memory, more time.", default=False,
    )
    compile: bool = _machine(
        "Compile the decoder layers with torch.compile after the last event (GPU only).",
        default=False,
    )
    ignore_memory: bool = _machine("Start even if the estimate exceeds free memory.", default=False)
    checkpoint_every: int = _machine(
        "Number of steps between checkpoints; 0 writes none.", default=50, **_COUNT_FROM_0,
    )
    dtype: str = _machine(
        "Precision of the base model. auto is bf16 for a half-precision checkpoint on a GPU, "
        "else fp32.", default="auto", choices=("auto", "fp32", "bf16"),
    )
    device: str = _machine(
        "Device to run on. auto is cuda if torch finds a GPU, else cpu.",
        default="auto", choices=("auto", "cpu", "cuda"),
    )
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if self.ratio is None and self.budget is None:
            object.__setattr__(self, "ratio", _DEFAULT_RATIO)
        for conflict in list_conflicts(self):
            raise ValueError(conflict)

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> "PruneConfig":
        """Return the options of a preset, with others that override it.

        Args:
            name: ``best`` or ``loraprune``; see ``lpdeploy.presets``.
            options: Fields of this class.

        Raises:
            ValueError: There is no such preset, or as the class.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset '{name}'; choose from {', '.join(PRESETS)}")
        return cls(**{**list_preset(name, options, chosen=options), **options})

    def to_json(self) -> dict[str, Any]:
        """Return the options as recipes, manifests and checkpoints record them."""
        chosen = {"removal": self.effective_removal, "lora_init": self.effective_lora_init}
        return {**asdict(self), **chosen}

    @property
    def budget(self) -> str | None:
        """Name of the budget that decides what is left; None where ratios do."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    @property
    def is_open(self) -> bool:
        """Whether something is still to be chosen: what is left, or the learning rate."""
        return self.has_open_shape or isinstance(self.lr, str)

    @property
    def has_open_shape(self) -> bool:
        """Whether it is still to be decided what is left: by a budget, or by trials."""
        return self.budget is not None or "auto" in (self.depth, self.heads)

    @property
    def peak_lr(self) -> float:
        """Peak learning rate.

        Raises:
            ValueError: It is still to be chosen.
        """
        if isinstance(self.lr, str):
            raise ValueError(f"`lr={self.lr!r}` {_OPEN}")  # noqa: TRY004
        return self.lr

    @property
    def effective_removal(self) -> str:
        """``cut`` or ``mask``: ``removal``, or what the base model allows if that is None."""
        return self.removal or ("mask" if self.load_in == "4bit" or self.shard else "cut")

    @property
    def effective_lora_init(self) -> str:
        """``groups`` or ``peft``: ``lora_init``, or what the criterion needs if that is None."""
        return self.lora_init or CRITERIA[self.criterion].lora_init

    @property
    def ratios(self) -> dict[str, float]:
        """Share to remove of each kind of group.

        Raises:
            ValueError: A budget or trials decide, and ratios do not yet.
        """
        if self.has_open_shape:
            raise ValueError(f"`{self.budget or ('depth' if self.depth else 'heads')}` {_OPEN}")
        assert self.ratio is not None  # only a budget leaves it out
        own = {"heads": self.head_ratio, "channels": self.channel_ratio}
        return {kind: self.ratio if ratio is None else ratio for kind, ratio in own.items()}

    def with_ratios(self, **ratios: Any) -> "PruneConfig":
        """Return a copy in which ratios decide what is left, in place of a budget.

        Args:
            ratios: Fields, such as ``ratio`` and ``drop_layers``. As they are if there are none.
        """
        if not ratios:
            return self
        changes: dict[str, Any] = {**dict.fromkeys((*BUDGETS, *LATENCY, "depth")), **ratios}
        return replace(self, **changes)

    def check_resolved(self) -> None:
        """Check that nothing is left to be chosen.

        Raises:
            ValueError: The ratios, the depth or the learning rate are still to be chosen.
        """
        _ = self.ratios, self.peak_lr

    @property
    def widths(self) -> WidthRequest:
        """What decides the widths of the pruned model, before its scores are known."""
        return WidthRequest(
            ratios={} if self.has_open_shape else self.ratios,
            multiples={"heads": self.round_heads_to, "channels": self.round_to},
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            scope=self.scope,
            drop_layers=self.drop_layers or 0,
            heads=self.heads if self.heads in HEADS else WidthRequest.heads,
        )

    @property
    def pauses(self) -> tuple[float, float]:
        """Shares of the steps before the first event and after the last."""
        ramp = RAMPS[self.ramp]
        return (
            ramp.warmup if self.prune_warmup is None else self.prune_warmup,
            ramp.cooldown if self.prune_cooldown is None else self.prune_cooldown,
        )

    @property
    def runs_rows_at_events(self) -> bool:
        """Whether an event runs rows of its own: to score outputs, or for a refit."""
        return self.refit or CRITERIA[self.criterion].score_outputs is not None

    @property
    def num_calibration_rows(self) -> int:
        """Number of rows scored before the first step."""
        if self.calibration_samples is not None:
            return self.calibration_samples
        layers_alone = not self.has_open_shape and not any(self.ratios.values())
        if layers_alone and self.schedule != "one-shot":
            return 0
        at_once = self.schedule != "joint"
        if not at_once and CRITERIA[self.criterion].score_outputs is not None:
            return 0  # which scores groups when they go
        return _CALIBRATION_ROWS if at_once or RAMPS[self.ramp].calibrate else 0

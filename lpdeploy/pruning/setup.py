"""What a run needs before its first step: base model, tokens, LoRA, optimizer, criterion."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lpdeploy import __version__
from lpdeploy.artifacts import compute_sha256
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import (
    Progress,
    TokenDataset,
    build_token_dataset,
    estimate_padding,
)
from lpdeploy.data.cache import find_cache, load_or_build
from lpdeploy.data.chat import find_end_of_turn
from lpdeploy.data.sources import compute_source_hash, load_corpus, name_source
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.families import is_per_layer
from lpdeploy.families.groups import OUTPUT_LINEARS, list_group_specs
from lpdeploy.models.adapters import attach_lora
from lpdeploy.models.chat_format import ChatFormat
from lpdeploy.models.checkpoint import check_weights
from lpdeploy.models.cutting import apply_cut
from lpdeploy.models.find import resolve_model
from lpdeploy.models.loading import (
    DTYPES,
    PRECISIONS,
    compute_model_sha256,
    get_dtype,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from lpdeploy.models.quantized import get_quantization
from lpdeploy.models.shapes import count_kept, list_prunable
from lpdeploy.models.sharded import load_sharded_model
from lpdeploy.plan import GroupSpec, get_output, name_groups
from lpdeploy.pruning.checkpoint import (
    Checkpoint,
    apply_checkpoint,
)
from lpdeploy.pruning.compilation import check_compile
from lpdeploy.pruning.depth import apply_depth, restore_depth
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import check_refit_rows, list_stored
from lpdeploy.pruning.state import build_state
from lpdeploy.pruning.teacher import Teacher
from lpdeploy.pruning.training import Training, count_steps

logger = logging.getLogger(__name__)

# All that a tokenizer may be made of.
_TOKENIZER_FILES = (
    *("*token*.json", "*.model", "vocab.*", "merges.txt", "*.tiktoken"),
    "chat_template*",
)


@dataclass(frozen=True)
class Source:
    """A base model on disk, checked, and what it is to be pruned with."""

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    specs: tuple[GroupSpec, ...]
    prunable: tuple[GroupSpec, ...]

    @property
    def base(self) -> str:
        """What a plan calls it: a folder by its absolute path, a model of the hub by its name."""
        return str(self.folder.resolve()) if Path(self.name).is_dir() else self.name


def load_source(model: str, options: PruneConfig) -> Source:
    """Find a base model and check that it can be pruned as asked.

    Raises:
        LpdeployError: It is none of the supported, quantized or pruned already, or the options
            do not fit it.
    """
    folder = resolve_model(model)
    config = load_config(folder)
    if is_per_layer(config.model_type):
        raise ArtifactError(
            f"'{model}' was pruned to per-layer widths already. Prune its base model instead."
        )
    if getattr(config, "quantization_config", None):
        raise ArtifactError(
            f"'{model}' is quantized already, and what is merged in the end needs weights in full "
            "precision. Prune the model it was made from, with `load_in='8bit'` to save memory."
        )
    if options.seq_len > config.max_position_embeddings:
        raise LpdeployError(
            f"`seq_len` {options.seq_len} is longer than the {config.max_position_embeddings} "
            f"positions of '{model}'. Use `seq_len` {config.max_position_embeddings} or less."
        )
    prunable = list_prunable(config, options.widths)
    specs = list_group_specs(config, heads=options.widths.heads)
    check_weights(folder, config, specs)
    tokenizer = load_tokenizer(folder, config)
    return Source(model, folder, config, tokenizer, specs, prunable)


def load_dataset(
    source: Source,
    data: str,
    options: PruneConfig,
    *,
    split: str = "train",
    cache: bool = True,
    on_progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize what the base is pruned with, or find it as it was tokenized before.

    Args:
        source: The base.
        data: File, folder or hub name.
        options: How to prune.
        split: ``train``, or ``test`` for text to evaluate on; see ``load_corpus``.
        cache: Whether to look for the tokens of an earlier run, and to keep them for later ones.
        on_progress: Is told (examples tokenized, all examples).

    Raises:
        LpdeployError: The data cannot be read, or gives no row.
    """
    tokenizer = source.tokenizer
    assert tokenizer is not None  # only a source with rows of its own does without

    def build() -> TokenDataset:
        logger.info("Tokenizing '%s'.", name_source(data))
        return build_token_dataset(
            load_corpus(data, split=split),
            tokenizer,
            seq_len=options.seq_len,
            train_on_prompt=options.train_on_prompt,
            prompt_format=options.prompt_format,
            on_progress=on_progress,
        )

    text = compute_source_hash(data, split=split) if cache else None
    if text is None:
        return _tell_unused(build(), options)
    identity = {
        "text": text,
        "tokenizer": type(tokenizer).__name__,
        "files": compute_sha256(source.folder, patterns=_TOKENIZER_FILES),
        "versions": {
            "lpdeploy": __version__,
            **{name: version(name) for name in ("tokenizers", "transformers")},
        },
        "seq_len": options.seq_len,
        "train_on_prompt": options.train_on_prompt,
        "prompt_format": options.prompt_format,
    }
    return _tell_unused(load_or_build(find_cache(), identity, build=build), options)


def _tell_unused(dataset: TokenDataset, options: PruneConfig) -> TokenDataset:
    """Say which options have no effect on plain text."""
    given = [f"`{name}`" for name in ("train_on_prompt", "prompt_format") if getattr(options, name)]
    if given and dataset.chat_template is None:
        logger.warning("Without effect, as the data is plain text: %s.", ", ".join(given))
    return dataset


def find_chat_format(source: Source, dataset: TokenDataset) -> ChatFormat | None:
    """Return how conversations were written; None for plain text."""
    template = dataset.chat_template
    if template is None or source.tokenizer is None:
        return None
    return ChatFormat(template, find_end_of_turn(source.tokenizer, template))


def build_training(
    source: Source,
    dataset: TokenDataset,
    options: PruneConfig,
    checkpoint: Checkpoint | None,
    ranks: Ranks | None = None,
    *,
    teacher: Teacher | None = None,
    load: Callable[..., Any] = load_model,
) -> Training:
    """Load the base on its device, put LoRA on it, and go to where a checkpoint left off.

    Args:
        source: The base, and what of it may go.
        dataset: Tokens.
        options: How to prune.
        checkpoint: Where to go on from; None for a new run.
        ranks: The processes that share each batch; None for this one alone.
        teacher: What the unpruned model expects in the rows; None without distillation.
        load: What gives the base; called as ``load_model`` is.

    Raises:
        LpdeployError: Device or weights cannot be used.
    """
    ranks = ranks or Ranks(device=torch.device(resolve_device(options.device)))
    dtype = resolve_dtype(options.dtype, source.config, device=ranks.device.type)
    if options.compile:
        check_compile(ranks.device)
    model = _load_base(source, options, load, dtype=dtype, device=ranks.device)
    stored = list_stored(source.folder, source.config, source.prunable) if options.refit else {}
    kept = {} if checkpoint is None else checkpoint.select("kept")
    depth = (
        apply_depth(
            *(model, source.prunable, dataset, options), ranks=ranks, dtype=DTYPES[dtype],
            stored=stored, base_sha256=_find_hash(source, options),
        )
        if checkpoint is None
        else restore_depth(model, source.prunable, kept)
    )  # fmt: skip
    specs = tuple(spec for spec in source.prunable if spec.layer not in depth.layers)
    if options.effective_removal == "cut":
        apply_cut(model, specs, kept)
    if options.gradient_checkpointing:
        apply_checkpointing(model)
    wrapped = _attach_lora(model, source.name, options)
    if not options.shard:  # which is where it belongs, and cannot be moved
        wrapped = wrapped.to(ranks.device)
    optimizer = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )
    state = build_state(
        model, specs, options, ranks=ranks, kept={**kept, **depth.kept}, stored=stored
    )
    state.refitted.update(depth.refitted)
    training = Training(
        model=wrapped,
        optimizer=optimizer,
        device=ranks.device,
        dtype=DTYPES[dtype],
        dataset=dataset,
        state=state,
        options=options,
        steps=count_steps(options, len(dataset)),
        ranks=ranks,
        teacher=teacher,
    )
    if checkpoint is not None:
        apply_checkpoint(checkpoint, training)
    return training


def _find_hash(source: Source, options: PruneConfig) -> str | None:
    """Return the hash of the base where layers go, whose choice is remembered by it."""
    return compute_model_sha256(source.folder) if options.drop_layers else None


def check_refit_data(source: Source, dataset: TokenDataset, options: PruneConfig) -> None:
    """Check that there are enough rows for the refit that the options ask for, if any.

    Raises:
        LpdeployError: There are too few.
    """
    if not options.refit:
        return
    counts = count_kept(source.config, options.widths)
    if options.drop_layers:  # the other layers are refitted as wide as they are
        counts = {spec.kind: spec.num_groups for spec in source.prunable}
    outputs = {spec.kind: get_output(spec) for spec in source.prunable}
    columns = max(counts[kind] * piece.block for kind, piece in outputs.items())
    check_refit_rows(options, dataset.lengths, columns=columns)


def _load_base(
    source: Source,
    options: PruneConfig,
    load: Callable[..., Any],
    *,
    dtype: str,
    device: torch.device,
) -> Any:
    if options.shard:
        return load_sharded_model(source.folder, dtype=dtype, device=device)
    # A quantized base is made where it stays; any other is cut first, then moved.
    place = str(device) if options.load_in else "cpu"
    # What is solved again needs the precision, and is a third of a layer's weights.
    unquantized = OUTPUT_LINEARS if options.refit else ()
    return load(
        source.folder, dtype=dtype, device=place, load_in=options.load_in, unquantized=unquantized
    )


def apply_checkpointing(model: Any) -> None:
    """Let the layers of a model compute their activations again in the backward pass."""
    # An 8-bit product keeps its input outside of what autograd saves, where only the reentrant
    # kind lets go of it; that in turn wants an input with a gradient.
    reentrant = any(get_quantization(module) == "8bit" for module in model.modules())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()


def _attach_lora(model: Any, base: str, options: PruneConfig) -> Any:
    wrapped = attach_lora(
        model,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        seed=options.seed,
        init=options.effective_lora_init,
    )
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def describe_start(source: Source, training: Training) -> str:
    """Say where and in which precision it runs, on how much, and what will be left."""
    options, dataset = training.options, training.dataset
    stored = PRECISIONS[get_dtype(source.config)]
    base = f" over a base in {options.load_in}" if options.load_in else ""
    used = PRECISIONS[training.dtype]
    counts = count_kept(source.config, options.widths)
    kept = ", ".join(
        f"{counts[spec.kind]} of {spec.num_groups} {name_groups(spec)}"
        for spec in source.prunable[:2]
    )
    share = estimate_padding(
        dataset.lengths,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        steps=training.steps,
        seed=options.seed,
    )
    padding = f", padding {share:.1%} of what is computed" if share else ""
    dropped = f", dropped as too long: {dataset.num_dropped}" if dataset.num_dropped else ""
    dropped += f", without the end of an answer: {dataset.num_cut}" if dataset.num_cut else ""
    where = str(training.device)
    if (size := training.ranks.size) > 1:
        where = f"{size} ranks on {training.device.type}"
        base += ", sharded" if options.shard else ""
    dropped_layers = f"layers dropped: {options.drop_layers}; " if options.drop_layers else ""
    scored = options.num_calibration_rows
    again = ", some more than once," if scored > len(dataset) else ""
    first = f"{scored} rows{again} run before the first step; " if scored else ""
    return (
        f"{where}, {used}{base} (checkpoint {stored}); {len(dataset)} rows "
        f"of at most {options.seq_len} tokens{dropped}{padding}; {first}{training.steps} steps, "
        f"{training.schedule.describe()}; {dropped_layers}"
        f"a layer keeps {kept}" + (" on average" if options.scope == "global" else "")
    )

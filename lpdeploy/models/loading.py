"""Loading a checkpoint, from a folder or the hub, with a clear word where it cannot be."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from lpdeploy.artifacts import compute_sha256
from lpdeploy.environment import is_remote_code_trusted
from lpdeploy.errors import ArtifactError, LpdeployError, quote_error
from lpdeploy.families import FAMILIES, get_family, is_per_layer
from lpdeploy.models.config_values import find_bad_value
from lpdeploy.models.find import describe_no_config, resolve_model
from lpdeploy.models.finite import round_weight
from lpdeploy.models.generation import load_generation_settings
from lpdeploy.models.quantized import (
    apply_training_layout,
    build_quantization,
    check_4bit_widths,
    list_misshapen,
    list_scales,
)
from lpdeploy.models.weight_files import index_weights, is_tied
from lpdeploy.records import load_record

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
"""torch dtype -> name of the precision."""


def find_config(model: str) -> Any:
    """Load the config of a folder or hub name, without its weights.

    Raises:
        ArtifactError: As ``resolve_model`` and ``load_config``.
    """
    return load_config(resolve_model(model, weights=False))


def load_config(folder: Path) -> PretrainedConfig:
    """Load the config of a supported model, stock or of per-layer widths.

    Raises:
        ArtifactError: The model type is not supported, or the config is not valid.
    """
    if not (folder / "config.json").is_file():
        raise describe_no_config(str(folder))
    raw = load_record(dict[str, Any], folder / "config.json", fix="Copy the checkpoint anew.")
    model_type = str(raw.get("model_type"))
    try:
        get_family(model_type)
    except KeyError:
        known = ", ".join(family.load_classes()[1].__name__ for family in FAMILIES.values())
        names = raw.get("architectures")
        named = names[0] if isinstance(names, list) and names else model_type
        raise ArtifactError(
            f"'{folder}' is a {named!s:.80}, which lpdeploy does not know. Use {known}."
        ) from None
    config_class, _ = get_model_classes(model_type)
    try:
        config = config_class.from_pretrained(folder)
        wrong = find_bad_value(config)
    except Exception as error:  # transformers reads a field before it checks it
        raise ArtifactError(
            f"The config of '{folder}' is not valid: {quote_error(error)}. Correct its config.json."
        ) from error
    if wrong is not None:
        raise ArtifactError(
            f"The config of '{folder}' is not valid: {wrong}. Correct its config.json."
        )
    load_generation_settings(folder)  # which transformers reads with the model
    if config.tie_word_embeddings and not is_tied(folder):
        config.tie_word_embeddings = False
    # A config may name an attention kernel on the hub, which is code that would be run.
    config._attn_implementation = "sdpa"
    if config.num_attention_heads % config.num_key_value_heads:
        raise ArtifactError(
            f"The config of '{folder}' is not valid: {config.num_attention_heads} query heads do "
            f"not divide over {config.num_key_value_heads} KV heads. Correct its config.json."
        )
    return config


def get_model_classes(model_type: str) -> tuple[Any, Any]:
    """Return the (config class, model class) of a supported model type, stock or per-layer.

    Raises:
        LpdeployError: The family has no class whose layers differ.
    """
    family = get_family(model_type)
    if not is_per_layer(model_type):
        return family.load_classes()
    if family.load_per_layer_classes is None:
        raise LpdeployError(
            f"A {family.model_type} has no class whose layers have different widths. Use "
            "`scope='layer'` and protect no layers."
        )
    return family.load_per_layer_classes()


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    load_in: str | None = None,
    unquantized: Collection[str] = (),
) -> Any:
    """Load a checkpoint for inference, whole and on one device.

    Args:
        folder: What ``resolve_model`` returned.
        dtype: ``auto`` (that of the checkpoint), ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        load_in: ``8bit`` or ``4bit`` to quantize the projections of the layers as they are
            read, so that they are never all there in full; None to leave them.
        unquantized: Projections that ``load_in`` leaves in ``dtype``, such as ``o_proj``.

    Returns:
        A transformers causal LM in eval mode.

    Raises:
        ArtifactError: A weight is missing, of another shape, or holds NaN or infinity, or its file
            is damaged.
        LpdeployError: A weight is too large for ``dtype``, or a 4-bit model has widths that a CPU
            computes wrong.
        MissingDependencyError: ``load_in`` is given and bitsandbytes is not installed.
        ValueError: ``dtype`` or ``load_in`` is none of those.
    """
    import transformers

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be auto, {', '.join(DTYPES)}")

    transformers.utils.logging.disable_progress_bar()  # a bar of ours or none
    config = load_config(folder)
    _, model_class = get_model_classes(config.model_type)
    quantization = _build_quantization(
        load_in, config, dtype=dtype, device=device, unquantized=unquantized
    )
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **quantization,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactError(
            f"The weights of '{folder}' cannot be loaded: {quote_error(error)}. Copy the "
            "checkpoint anew."
        ) from error
    # transformers fills what is missing with random values and only logs it.
    wrong = {
        *info["missing_keys"],
        *(name for name, *_ in info["mismatched_keys"]),
        *(list_misshapen(model) if load_in else ()),
    }
    refuse_incomplete(folder, wrong)
    _refuse_infinite(folder, config, model)
    if load_in is not None:
        if torch.device(device).type == "cpu":
            check_4bit_widths(model)
        apply_training_layout(model)
        return model.eval()  # on its device already: weights are quantized there
    return model.to(device).eval()


def _refuse_infinite(folder: Path, config: PretrainedConfig, model: nn.Module) -> None:
    """Refuse weights that are no numbers, or became none in the precision that they were loaded in.

    Raises:
        ArtifactError: A weight of the checkpoint holds NaN or infinity.
        LpdeployError: It is too large for the precision.
    """
    parameters = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
    for name, numbers in (*parameters, *list_scales(model)):
        if not numbers.isfinite().all():
            stored = index_weights(folder, config)[name].load()
            fix = "Use `precision='bf16'` or `precision='fp32'`."
            round_weight(stored, numbers.dtype, name=name, fix=fix)
            raise ArtifactError(f"{name} cannot be quantized. Load it without `load_in`.")


def refuse_incomplete(folder: Path, wrong: Collection[str]) -> None:
    """Refuse a checkpoint of which the weights ``wrong`` are missing or of another shape.

    Raises:
        ArtifactError: There are any; names the first.
    """
    if wrong:
        raise ArtifactError(
            f"'{folder}' lacks {len(wrong)} weights of its architecture, or has them in another "
            f"shape, first {min(wrong)}. Give a complete checkpoint."
        )


def _build_quantization(
    load_in: str | None,
    config: PretrainedConfig,
    *,
    dtype: str,
    device: str,
    unquantized: Collection[str],
) -> dict[str, Any]:
    """Build the arguments of ``from_pretrained`` that quantize; none for a plain model."""
    if load_in is None:
        return {}
    computed = DTYPES.get(dtype, get_dtype(config))
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        # accelerate takes a quantized model only where the number of its device is told.
        place = torch.device("cuda", torch.cuda.current_device())
    return {
        "quantization_config": build_quantization(load_in, dtype=computed, unquantized=unquantized),
        "device_map": {"": place},
    }


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer lies beside a model."""
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return any((folder / name).is_file() for name in files)


_SAMPLE = "A word, 1.5 and \u00e9\u4e2d\U0001f642\n\t<x>"


def load_tokenizer(folder: Path, config: PretrainedConfig) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ArtifactError: There is none, or it has more tokens than the model embeds.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ArtifactError(f"'{folder}' has no tokenizer. Copy its tokenizer files beside it.")
    try:
        # Neither asks on the terminal whether to run code: not that of a tokenizer, nor, with the
        # config given, the modelling file beside a folder of per-layer widths.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=is_remote_code_trusted()
        )
        tokenizer(_SAMPLE)  # some settings are only looked at when it is used
    except BaseException as error:  # tokenizers raises nothing more precise, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise ArtifactError(
                f"The tokenizer of '{folder}' is code of its own, which could do anything that you "
                "can. Read it, and if you trust it, allow it with `trust_remote_code=True`."
            ) from None
        raise ArtifactError(
            f"The tokenizer of '{folder}' cannot be loaded: {quote_error(error)}. Copy its files "
            "anew."
        ) from error
    if "auto_map" in tokenizer.init_kwargs and not is_remote_code_trusted():
        logger.warning(
            "The tokenizer of '%s' names code of its own, which was not run. If texts are split in "
            "another way than you know, see `trust_remote_code`.",
            folder,
        )
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ArtifactError(
            f"The tokenizer of '{folder}' has the token {largest}, and its model embeds only "
            f"{config.vocab_size} tokens. Use the tokenizer that the model was trained with."
        )
    return tokenizer


def get_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the checkpoint's own precision; float32 where its config names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def resolve_dtype(dtype: str, config: PretrainedConfig, *, device: str) -> str:
    """Turn ``auto`` into a precision to compute in.

    A half-precision checkpoint runs in bf16 on a GPU that has it and in fp32 on a CPU, whose half
    kernels are slow and incomplete; fp16 is never chosen by itself, since it overflows in training.

    Returns:
        ``fp32``, ``fp16`` or ``bf16``.
    """
    if dtype != "auto":
        return dtype
    half = get_dtype(config) in (torch.float16, torch.bfloat16)
    if half and device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return "bf16"
    return "fp32"


def resolve_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu``, and refuse a device that is not there.

    Raises:
        ArtifactError: CUDA is asked for and torch finds none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArtifactError(
            f"`device` {device}: torch {torch.__version__} finds no CUDA device. "
            "Use `device='cpu'`, or install a CUDA build of torch."
        )
    return device


def compute_model_sha256(folder: Path, *, known: Mapping[str, str] | None = None) -> str:
    """Hash what a model computes with: its safetensors files, their index and its config.

    Args:
        folder: Of the model.
        known: Hashes of files in it that were computed already, by name.
    """
    patterns = ("*.safetensors", "*.safetensors.index.json", "config.json")
    return compute_sha256(folder, patterns=patterns, known=known)

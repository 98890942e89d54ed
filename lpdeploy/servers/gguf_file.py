"""A checkpoint as a GGUF file, written one weight at a time with the ``gguf`` library."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lpdeploy.errors import ArtifactError, LpdeployError, MissingDependencyError, quote_error
from lpdeploy.families import GgufArchitecture, get_family
from lpdeploy.families.groups import get_head_dim
from lpdeploy.models.finite import check_finite, round_weight
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.models.loading import (
    get_model_classes,
    load_config,
    load_tokenizer,
    refuse_incomplete,
)
from lpdeploy.models.weight_files import index_weights
from lpdeploy.servers.gguf_types import TYPES
from lpdeploy.servers.gguf_vocab import Vocabulary, build_vocabulary

_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STOPS = ("eos", "eot", "eom")
_ROPE_FACTORS = "rope_freqs.weight"
_STEADY_ROPES = ("default", "linear", "llama3")


def save_gguf(model: Path, file: Path, *, name: str, precision: str) -> list[str]:
    """Write a checkpoint with its tokenizer as one GGUF file.

    Args:
        model: A Hugging Face folder whose layers are alike.
        file: Where to.
        name: What the file calls the model.
        precision: Of its matrices: a key of ``TYPES``. Rows of ``int8`` (or ``q8_0``, the same)
            that are no multiple of its block of 32 stay in fp16.

    Returns:
        What to know of the file, a sentence each.

    Raises:
        MissingDependencyError: ``gguf`` is not installed.
        ArtifactError: The checkpoint lacks a weight or tokenizer, or its tokenizer is none of
            llama.cpp's.
        LpdeployError: Its rotary positions are none that a file can state, or a weight is larger
            than fp16 can say.
    """
    gguf = _load_library()
    config = load_config(model)
    tokenizer = load_tokenizer(model, config)
    vocabulary = build_vocabulary(tokenizer, rows=config.vocab_size)
    factors = compute_rope_factors(config)
    names = _list_names(gguf, model, config)
    architecture = gguf.MODEL_ARCH[get_architecture(config).name]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _add_metadata(writer, config, name=name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[TYPES[precision]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    stops = list_stop_tokens(model, config)
    notes = _add_vocabulary(gguf, writer, vocabulary, tokenizer, stops)
    kinds = {}
    if factors is not None:
        kinds[_ROPE_FACTORS] = _declare(gguf, writer, _ROPE_FACTORS, factors.shape, "F32")
    for source, (target, shape) in names.items():
        kinds[source] = _declare(gguf, writer, target, shape, TYPES[precision])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(_encode(gguf, factors, kinds[_ROPE_FACTORS], name=_ROPE_FACTORS))
    for source, tensor in _iterate_weights(model, names, config):
        writer.write_tensor_data(_encode(gguf, tensor, kinds[source], name=source))
    writer.close()
    return [*vocabulary.notes, *notes]


def measure_types(file: Path) -> dict[str, float]:
    """Return the share of the weights in matrices that each type holds, the largest first.

    Args:
        file: A GGUF file.

    Raises:
        ArtifactError: It is incomplete.
    """
    counts: Counter[str] = Counter()
    try:
        for tensor in _load_library().GGUFReader(file).tensors:
            if len(tensor.shape) > 1:
                counts[tensor.tensor_type.name] += int(tensor.n_elements)
    except (ValueError, IndexError) as error:
        raise ArtifactError(
            f"'{file.name}' is incomplete ({quote_error(error)}). Check that the disk has room for "
            "it, and run the command again."
        ) from error
    return {name: count / counts.total() for name, count in counts.most_common()}


def _load_library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "gguf is not installed; `target=llamacpp` needs it. "
            "Install with: pip install 'lpdeploy[gguf]'."
        ) from error
    return gguf


def get_architecture(config: PretrainedConfig) -> GgufArchitecture:
    """Return what llama.cpp runs a model as.

    Raises:
        LpdeployError: It has no architecture for the family.
    """
    architecture = get_family(config.model_type).gguf
    if architecture is None:
        raise LpdeployError(
            f"llama.cpp has no architecture for a {config.model_type}. Use `target='vllm'` or "
            "`target='genai'`."
        )
    return architecture


def compute_rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return what each rotary frequency is divided by, shape (head_dim / 2,); None where by 1.

    Taken as the quotient of transformers' own frequencies, so that no formula is written twice.

    Raises:
        LpdeployError: The frequencies depend on how long the text is, or the architecture reads
            no factors.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in _STEADY_ROPES or not get_architecture(config).rope_factors:
        raise LpdeployError(
            f"`target=llamacpp` does not write rotary positions of type '{kind}' for a "
            f"{config.model_type}. Use `target=vllm` or `target=genai`."
        )
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
    head_dim = get_head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float()


def _list_names(
    gguf: Any, model: Path, config: PretrainedConfig
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map each weight of the checkpoint to its name and shape in the file, layer by layer."""
    _, model_class = get_model_classes(config.model_type)
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in model_class(config).named_parameters()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)  # readers take the embedding where it is missing
    stored = {name: own.info.shape for name, own in index_weights(model, config).items()}
    wrong = {name for name, shape in wanted.items() if stored.get(name) != shape}
    refuse_incomplete(model, wrong)
    architecture = gguf.MODEL_ARCH[get_architecture(config).name]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return {
        name: (table.get_name(name, try_suffixes=(".weight", ".bias")), shape)
        for name, shape in wanted.items()
    }


def count_positions(config: PretrainedConfig) -> int:
    """Return how long a text may be: no longer than the window, since llama.cpp has none there."""
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return min(config.max_position_embeddings, window)


def _add_metadata(writer: Any, config: PretrainedConfig, *, name: str) -> None:
    """State the shape of a model, in the terms of llama.cpp."""
    head_dim = get_head_dim(config)
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(count_positions(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(
    gguf: Any,
    writer: Any,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
) -> list[str]:
    """Write tokens, special tokens and merges; return what the file cannot say."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.split is not None:
        writer.add_tokenizer_pre(vocabulary.split)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    # Saved anew, so that it is read as it was loaded, whatever files it came from.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        merges = vocabulary.model == "gpt2"
        rows = len(vocabulary.pieces)
        special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=rows)
    # Where a file does not say whether bos and eos are added, llama.cpp decides by itself.
    bare, added = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    special.add_special_token |= {
        "bos": added[: len(added) - len(bare)].count(tokenizer.bos_token_id) > 0,
        "eos": len(added) > len(bare) and added[-1] == tokenizer.eos_token_id,
    }
    # llama.cpp ends an answer at each of three kinds of token; the first is the tokenizer's own.
    own = tokenizer.eos_token_id
    ordered = sorted(set(stops), key=lambda token: (token != own, stops.index(token)))
    special.special_token_ids |= dict(zip(_STOPS, ordered, strict=False))
    special.add_to_gguf(writer, quiet=True)
    if len(ordered) <= len(_STOPS):
        return []
    left = ", ".join(repr(tokenizer.decode([token])) for token in ordered[len(_STOPS) :])
    return [f"llama.cpp is told of three tokens that end an answer. Stop at {left} yourself."]


def _declare(gguf: Any, writer: Any, name: str, shape: tuple[int, ...], kind: str) -> str:
    """Enter a tensor into the header, and return the type it gets."""
    if len(shape) == 1:
        kind = "F32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % block:
        kind = "F16"
    quant = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    size = torch.Size(shape).numel() // block * block_bytes
    # Its dtype counts only where the type is not given.
    writer.add_tensor_info(name, list(shape), None, size, raw_dtype=quant)
    return kind


def _iterate_weights(
    model: Path, names: dict[str, tuple[str, tuple[int, ...]]], config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in the order of ``names``, one in memory at a time."""
    stored = index_weights(model, config)
    interleaved = get_architecture(config).interleaved
    for name in names:
        tensor = stored[name].load()
        if interleaved and ("q_proj" in name or "k_proj" in name):
            tensor = interleave_rotary_rows(tensor, head_dim=get_head_dim(config))
        yield name, tensor


def interleave_rotary_rows(tensor: Tensor, *, head_dim: int) -> Tensor:
    """Order the rows of q or k as llama.cpp's ``llama`` rotates them.

    transformers rotates row i of a head with row i + head_dim / 2, llama.cpp rows 2i and 2i + 1.

    Args:
        tensor: Weight (H * D, in) or bias (H * D,).
        head_dim: D.
    """
    # (H * D, ...) -> (H, 2, D / 2, ...) -> (H, D / 2, 2, ...) -> (H * D, ...)
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _encode(gguf: Any, tensor: Tensor, kind: str, *, name: str) -> Any:
    """Turn a weight into the bytes of its type, as an array."""
    if kind == "Q8_0":
        check_finite(tensor, name=name)
        return gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    fix = "Use `precision=bf16` or `precision=fp32`."
    encoded = round_weight(tensor, _DTYPES[kind], name=name, fix=fix).contiguous()
    return encoded.view(torch.uint8).numpy() if kind == "BF16" else encoded.numpy()

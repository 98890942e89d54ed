"""The servers: which shapes each one loads, how that was checked, and who packages for it.

To add a server, write its packager in a module of its own and add a row to ``SERVERS``.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lpdeploy.errors import OptionError
from lpdeploy.families import get_family, is_per_layer
from lpdeploy.families.groups import get_head_dim, has_bias, uses_silu
from lpdeploy.models.shapes import list_widths
from lpdeploy.servers.gguf_types import K_BLOCK

_ANSWERS = ("yes", "condition", "no")
# Weights of a row that share a scale in llama.cpp's types other than K-quants.
_GGUF_BLOCK = 32
_ORT_HEAD_MULTIPLE = 16


class Finding(NamedTuple):
    """What stands against a shape: ``condition`` or ``no``, and why in a sentence."""

    loads: str
    why: str


Rule = Callable[[Any, int], Finding | None]
"""Looks at a config and the number of tensor-parallel ranks; None where it has no objection.

The first line of a rule's docstring is what it objects to: docs/serving.md shows it.
"""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a packager wrote.

    Attributes:
        command: Starts the server.
        notes: What else to know, a sentence each.
        details: What only packages of this kind have, such as ``precision``; JSON-able.
    """

    command: str
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


Packager = Callable[..., Packed]
"""``package_X(place, folder, *, output, ...)`` fills a temporary folder from a model.

``output`` is where the folder will be, for the commands that name it.
"""


@dataclass(frozen=True)
class Server:
    """A server or library that opens checkpoints or what is exported of them.

    Attributes:
        name: As users know it.
        version: The version that the rules were checked against; empty if it was never tried.
        checked: How they were checked: the test that loads shapes into the server, ``by hand``,
            ``read`` (its source), or ``not tried``.
        how: What to give the server if no rule objects to a shape.
        rules: What the server may object to.
        target: Name of its package for ``lpdeploy package``; empty if there is none.
        packager: ``module:function`` that writes the package. It is imported when it is needed.
    """

    name: str
    version: str
    checked: str
    how: str
    rules: tuple[Rule, ...]
    target: str = ""
    packager: str = ""

    def load_packager(self) -> Packager:
        """Import the function that writes the package."""
        module, name = self.packager.split(":")
        packager: Packager = getattr(importlib.import_module(module), name)
        return packager


@dataclass(frozen=True)
class Verdict:
    """Whether a server loads a shape.

    Attributes:
        name: Name of the server.
        loads: What the rules say: ``yes``, ``condition`` or ``no``.
        why: What to give the server, on which condition it loads the shape, or why it does not.
        tested: Version that the rules were checked against; empty if the server was never tried.
        checked: How they were checked.
        tried: Whether anybody checked the rules. If not, ``yes`` is only what its docs promise.
    """

    name: str
    loads: str
    why: str
    tested: str
    checked: str
    tried: bool


def list_verdicts(config: PretrainedConfig, *, tensor_parallel: int = 1) -> list[Verdict]:
    """Say of every server whether it loads a model of this config.

    Args:
        config: Config of a pruned or unpruned model, as ``build_pruned_config`` returns it.
        tensor_parallel: Number of GPUs that share the heads.
    """
    return [judge(server, config, tensor_parallel) for server in SERVERS]


def list_targets() -> list[str]:
    """List the names that ``lpdeploy package --target`` takes."""
    return [server.target for server in SERVERS if server.target]


def get_server(target: str) -> Server:
    """Return the server that a package target stands for.

    Raises:
        OptionError: There is no such target.
    """
    for server in SERVERS:
        if target and server.target == target:
            return server
    raise OptionError(
        f"There is no package `target={target}`. Use one of {', '.join(list_targets())}."
    )


def judge(server: Server, config: PretrainedConfig, ranks: int = 1) -> Verdict:
    """Say whether a server loads a model of this config, divided over so many GPUs."""
    found = [finding for rule in server.rules if (finding := rule(config, ranks))]
    loads = max((finding.loads for finding in found), key=_ANSWERS.index, default="yes")
    why = " ".join(finding.why for finding in found if finding.loads == loads) or server.how
    return Verdict(server.name, loads, why, server.version, server.checked, bool(server.version))


def refuse_per_layer(config: PretrainedConfig, _: int) -> Finding | None:
    """Layers of different widths."""
    if not is_per_layer(config.model_type):
        return None
    return Finding("no", "Its layers have different widths. Prune with `scope=layer`.")


def need_own_code(config: PretrainedConfig, _: int) -> Finding | None:
    """Layers of different widths, unless trust_remote_code lets their modelling file run."""
    if not is_per_layer(config.model_type):
        return None
    return Finding(
        "condition", "With trust_remote_code=True: its layers have different widths, which the "
        "modelling file beside the weights knows.",
    )  # fmt: skip


def divide_over_ranks(config: PretrainedConfig, ranks: int) -> Finding | None:
    """Heads or channels that do not divide over the ranks of tensor parallelism."""
    for width in list_widths(config):
        if width.heads % ranks:
            per_group = width.heads // width.kv_heads
            multiple = ranks // math.gcd(ranks, per_group)
            counts = (max(1, width.kv_heads // multiple), -(-width.kv_heads // multiple))
            near = dict.fromkeys(count * multiple * per_group for count in counts)
            fewer = max(n for n in range(1, min(ranks, width.heads + 1)) if width.heads % n == 0)
            return Finding(
                "no",
                f"{width.heads} attention heads do not divide over `tensor_parallel={ranks}`. Use "
                f"`round_heads_to={multiple}` ({' or '.join(map(str, near))} heads), or "
                f"`tensor_parallel={fewer}`.",
            )
        if width.kv_heads % ranks and ranks % width.kv_heads:
            return Finding(
                "no",
                f"{width.kv_heads} KV heads neither divide over `tensor_parallel={ranks}` nor the "
                f"reverse. Use `round_heads_to={ranks}`.",
            )
        if width.channels % ranks:
            return Finding(
                "no",
                f"{width.channels} channels do not divide over `tensor_parallel={ranks}`. Use "
                "`round_to` with a multiple of it.",
            )
    return None


def run_on_one_gpu(_: Any, ranks: int) -> Finding | None:
    """Several ranks: graphs and engines are not divided."""
    if ranks == 1:
        return None
    return Finding("no", "A graph runs on one GPU. Use `tensor_parallel=1`, or another server.")


def need_same_heads(config: PretrainedConfig, _: int) -> Finding | None:
    """Layers with different numbers of heads: one number makes the cache of all."""
    if len({width.kv_heads for width in list_widths(config)}) == 1:
        return None
    return Finding(
        "no", "Its layers have different numbers of heads. OrtRunner runs them; for GenAI prune "
        "with `scope=layer`.",
    )  # fmt: skip


def need_heads_of_16(config: PretrainedConfig, _: int) -> Finding | None:
    """Heads of no multiple of 16 numbers, which GroupQueryAttention wants."""
    head_dim = get_head_dim(config)
    if head_dim % _ORT_HEAD_MULTIPLE == 0:
        return None
    return Finding("no", f"Its heads have {head_dim} numbers, no multiple of {_ORT_HEAD_MULTIPLE}.")


def need_trt_for_other_heads(config: PretrainedConfig, _: int) -> Finding | None:
    """Heads of no multiple of 16 numbers, or no SiLU, which leave --engine trt alone."""
    if not uses_silu(config):
        return Finding("condition", f"`engine=ort` has no '{config.hidden_act}': use `engine=trt`.")
    if need_heads_of_16(config, 1) is None:
        return None
    return Finding(
        "condition", f"Its heads have {get_head_dim(config)} numbers, no multiple of "
        f"{_ORT_HEAD_MULTIPLE}, which `engine=ort` needs: use `engine=trt`.",
    )  # fmt: skip


def need_silu(config: PretrainedConfig, _: int) -> Finding | None:
    """An activation of the FFN other than SiLU."""
    if uses_silu(config):
        return None
    return Finding("no", f"It computes the FFN with SiLU only, and not with '{config.hidden_act}'.")


def fit_gguf_blocks(config: PretrainedConfig, _: int) -> Finding | None:
    """Rows of no multiple of 256, which it then quantizes in other types, or not at all."""
    head_dim = get_head_dim(config)
    rows = {config.hidden_size}
    rows |= {size for w in list_widths(config) for size in (w.channels, w.heads * head_dim)}
    if odd := [row for row in sorted(rows) if row % _GGUF_BLOCK]:
        return Finding(
            "condition",
            f"Quantized types want rows of a multiple of {_GGUF_BLOCK}, and {odd[0]} is none: such "
            "tensors stay in f16.",
        )
    if odd := [row for row in sorted(rows) if row % K_BLOCK]:
        channels = {width.channels for width in list_widths(config)}
        way = f"`round_to={K_BLOCK}` for the channels, or " if channels & set(odd) else ""
        return Finding(
            "condition",
            f"K-quants want rows of a multiple of {K_BLOCK}, and {odd[0]} is none: such "
            f"tensors take a type of more bits. Use {way}`precision=q8_0`, q4_0 or iq4_nl.",
        )
    return None


def need_gguf_architecture(config: PretrainedConfig, _: int) -> Finding | None:
    """A family that it has no architecture for, or one with a bias of o_proj that has no place."""
    architecture = get_family(config.model_type).gguf
    if architecture is None:
        return Finding("no", f"It has no architecture for a {config.model_type}.")
    if architecture.output_bias or not has_bias(config, "self_attn.o_proj"):
        return None
    return Finding("no", "Its architecture for this family has no place for a bias of o_proj.")


_TEST = "tests/servers/test_check.py"
LLAMA_CPP = "llama.cpp"
_JOB = "tests/slow/servers/test_servers.py by the optional job"
_FOLDER = "The checkpoint folder"

SERVERS: tuple[Server, ...] = (
    Server(
        "transformers", "5.23.0", f"{_TEST}, served in tests/servers/test_vllm.py",
        f"{_FOLDER}.", (need_own_code,),
    ),
    Server(
        "vllm", "0.32.0", f"{_JOB} on a CPU, several ranks read",
        f"{_FOLDER}: 'vllm serve FOLDER'. 'lpdeploy package --target vllm' adds the right options.",
        (refuse_per_layer, divide_over_ranks, need_silu),
        "vllm", "lpdeploy.servers.vllm:package_vllm",
    ),
    Server(
        "sglang", "0.5.23", "read",
        f"{_FOLDER}: 'python -m sglang.launch_server --model-path FOLDER'.",
        (refuse_per_layer, divide_over_ranks, need_silu),
    ),
    Server(
        "tensorrt", "rtx 1.7.1", "tests/engines/trt/test_exporter.py",
        "'lpdeploy export --engine trt'.", (run_on_one_gpu,),
    ),
    Server(
        "tensorrt-llm", "", "not tried",
        f"{_FOLDER}, with its PyTorch backend: 'trtllm-serve FOLDER'.",
        (refuse_per_layer, divide_over_ranks),
    ),
    Server(
        "triton", "2.51.0", "tests/slow/servers/triton/test_server.py with ONNX Runtime",
        "'lpdeploy package --target triton'.", (run_on_one_gpu, need_trt_for_other_heads),
        "triton", "lpdeploy.servers.triton.packager:package_triton",
    ),
    Server(
        "onnxruntime-genai", "0.18.0", f"{_TEST}, tokens in tests/servers/test_genai.py",
        "'lpdeploy package --target genai'.",
        (need_same_heads, need_heads_of_16, need_silu, run_on_one_gpu),
        "genai", "lpdeploy.servers.genai:package_genai",
    ),
    Server(
        LLAMA_CPP, "llama-cpp-python 0.3.36", f"tests/servers/test_llamacpp.py, {_JOB}",
        "'lpdeploy package --target llamacpp'.",
        (refuse_per_layer, need_gguf_architecture, need_silu, fit_gguf_blocks),
        "llamacpp", "lpdeploy.servers.llamacpp:package_llamacpp",
    ),
)  # fmt: skip
"""A server loads a shape if none of its rules objects."""

"""Compare ways to round weights to 4 bits: error, bits, perplexity, and the time of a product.

    python -m tools.measure.int4 MODEL valid.txt [MODEL valid.txt ...] --output FILE

The weights of all matrices are rounded and unpacked in torch, so a way needs no kernel to be tried.
Activations are not rounded. Bits count the scale of each block, a float32 as ONNX Runtime wants it
beside float32 activations, and its zero point. Last, one product of each kind of packed weight
takes turns in ONNX Runtime.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from lpdeploy.data.batches import build_token_stream
from lpdeploy.data.sources import load_corpus
from lpdeploy.models.loading import load_config, load_model, load_tokenizer
from tools.measure.common import build_parser, report, save_measurement

_ROWS = 4096  # rounded at once, to bound the memory of a search
_WIDTH, _TRIALS = 2048, 400
_EIGHT_BITS = ("v_proj",)

Round = Callable[[Tensor], Tensor]
"""Rounds blocks of weights, shape (..., block), and returns them unpacked."""


def find_extreme(blocks: Tensor) -> Tensor:
    """Return the number of each block that is farthest from zero, with its sign."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def round_symmetric(blocks: Tensor, *, bits: int = 4) -> Tensor:
    """Round as ONNX Runtime does: the largest number goes to the end of the range with its sign."""
    low = -(2 ** (bits - 1))
    scale = find_extreme(blocks) / low
    return _apply(blocks, scale, torch.zeros_like(scale), low, -low - 1)


def _apply(blocks: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return ((blocks * inverse + zero).round().clamp(low, high) - zero) * scale


def choose(blocks: Tensor, tried: list[Tensor], *, power: int = 0) -> Tensor:
    """Take for each block what has the least squared error, weighted by a power of the weights."""
    weight = blocks.abs() ** power
    errors = torch.stack([(weight * (each - blocks) ** 2).sum(-1) for each in tried])
    best = errors.argmin(0)[None, ..., None].expand(1, *blocks.shape)
    return torch.stack(tried).gather(0, best)[0]


def search_symmetric(blocks: Tensor, *, power: int = 0) -> Tensor:
    """Try scales at which the largest number is cut by up to one step, or fills less."""
    extreme = find_extreme(blocks)
    steps = (-7.0, -7.33, -7.67, -8.0, -8.33, -8.67, -9.0)
    zero = torch.zeros_like(extreme)
    tried = [_apply(blocks, extreme / step, zero, -8, 7) for step in steps]
    return choose(blocks, tried, power=power)


def round_asymmetric(blocks: Tensor, *, cut: float = 1.0, shift: int = 0) -> Tensor:
    """Round between the smallest and the largest number, with a whole zero point.

    Args:
        blocks: The weights.
        cut: Share of the range that is kept.
        shift: Added to the zero point.
    """
    low, high = (ends.clamp(*sides) for ends, sides in (
        (blocks.amin(-1, keepdim=True), (None, 0)), (blocks.amax(-1, keepdim=True), (0, None)),
    ))  # fmt: skip
    scale = cut * (high - low) / 15
    middle = torch.where(scale == 0, 0, (low + high) / 2 / scale)
    zero = ((7.5 - middle).round() + shift).clamp(0, 15)
    return _apply(blocks, scale, zero, 0, 15)


def search_asymmetric(blocks: Tensor) -> Tensor:
    """Try ranges that are cut, and the zero points beside the nearest."""
    cuts = (1.0, 0.95, 0.9, 0.85, 0.8)
    tried = [round_asymmetric(blocks, cut=cut, shift=k) for cut in cuts for k in (-1, 0, 1)]
    return choose(blocks, tried)


def round_hqq(blocks: Tensor) -> Tensor:
    """Round by ONNX Runtime's HQQ, whose zero points are no whole numbers."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415 - its own torch
        HQQWeightOnlyQuantizer,
    )

    rows = blocks.reshape(-1, blocks.shape[-1])
    quantizer = HQQWeightOnlyQuantizer(None)
    codes, scale, zero = quantizer.quantize_internal(rows, 4, group_size=rows.shape[-1])
    return ((codes - zero) * scale).reshape(blocks.shape)


@dataclass(frozen=True)
class Way:
    """A way to round.

    Attributes:
        round: Rounds blocks.
        block: Weights that share a scale.
        zero_bits: Bits of a block's zero point.
        eight: Names of the projections that are rounded to 8 bits instead.
    """

    round: Round = round_symmetric
    block: int = 32
    zero_bits: int = 0
    eight: tuple[str, ...] = ()

    def takes_eight(self, name: str) -> bool:
        """Tell whether a weight is rounded to 8 bits."""
        return name.rpartition(".")[2] in self.eight

    def fit_block(self, columns: int) -> int:
        """Return the block of a matrix, smaller where its rows are no multiple of it."""
        return math.gcd(self.block, columns)

    def count_bits(self, name: str, columns: int) -> float:
        """Return the bits of one weight."""
        block = self.fit_block(columns)
        if self.takes_eight(name):
            return 8 + 32 / block
        return 4 + (32 + self.zero_bits) / block


WAYS = {
    "symmetric": Way(),
    "symmetric, least error": Way(search_symmetric),
    "symmetric, least error weighted by squares": Way(partial(search_symmetric, power=2)),
    "asymmetric": Way(round_asymmetric, zero_bits=4),
    "asymmetric, least error": Way(search_asymmetric, zero_bits=4),
    "HQQ": Way(round_hqq, zero_bits=32),
    "symmetric, blocks of 16": Way(block=16),
    "symmetric, blocks of 64": Way(block=64),
    "symmetric, v_proj in 8 bits": Way(eight=_EIGHT_BITS),
    "asymmetric, least error, v_proj in 8 bits": Way(
        search_asymmetric, zero_bits=4, eight=_EIGHT_BITS
    ),
}


def round_weight(weight: Tensor, name: str, way: Way) -> Tensor:
    """Round one matrix (out, in) in parts of some rows."""
    used = partial(round_symmetric, bits=8) if way.takes_eight(name) else way.round
    block = way.fit_block(weight.shape[1])
    parts = [used(part.unflatten(-1, (-1, block))).flatten(-2) for part in weight.split(_ROWS)]
    return torch.cat(parts)


def measure_perplexity(model: Any, segments: list[Tensor]) -> float:
    """Measure perplexity over segments."""
    loss = sum(
        float(
            nn.functional.cross_entropy(
                model(ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="sum"
            )
        )
        for ids in segments
    )
    return math.exp(loss / sum(len(ids) - 1 for ids in segments))


def measure_model(folder: Path, text: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Round a model in every way, one after the other."""
    config = load_config(folder)
    tokenizer = load_tokenizer(folder, config)
    stream = torch.as_tensor(
        build_token_stream(load_corpus(str(text), split="test"), tokenizer), dtype=torch.long
    )
    size = options.seq_len
    segments = [each for each in stream.split(size)[: options.segments] if len(each) == size]
    model = load_model(folder, dtype="fp32")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    result: dict[str, Any] = {"perplexity": measure_perplexity(model, segments), "ways": {}}
    for done, (label, way) in enumerate(WAYS.items()):
        squares = bits = 0.0
        for name, linear in linears.items():
            linear.weight.data.copy_(round_weight(plain[name], name, way))
            squares += float((linear.weight - plain[name]).square().sum())
            bits += way.count_bits(name, linear.in_features) * linear.weight.numel()
        result["ways"][label] = {
            "perplexity": measure_perplexity(model, segments),
            "error": math.sqrt(squares / sum(float(w.square().sum()) for w in plain.values())),
            "bits": bits / sum(weight.numel() for weight in plain.values()),
        }
        report(done + 1, len(WAYS))
    return result | {"text": text.name, "segments": len(segments), "seq_len": size}


def build_product(*, bits: int, block: int, zeros: Any = None) -> onnxruntime.InferenceSession:
    """Build a product of one token with a packed square matrix, as decoding computes it."""
    rng, blocks = np.random.default_rng(0), _WIDTH // block
    packed = rng.integers(0, 255, (_WIDTH, blocks, block * bits // 8), dtype=np.uint8)
    constants = {"packed": packed, "scales": np.ones((_WIDTH, blocks), np.float32)}
    if zeros is not None:
        constants["zeros"] = zeros(blocks)
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=_WIDTH, N=_WIDTH,
        bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _WIDTH]) for name in ("x", "y")
    ]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], stored)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), settings)


def measure_products() -> Mapping[str, Any]:
    """Time one product of each kind in turn, in microseconds."""
    kinds: dict[str, dict[str, Any]] = {
        "symmetric": {"bits": 4, "block": 32},
        "whole zero points": {
            "bits": 4, "block": 32, "zeros": lambda n: np.full(_WIDTH * n // 2, 0x77, np.uint8),
        },
        "zero points in float32": {
            "bits": 4, "block": 32, "zeros": lambda n: np.full((_WIDTH, n), 7.5, np.float32),
        },
        "blocks of 16": {"bits": 4, "block": 16},
        "blocks of 64": {"bits": 4, "block": 64},
        "8 bits": {"bits": 8, "block": 32},
    }  # fmt: skip
    sessions = {name: build_product(**kind) for name, kind in kinds.items()}
    states = {"x": np.ones((1, _WIDTH), np.float32)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for trial in range(_TRIALS + 20):  # the first ones warm up
        for name, session in sessions.items():
            begun = time.perf_counter()
            session.run(None, states)
            if trial >= 20:
                times[name].append(1e6 * (time.perf_counter() - begun))
    return {
        name: {
            "median_us": statistics.median(all_times),
            "p10_us": float(np.percentile(all_times, 10)),
        }
        for name, all_times in times.items()
    }


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("pairs", nargs="+", type=Path, metavar="MODEL TEXT")
    parser.add_argument("--names", default="", help="what the models are called, with commas")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--segments", type=int, default=20)
    options = parser.parse_args()
    pairs = list(zip(options.pairs[::2], options.pairs[1::2], strict=True))
    names = options.names.split(",") if options.names else [model.name for model, _ in pairs]
    document: dict[str, Any] = {"models": {}, "product": {"width": _WIDTH, "trials": _TRIALS}}
    with torch.inference_mode():
        for name, (model, text) in zip(names, pairs, strict=True):
            document["models"][name] = measure_model(model, text, options)
            save_measurement(options.output, document)
    document["product"]["kinds"] = measure_products()
    save_measurement(options.output, document)


if __name__ == "__main__":
    main()

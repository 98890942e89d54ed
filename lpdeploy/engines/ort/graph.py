"""A LLaMA-family decoder as a graph in ONNX Runtime's own operators.

The graph is written from the config, not traced: that takes a second whatever the depth, reads the
weights only while the file is written, and takes layers of different widths as they are. It uses
`GroupQueryAttention`, which rotates queries and keys itself and appends to a cache buffer in place,
`SkipSimplifiedLayerNormalization`, which adds the residual, and `MatMulNBits` for int8 and int4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from transformers import PretrainedConfig

from lpdeploy.engines.ort.rotary import compute_rotary_tables, get_window
from lpdeploy.engines.ort.weights import BlockFormat, Weights
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import get_head_dim, uses_silu
from lpdeploy.models.shapes import LayerWidths, list_widths
from lpdeploy.models.weight_files import EMBEDDING, HEAD

OPSET = 23
_IR_VERSION = 11
_MICROSOFT = "com.microsoft"
# int8 activations inside MatMulNBits: what ONNX Runtime's fast kernels on a CPU compute with.
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class Lengths:
    """How long each row of the batch is, in the words of ``GroupQueryAttention``.

    They are inputs, so that a caller who decodes binds them once and writes new numbers there. To
    find them in an attention mask takes a dozen small operators a step, which a small model feels;
    GenAI's graph has those (``genai.py``).

    Attributes:
        seqlens_k: Index of each row's last token in its cache, shape (B,), int32.
        total: Tokens of the longest row, past and present, a scalar, int32.
        positions: Where in its new tokens each row's wanted logits are, shape (B, K, 1), int64.
    """

    seqlens_k: ir.Value
    total: ir.Value
    positions: ir.Value


def build_decoder(
    config: PretrainedConfig,
    weights: Weights,
    *,
    dtype: str,
    max_seq_len: int,
    quantization: BlockFormat | None = None,
) -> ir.Model:
    """Build the graph of a causal LM with a KV cache.

    Inputs are ``input_ids`` (B, T), with padding, if any, on the right; the three of ``Lengths``;
    and ``past_key_values.N.key`` / ``.value`` (B, kv_heads_N, P, head_dim). Outputs are ``logits``
    (B, K, vocab), float32, and ``present.N.key`` / ``.value``, which may be the same memory as the
    past where that is long enough.

    Args:
        config: A config of a supported model type, stock or of per-layer widths.
        weights: Where the constants come from.
        dtype: ``float32``, ``float16`` or ``bfloat16``: of activations and cache.
        max_seq_len: Positions in the tables of rotary angles.
        quantization: How projections and head are packed; None to leave them.

    Raises:
        LpdeployError: The operators do not take this model's heads or positions, or a block does
            not fit a width.
    """
    if get_head_dim(config) % 16:
        raise LpdeployError(
            f"ONNX Runtime's attention wants heads of a multiple of 16, this model's have "
            f"{get_head_dim(config)}. Use `engine='onnx'`."
        )
    if not uses_silu(config):
        raise LpdeployError(
            f"Engine ort computes the FFN with SiLU, and this model uses '{config.hidden_act}'. "
            "Use `engine='onnx'`."
        )
    return _Decoder(config, weights, dtype, quantization).build(max_seq_len)


class _Decoder:
    """The graph while it is written."""

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Weights,
        dtype: str,
        quantization: BlockFormat | None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.dtype = from_torch_dtype(self.torch_dtype)
        self.quantization = quantization
        self.shares_values = config.num_key_value_heads < config.num_attention_heads
        self.head_dim = get_head_dim(config)
        self.tape = ir.tape.Tape()
        self.constants: dict[str, ir.Value] = {}  # those that several nodes read
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    def build(self, max_seq_len: int) -> ir.Model:
        """Write all of it, in the order in which it is computed."""
        ids = self._add_input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        lengths = self._add_lengths()
        tables = self._add_rotary_tables(max_seq_len)
        hidden = self._add_embedding(ids)
        normed = self._add_norm(hidden, "model.layers.0.input_layernorm.weight")
        widths = list_widths(self.config)
        for layer, width in enumerate(widths):
            prefix = f"model.layers.{layer}"
            attended = self._add_attention(layer, width, normed, lengths, tables)
            if layer == len(widths) - 1:
                # From here on a token sees no other: go on with those whose logits are wanted.
                attended = self._op("GatherND", attended, lengths.positions, batch_dims=1)
                hidden = self._op("GatherND", hidden, lengths.positions, batch_dims=1)
            attended = self._add_linear(attended, f"{prefix}.self_attn.o_proj")
            norm = f"{prefix}.post_attention_layernorm.weight"
            normed, hidden = self._add_residual(hidden, attended, norm)
            output = self._add_mlp(prefix, normed)
            following = f"model.layers.{layer + 1}.input_layernorm.weight"
            norm = "model.norm.weight" if layer == len(widths) - 1 else following
            normed, hidden = self._add_residual(hidden, output, norm)
        self._add_head(normed)
        return self._finish()

    def _add_lengths(self) -> Lengths:
        return Lengths(
            seqlens_k=self._add_input("seqlens_k", ir.DataType.INT32, ("batch",)),
            total=self._add_input("total_sequence_length", ir.DataType.INT32, ()),
            positions=self._add_input(
                "logits_positions", ir.DataType.INT64, ("batch", "num_logits", 1)
            ),
        )

    def _add_embedding(self, ids: ir.Value) -> ir.Value:
        """Look tokens up: (B, T) -> (B, T, hidden)."""
        form = self.quantization
        if form is None or not self.config.tie_word_embeddings:
            return self._op("Gather", self._add_weight(EMBEDDING), ids, axis=0)
        # The head's own table, unpacked row by row: a copy in full precision would be most of the
        # bytes of a small model.
        rows, columns = self.weights.get_shape(EMBEDDING)
        packed, scales = self._add_packed(EMBEDDING, form=form)
        table = self._op("Reshape", packed, self._add_int64([rows, columns * form.bits // 8]))
        return self.tape.op(
            "GatherBlockQuantized",
            [table, ids, scales],
            {
                "bits": form.bits,
                "block_size": form.block_size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=_MICROSOFT,
            name="embed_tokens",
        )

    def _add_rotary_tables(self, max_seq_len: int) -> tuple[ir.Value, ir.Value]:
        cos, sin = compute_rotary_tables(self.config, max_seq_len)
        return tuple(
            self.tape.initializer(ir.tensor(table.to(self.torch_dtype), name=f"{name}_cache"))
            for name, table in (("cos", cos), ("sin", sin))
        )  # type: ignore[return-value]

    def _add_attention(
        self,
        layer: int,
        width: LayerWidths,
        hidden: ir.Value,
        lengths: Lengths,
        tables: tuple[ir.Value, ir.Value],
    ) -> ir.Value:
        """Project, rotate, append to the cache and attend: (B, T, hidden) -> (B, T, H*D)."""
        module = f"model.layers.{layer}.self_attn"
        query, key, value = self._add_projections(hidden, module)
        shape = ("batch", width.kv_heads, "past", self.head_dim)
        past = [
            self._add_input(f"past_key_values.{layer}.{part}", self.dtype, shape)
            for part in ("key", "value")
        ]
        attended, *present = self.tape.op_multi_out(
            "GroupQueryAttention",
            [query, key, value, *past, lengths.seqlens_k, lengths.total, *tables],
            {
                "num_heads": width.heads,
                "kv_num_heads": width.kv_heads,
                "do_rotary": 1,
                "local_window_size": get_window(self.config, layer),
            },
            num_outputs=3,
            domain=_MICROSOFT,
            name=module,
        )
        for part, output in zip(("key", "value"), present, strict=True):
            shape = ("batch", width.kv_heads, "total", self.head_dim)
            self._add_output(output, f"present.{layer}.{part}", self.dtype, shape)
        return attended

    def _add_projections(
        self, hidden: ir.Value, module: str
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Project to queries, keys and values: in one product where nothing comes in between."""
        parts = [f"{module}.{part}_proj" for part in ("q", "k", "v")]
        names = [f"{part}.weight" for part in parts]
        if (
            any(f"{part}.bias" in self.weights or self.weights.has_lora(part) for part in parts)
            or f"{module}.q_norm.weight" in self.weights
        ):
            return self._project_apart(hidden, module, parts)
        # The operator splits what it gets: (B, T, (H + 2 K) * D)
        if self._choose_form(names[-1]) == self.quantization:
            return self._add_product(hidden, *names, module=f"{module}.qkv_proj"), None, None
        both = self._add_product(hidden, *names[:2], module=f"{module}.qk_proj")
        value = self._add_product(hidden, names[2], module=parts[2])
        return self._op("Concat", both, value, axis=-1), None, None

    def _project_apart(
        self, hidden: ir.Value, module: str, parts: Sequence[str]
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        query, key, value = (self._add_linear(hidden, part) for part in parts)
        query = self._add_head_norm(query, f"{module}.q_norm.weight")
        return query, self._add_head_norm(key, f"{module}.k_norm.weight"), value

    def _add_head_norm(self, states: ir.Value, name: str) -> ir.Value:
        """Normalize each head by itself, where the model has such a norm."""
        if name not in self.weights:
            return states
        split = self._add_int64([0, 0, -1, self.head_dim])
        heads = self._op("Reshape", states, split)  # (B, T, H*D) -> (B, T, H, D)
        normed = self._add_norm(heads, name)
        return self._op("Reshape", normed, self._add_int64([0, 0, -1]))  # -> (B, T, H*D)

    def _add_mlp(self, prefix: str, hidden: ir.Value) -> ir.Value:
        gate = self._add_linear(hidden, f"{prefix}.mlp.gate_proj")
        up = self._add_linear(hidden, f"{prefix}.mlp.up_proj")
        # x * sigmoid(alpha x) is SiLU at alpha 1.
        activated = self.tape.op("QuickGelu", [gate], {"alpha": 1.0}, domain=_MICROSOFT)
        return self._add_linear(self._op("Mul", activated, up), f"{prefix}.mlp.down_proj")

    def _add_head(self, hidden: ir.Value) -> None:
        tied = self.config.tie_word_embeddings
        name = EMBEDDING if tied else HEAD
        if tied and self.quantization is None:
            table = self._add_weight(name)  # the embedding's own table, read across
            logits = self.tape.op(
                "FusedMatMul", [hidden, table], {"transB": 1}, domain=_MICROSOFT, name="lm_head"
            )
        else:
            logits = self._add_product(hidden, name, module="lm_head")
        if self.dtype != ir.DataType.FLOAT:
            logits = self._op("Cast", logits, to=ir.DataType.FLOAT.value)
        shape = ("batch", "num_logits", self.config.vocab_size)
        self._add_output(logits, "logits", ir.DataType.FLOAT, shape, index=0)

    def _add_linear(self, states: ir.Value, module: str) -> ir.Value:
        """Add one projection, with LoRA beside it and a bias where there are."""
        output = self._add_product(states, f"{module}.weight", module=module)
        lora = self.weights.build_lora(module)
        if lora is not None:
            down, up = (self.tape.initializer(tensor) for tensor in lora)
            update = self._op("MatMul", self._op("MatMul", states, down), up)
            output = self._op("Add", output, update)
        if f"{module}.bias" in self.weights:
            output = self._op("Add", output, self._add_weight(f"{module}.bias"))
        return output

    def _add_product(self, states: ir.Value, *names: str, module: str) -> ir.Value:
        form = self._choose_form(*names)
        if form is None:
            weight = self.weights.build_constant(*names, transpose=True)
            return self._op("MatMul", states, self.tape.initializer(weight), name=module)
        rows, columns = self.weights.get_shape(*names)
        return self.tape.op(
            "MatMulNBits",
            [states, *self._add_packed(*names, form=form)],
            {
                "K": columns,
                "N": rows,
                "bits": form.bits,
                "block_size": form.block_size,
                "accuracy_level": _INT8_ACTIVATIONS,
            },
            domain=_MICROSOFT,
            name=module,
        )

    def _add_norm(self, states: ir.Value, name: str) -> ir.Value:
        return self._op(
            "RMSNormalization",
            states,
            self._add_weight(name),
            axis=-1,
            epsilon=self.config.rms_norm_eps,
        )

    def _add_residual(
        self, hidden: ir.Value, update: ir.Value, norm: str
    ) -> tuple[ir.Value, ir.Value]:
        """Return norm(hidden + update) and hidden + update."""
        normed, total = ir.Value(), ir.Value()
        mean, deviation = ir.Value(name=""), ir.Value(name="")  # left out: only training wants them
        self.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [hidden, update, self._add_weight(norm)],
            {"epsilon": self.config.rms_norm_eps},
            outputs=[normed, mean, deviation, total],
            domain=_MICROSOFT,
        )
        return normed, total

    def _add_weight(self, name: str) -> ir.Value:
        if name not in self.constants:
            self.constants[name] = self.tape.initializer(self.weights.build_constant(name))
        return self.constants[name]

    def _choose_form(self, *names: str) -> BlockFormat | None:
        """Return how a weight is packed: values that several query heads read have 8 bits.

        They are few, and their errors are those of all these heads.
        """
        form = self.quantization
        if form is None or not self.shares_values or not names[0].endswith("v_proj.weight"):
            return form
        return replace(form, bits=8)

    def _add_packed(self, *names: str, form: BlockFormat) -> tuple[ir.Value, ir.Value]:
        """Add a weight in blocks, and its scales; once, though embedding and head may share it."""
        parts = self.weights.build_quantized(*names, form=form)
        for part in parts:
            if part.name not in self.constants:
                self.constants[str(part.name)] = self.tape.initializer(part)
        packed, scales = (self.constants[str(part.name)] for part in parts)
        return packed, scales

    def _add_int64(self, value: int | Sequence[int]) -> ir.Value:
        name = f"int64_{value}".replace(" ", "")
        if name not in self.constants:
            tensor = ir.tensor(value, dtype=ir.DataType.INT64, name=name)
            self.constants[name] = self.tape.initializer(tensor)
        return self.constants[name]

    def _op(self, kind: str, *inputs: ir.Value, name: str | None = None, **values: Any) -> ir.Value:
        return self.tape.op(kind, inputs, values, name=name)

    def _add_input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def _add_output(
        self,
        value: ir.Value,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int | str],
        *,
        index: int | None = None,
    ) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.insert(len(self.outputs) if index is None else index, value)

    def _finish(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET, _MICROSOFT: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="lpdeploy")

"""How much memory a run will need: pure functions of the model's shape and the options.

Counted is what PyTorch keeps, tensor by tensor: weights, LoRA with its gradients and moments, what
autograd saves in a forward pass, the buffers of the loss, and the gradients of the weights if the
criterion needs them. ``tests/pruning/test_memory.py`` compares it with the tensors alive in a pass,
``tools/measure/memory.py`` with the peak of whole runs.
"""

from dataclasses import asdict, dataclass, replace

from transformers import PretrainedConfig

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA, Criterion
from lpdeploy.families.groups import LINEARS, OUTPUT_LINEARS
from lpdeploy.models.shapes import LayerWidths, count_parameters, list_projections, list_widths
from lpdeploy.pruning.loss import count_chunk_tokens
from lpdeploy.pruning.refit import TOKENS_A_COLUMN

_FLOAT = 4  # bytes
# Measured on glibc 2.36 by tools/measure/memory.py: small objects settle in the holes that tensors
# leave, which are then too small for the next tensor. Larger tensors have pages of their own.
_HEAP_WASTE = {False: 1.5, True: 1.1}  # by whether layers are computed again
_HEAP_LIMIT = 32 << 20
_ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
# nf4: half a byte a weight, a scale of one byte every 64 and one of four bytes every 64 * 256.
_BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}

# Float32 blocks of rows in ``pruning/importance.py``: the weights, the factor, a temporary.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs at its peak, by what for.

    Attributes:
        process: What the process holds already: the libraries. 0 on a GPU.
        weights: Of the frozen base.
        adapters: LoRA: weights, gradients and AdamW's two moments, all float32.
        gradients: Of the base's weights, if the criterion needs them.
        activations: What autograd saves in a micro-batch, and the buffers of the loss.
        scoring: Blocks of rows, the scores, and a quantized weight in float32.
        heap: On a CPU, what the C library's heap cannot use again between tensors.
    """

    process: int
    weights: int
    adapters: int
    gradients: int
    activations: int
    scoring: int
    heap: int = 0

    @property
    def beside(self) -> int:
        """All but the weights and the process."""
        parts = (self.adapters, self.gradients, self.activations, self.scoring, self.heap)
        return sum(parts)

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.weights + self.beside

    def to_json(self) -> dict[str, int]:
        """Return all parts and the total."""
        return {**asdict(self), "total": self.total}


def plan_memory(
    config: PretrainedConfig,
    options: PruneConfig,
    *,
    dtype: str,
    device: str,
    process: int = 0,
    shards: int = 1,
) -> MemoryPlan:
    """Plan the memory of a run over an unpruned base, at its peak.

    The peak is in the first steps, since groups only go.

    Args:
        config: Of the base.
        options: How it is pruned.
        dtype: What it computes in: ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda``: how many tokens have logits at a time, and a heap or none.
        process: Bytes that the process holds before it loads anything.
        shards: Processes that the layers' weights are divided over; everything else, and the
            layer that runs and the one that is next, every process holds whole.
    """
    layers = [_Layer(config, width, options, dtype, device) for width in list_widths(config)]
    factors = sum(options.lora_rank * (i + o) for layer in layers for i, o in layer.sizes)
    held = options
    if options.schedule == "one-shot" and CRITERIA[options.criterion].forward_only:
        held = replace(options, gradient_checkpointing=True)  # no more than the layer that runs
    activations = _plan_activations(config, layers, held, _ITEMSIZE[dtype], device=device)
    gradients = _plan_gradients(layers, options, activations, dtype, device)
    if options.runs_rows_at_events:  # nothing else is kept while groups are removed
        activations = max(activations, _plan_refit(config, layers, options, _ITEMSIZE[dtype]))
    weights = _plan_weights(config, layers, options, dtype, shards=shards)
    if options.distill_live:
        # The teacher is quantized as a whole, which is less where a refit leaves parts of the base.
        weights += _plan_weights(config, layers, replace(options, refit=False, refit_samples=None),
                                 dtype, shards=shards)  # fmt: skip
    # Autocast keeps a copy of A and B in half precision through a forward pass.
    copies = factors * 2 if dtype != "fp32" else 0
    return MemoryPlan(
        process=process,
        weights=weights,
        adapters=4 * _FLOAT * factors + copies,
        gradients=gradients,
        activations=activations,
        scoring=_plan_scoring(options, layers),
        heap=_plan_heap(config, options, dtype) if device == "cpu" else 0,
    )


@dataclass(frozen=True)
class _Layer:
    """What one decoder layer needs."""

    config: PretrainedConfig
    width: LayerWidths
    options: PruneConfig
    dtype: str
    device: str

    @property
    def criterion(self) -> Criterion:
        return CRITERIA[self.options.criterion]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list_projections(self.config, self.width)

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @property
    def num_weights(self) -> int:
        return sum(columns * rows for columns, rows in self.sizes)

    @property
    def inputs(self) -> int:
        """Bytes a token of the inputs of all projections but o's, which attention saves anyway."""
        return self.itemsize * (2 * self.config.hidden_size + self.width.channels)

    @property
    def keeps_inputs(self) -> bool:
        """Whether the products with the base keep their inputs: for its gradient, or in 8 bits."""
        return self.criterion.weight_gradients or self.options.load_in == "8bit"

    @property
    def noise(self) -> int:
        """Bytes that dropout keeps for each of its inputs' numbers.

        A CPU keeps the factors themselves, in float32, which peft casts the input to; a GPU keeps
        booleans.
        """
        if not self.options.lora_dropout:
            return 0
        return _FLOAT if self.device == "cpu" else 1

    @property
    def saved(self) -> int:
        """Bytes a token that autograd saves."""
        size = self.itemsize
        # Each projection's dropout, or cast to half precision, makes an input of its own.
        copied = self.noise > 0 or size < _FLOAT
        columns = sum(columns for columns, _ in self.sizes)
        lora = columns * (size + self.noise) if copied else self.inputs
        lora += len(self.sizes) * self.options.lora_rank * size
        kept = self.inputs if self.keeps_inputs and copied else 0
        if self.criterion.score_features is not None and self.noise and not kept:
            kept = size * self.width.channels  # the input of down_proj, to multiply its gradient
        query, key = (self.sizes[place][1] for place in (0, 1))
        attention = size * 2 * (query + key) + _FLOAT * self.width.heads  # q, output; k, v; sums
        norms = 2 * _FLOAT * (self.config.hidden_size + 1)
        return norms + attention + 3 * size * self.width.channels + lora + kept

    @property
    def channels_saved(self) -> int:
        """The part of it that is as wide as the FFN: gate, its activation, up, down's input."""
        return self.width.channels * (4 * self.itemsize + self.noise)

    @property
    def passing(self) -> int:
        """Bytes a token that the backward pass of the FFN makes and frees."""
        return (8 if self.dtype == "fp32" else 12) * self.width.channels


def _plan_weights(
    config: PretrainedConfig, layers: list[_Layer], options: PruneConfig, dtype: str, *, shards: int
) -> int:
    """Count the base: embeddings, head and norms are never quantized."""
    projections = sum(layer.num_weights for layer in layers)
    others = (count_parameters(config) - projections) * _ITEMSIZE[dtype]
    if options.load_in is None:
        size = _ITEMSIZE[dtype]
        gathered = 2 * max(layer.num_weights for layer in layers) if shards > 1 else 0
        return others + size * (-(-projections // shards) + gathered)
    assert shards == 1, "quantized weights are not divided"
    whole = OUTPUT_LINEARS if options.refit else ()
    sizes = [
        s for layer in layers for n, s in zip(LINEARS, layer.sizes, strict=True) if n not in whole
    ]
    weights = sum(columns * rows for columns, rows in sizes)
    scales = sum(rows for _, rows in sizes) * _FLOAT
    quantized = int(weights * _BYTES_A_WEIGHT[options.load_in])
    left = (projections - weights) * _ITEMSIZE[dtype]
    return others + left + quantized + (scales if options.load_in == "8bit" else 0)


def _plan_activations(
    config: PretrainedConfig,
    layers: list[_Layer],
    options: PruneConfig,
    itemsize: int,
    *,
    device: str,
) -> int:
    """Take the larger of two moments: the loss, and the backward pass of a layer."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    tokens = options.micro_batch_size * options.seq_len
    # Logits, and in float32 where they are not; then what the last norm saved, what it made, and
    # the gradient of that.
    logits = vocabulary * (_FLOAT + (itemsize if itemsize < _FLOAT else 0))
    loss = min(tokens, count_chunk_tokens(vocabulary, device)) * logits
    loss += tokens * hidden * (_FLOAT + 2 * itemsize)
    largest = max(layers, key=lambda layer: layer.saved)
    if options.gradient_checkpointing:
        held = len(layers) * itemsize * hidden
        layer_bytes = largest.saved + largest.passing
    else:
        # The embeddings are frozen: the first norm saves nothing, nor the dropout behind it.
        first = (_FLOAT + 3 * layers[0].noise) * hidden
        held = sum(layer.saved for layer in layers) - first
        layer_bytes = largest.passing
    return int(tokens * held + max(loss, tokens * layer_bytes))


def _plan_refit(
    config: PretrainedConfig, layers: list[_Layer], options: PruneConfig, itemsize: int
) -> int:
    """Count the sums of the widest weight, what its solution makes, and four hidden states a token.

    Few groups are gone after the first event, so it is nearly as wide as in the base.
    """
    hidden = config.hidden_size
    columns = max(max(layer.width.channels, layer.sizes[3][0]) for layer in layers)
    rows = options.refit_samples or -(-TOKENS_A_COLUMN * columns // options.seq_len)
    tokens = rows * options.seq_len
    # X'X five times: fitted, held out, both, with the ridge, its factor. X'R and its solution also.
    sums = _FLOAT * 5 * columns * (columns + hidden)
    states = tokens * itemsize * 4 * hidden
    batch = options.micro_batch_size * options.seq_len
    passing = batch * (_FLOAT + itemsize) * (3 * columns + 3 * hidden)
    return sums + states + passing


def _plan_gradients(
    layers: list[_Layer], options: PruneConfig, activations: int, dtype: str, device: str
) -> int:
    if not CRITERIA[options.criterion].weight_gradients:
        return 0
    stop = len(layers) - options.protect_last
    chosen = layers[options.protect_first : stop]
    one = max(columns * rows for layer in chosen for columns, rows in layer.sizes)
    if options.offload_gradients and device != "cpu":
        return one * _ITEMSIZE[dtype]
    size = _FLOAT if options.offload_gradients else _ITEMSIZE[dtype]
    gradients = size * sum(layer.num_weights for layer in chosen)
    if options.micro_batch_size == options.batch_size:
        # They come while activations go: both are never there in full.
        tokens = options.micro_batch_size * options.seq_len
        return max(0, gradients + tokens * layers[0].saved - activations)
    return gradients + one * _ITEMSIZE[dtype]


def _plan_scoring(options: PruneConfig, layers: list[_Layer]) -> int:
    """Blocks of rows, LoRA's factors and gradients in float32 side by side, and the scores.

    A quantized weight is turned into float32 as a whole, one at a time.
    """
    sizes = [size for layer in layers for size in layer.sizes]
    factors = max(i + o for i, o in sizes) * options.lora_rank
    read = max(i * o for i, o in sizes) if options.load_in else 0
    groups = sum(layer.width.channels + layer.width.heads for layer in layers)
    return _BLOCK_BYTES + _FLOAT * (4 * factors + 3 * groups + read)


def _plan_heap(config: PretrainedConfig, options: PruneConfig, dtype: str) -> int:
    """A share of what a pass of all layers makes: kept or not, it leaves holes behind."""
    tokens = options.micro_batch_size * options.seq_len
    options = replace(options, lora_dropout=0.5)  # of any rate; without it as much is made
    wasted = 0
    for width in list_widths(config):
        layer = _Layer(config, width, options, dtype, "cpu")
        wide = layer.channels_saved
        parts = ((config.hidden_size, layer.saved - wide), (width.channels, wide))
        for columns, saved in parts:
            if tokens * columns * layer.itemsize < _HEAP_LIMIT:
                wasted += tokens * saved
    return int(_HEAP_WASTE[options.gradient_checkpointing] * wasted)

"""The criteria: what each watches during a batch, and the importance it makes of it.

All are used in the same way: forward and backward passes run inside ``observe()``, then
``compute_importance()`` scores the groups and forgets the batch. Nothing else of a run depends on
the criterion.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lpdeploy.models.adapters import LoraWeights, get_base_linear, get_lora_weights
from lpdeploy.models.sharded import get_rows, is_sharded
from lpdeploy.plan import CRITERIA, GroupSpec, Slice
from lpdeploy.pruning.importance import (
    Importance,
    compute_gradient_importance,
    compute_lora_importance,
    compute_weight_importance,
)
from lpdeploy.pruning.ranks import Ranks

Positions = Mapping[str, Tensor] | None


class Criterion(Protocol):
    """Scores the groups that are still in a live model.

    Attributes:
        attention_mask: Which tokens of the pass that comes next are real, shape (B, T); set
            before each forward pass. Gradients are zero at padding, but features are not.
    """

    attention_mask: Tensor | None

    def observe(self) -> AbstractContextManager[None]:
        """Watch the forward and backward passes of one batch, in as many parts as it has."""

    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score every group from the batch that was observed, and forget it.

        Args:
            kept: Which groups to score where the others are masked but still in the model:
                spec name -> ascending positions, shape (kept,). All if None.

        Returns:
            Importance of each spec, shape (groups still there,), float32.
        """


@dataclass(frozen=True)
class ScoreForm:
    """How the numbers of single weights become one of a group.

    Attributes:
        absolute: Sum absolute values instead of squares.
        normalize: Divide the scores of each Linear by their L2 norm before they are added to
            those of the other Linears of a group.
    """

    absolute: bool = False
    normalize: bool = False


@dataclass
class _Fields:
    """What all criteria are given: a model, its groups, how scores are summed, and over whom."""

    model: nn.Module
    specs: tuple[GroupSpec, ...]
    form: ScoreForm = field(default_factory=ScoreForm)
    attention_mask: Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks)


class LoraCriterion(_Fields):
    """Eq. 10: LoRA's weights and gradients, which training has anyway."""

    def observe(self) -> AbstractContextManager[None]:
        """Watch nothing: the gradients stay in place until the optimizer's next step."""
        return nullcontext()

    @torch.no_grad()
    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score from the gradients of A and B, before the optimizer's step."""
        return _score_linears(self, self._score, kept)

    def _score(self, piece: Slice, linear: Any, lora: LoraWeights) -> Tensor:
        if lora.lora_a.grad is None or lora.lora_b.grad is None:
            raise ValueError(f"{piece.module} has no LoRA gradients; call backward first")
        return compute_lora_importance(
            get_rows(get_base_linear(linear)),
            lora,
            lora.lora_a.grad,
            lora.lora_b.grad,
            dim=piece.dim,
            block=piece.block,
            absolute=self.form.absolute,
        )


@dataclass
class GradientCriterion(_Fields):
    """Eq. 3: gradients of the frozen weights, accumulated over the batch (LLM-Pruner).

    Attributes:
        offload: Keep the accumulated gradients in CPU memory.
    """

    offload: bool = False
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Let autograd compute the gradients of the weights, too."""
        self._gradients.clear()  # of a batch that was broken off
        handles = []
        for piece in _list_slices(self.specs):
            weight = get_base_linear(self.model.get_submodule(piece.module)).weight
            weight.requires_grad = True
            hook = self._make_hook(piece.module)
            handles.append((weight, weight.register_post_accumulate_grad_hook(hook)))
        try:
            yield
        finally:
            for weight, handle in handles:
                handle.remove()
                weight.requires_grad = False

    def _make_hook(self, module: str) -> Any:
        def take(weight: Tensor) -> None:
            # Taken at once, so that with off-loading one layer's gradient is on the device at
            # a time.
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            # In fp32 on the CPU: sums of many micro-batches in bf16 would lose most of them.
            gradient = gradient.cpu().float() if self.offload else gradient
            _accumulate(self._gradients, module, gradient)

        return take

    @torch.no_grad()
    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score from the gradients, freeing each as it is used."""
        return _score_linears(self, self._score, kept)

    def _score(self, piece: Slice, linear: Any, lora: LoraWeights) -> Tensor:
        gradient = self._gradients.pop(piece.module)
        if self.ranks.size > 1:  # one layer's at a time, in full precision
            gradient = gradient.to(self.ranks.device, torch.float32)
            self.ranks.sum([gradient])
        return compute_gradient_importance(
            get_rows(get_base_linear(linear)),
            lora,
            gradient,
            dim=piece.dim,
            block=piece.block,
            absolute=self.form.absolute,
        )


class MagnitudeCriterion(_Fields):
    """The size of the weights, LoRA's update included."""

    def observe(self) -> AbstractContextManager[None]:
        """Watch nothing."""
        return nullcontext()

    @torch.no_grad()
    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score from the weights as they are."""
        return _score_linears(self, self._score, kept)

    def _score(self, piece: Slice, linear: Any, lora: LoraWeights) -> Tensor:
        return compute_weight_importance(
            get_rows(get_base_linear(linear)),
            lora,
            dim=piece.dim,
            block=piece.block,
            absolute=self.form.absolute,
        )


@dataclass
class WandaCriterion(_Fields):
    """The size of the weights times that of the features they multiply."""

    _energies: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Add up the squares of each Linear's input features, token by token."""
        self._energies.clear()
        handles = [
            self.model.get_submodule(piece.module).register_forward_pre_hook(
                self._make_hook(piece.module)
            )
            for piece in _list_slices(self.specs)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_hook(self, module: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Gradient checkpointing runs each layer twice; twice the sum ranks the same.
            squares = args[0].detach().float().square()  # (B, T, in)
            if self.attention_mask is not None:
                squares.mul_(self.attention_mask.to(squares.device).unsqueeze(-1))
            energy = squares.flatten(0, -2).sum(dim=0)  # (B, T, in) -> (in,)
            _accumulate(self._energies, module, energy)

        return add

    @torch.no_grad()
    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score from the weights and the norms of the batch."""
        self.ranks.sum(list(self._energies.values()))
        return _score_linears(self, self._score, kept)

    def _score(self, piece: Slice, linear: Any, lora: LoraWeights) -> Tensor:
        return compute_weight_importance(
            get_rows(get_base_linear(linear)),
            lora,
            self._energies.pop(piece.module).sqrt(),
            dim=piece.dim,
            block=piece.block,
            absolute=self.form.absolute,
        )


@dataclass
class GateCriterion(_Fields):
    """What a gate of one before each group would feel: the exact first order of its removal.

    With h the input of o_proj or down_proj, multiplying a group's part of h by a gate z = 1 gives
    dL/dz = sum of h * dL/dh over the group and the tokens. Its square, per sample, summed over
    the batch, is the empirical Fisher information of z: no gradient of a weight, no approximation
    by LoRA, and only what the backward pass computes anyway.
    """

    _scores: Importance = field(default_factory=dict)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Multiply the input of each output projection by its gradient as it appears."""
        self._scores.clear()
        handles = [
            self.model.get_submodule(piece.module).register_forward_pre_hook(
                self._make_hook(spec.name, piece.block)
            )
            for spec in self.specs
            for piece in spec.slices
            if piece.dim == 1
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_hook(self, name: str, block: int) -> Any:
        def watch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_Watch.apply(args[0], partial(self._add, name, block)), *args[1:])

        return watch

    def _add(self, name: str, block: int, hidden: Tensor, gradient: Tensor) -> None:
        product = hidden.float() * gradient.float()
        gates = product.sum(dim=1).unflatten(1, (-1, block)).sum(dim=2)  # (B, T, G*block) -> (B, G)
        score = gates.abs() if self.form.absolute else gates.square()
        _accumulate(self._scores, name, score.sum(dim=0))  # (B, G) -> (G,)

    def compute_importance(self, kept: Positions = None) -> Importance:
        """Return the sums over the batch."""
        scores, self._scores = self._scores, {}
        self.ranks.sum(list(scores.values()))
        return {name: _select(score, name, kept) for name, score in scores.items()}


class _Watch(torch.autograd.Function):
    """The identity, that shows its input and the gradient of it to a function.

    Unlike a hook on the tensor, which would have to hold that very tensor and so never be freed,
    it leaves the input to autograd: kept until the backward pass, or computed again by
    gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.show = show
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.show(*ctx.saved_tensors, gradient)
        return gradient, None


class RandomCriterion(_Fields):
    """No knowledge at all: what every other criterion has to beat."""

    def observe(self) -> AbstractContextManager[None]:
        """Watch nothing."""
        return nullcontext()

    def compute_importance(self, kept: Positions = None) -> Importance:
        """Draw scores, the same in a resumed run, since training seeds by the step."""
        scores = {spec.name: self._draw(spec, kept) for spec in self.specs}
        # On a CPU, dropout draws from the same numbers, as many as a rank's rows need.
        self.ranks.copy_first(list(scores.values()))
        return scores

    def _draw(self, spec: GroupSpec, kept: Positions) -> Tensor:
        piece = spec.slices[0]
        weight = get_base_linear(self.model.get_submodule(piece.module)).weight
        alive = weight.shape[piece.dim] // piece.block if kept is None else len(kept[spec.name])
        return torch.rand(alive).to(weight.device)


def build_criterion(
    name: str,
    model: nn.Module,
    specs: tuple[GroupSpec, ...],
    *,
    form: ScoreForm | None = None,
    offload_gradients: bool = False,
    ranks: Ranks | None = None,
) -> Criterion:
    """Make the criterion that ``--criterion`` names.

    Args:
        name: One of ``CRITERIA``.
        model: The causal LM inside peft.
        specs: The groups to score.
        form: How scores are summed; squares without normalisation if None.
        offload_gradients: Keep the gradients of ``gradient`` in CPU memory.
        ranks: Over whom the batch is dealt; this process alone if None.

    Raises:
        ValueError: There is no such criterion.
    """
    kinds: dict[str, Callable[..., Criterion]] = {
        "lora": LoraCriterion,
        "gate": GateCriterion,
        "gradient": partial(GradientCriterion, offload=offload_gradients),
        "magnitude": MagnitudeCriterion,
        "wanda": WandaCriterion,
        "random": RandomCriterion,
    }
    if name not in kinds:
        raise ValueError(f"no criterion '{name}'; use one of {', '.join(CRITERIA)}")
    return kinds[name](model, specs, form=form or ScoreForm(), ranks=ranks or Ranks())


def _score_linears(
    criterion: _Fields, score: Callable[[Slice, Any, LoraWeights], Tensor], kept: Positions
) -> Importance:
    """Add up the scores of each group's Linears (Eq. 4)."""
    parts: list[tuple[str, Tensor]] = []
    for spec in criterion.specs:
        for piece in spec.slices:
            linear = criterion.model.get_submodule(piece.module)
            # Before the norm: what is masked must not count in it, since what is cut does not.
            part = _select(score(piece, linear, get_lora_weights(linear)), spec.name, kept)
            parts.append((spec.name, part))
    if is_sharded(criterion.model):  # each rank has summed over its own rows of the weights
        criterion.ranks.sum([part for _, part in parts])
    scores: Importance = {}
    for name, part in parts:
        if criterion.form.normalize:
            part.div_(part.norm().clamp_min(torch.finfo(part.dtype).tiny))
        _accumulate(scores, name, part)
    return scores


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add to a sum in place, so that no third tensor of its size exists; ``part`` may become it."""
    if name in sums:
        sums[name] += part
    else:
        sums[name] = part


def _list_slices(specs: tuple[GroupSpec, ...]) -> list[Slice]:
    return [piece for spec in specs for piece in spec.slices]


def _select(score: Tensor, name: str, kept: Positions) -> Tensor:
    return score if kept is None else score[kept[name].to(score.device)]

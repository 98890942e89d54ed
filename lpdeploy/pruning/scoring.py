"""Watching a batch as a criterion asks, and scoring the groups of a live model from it.

Forward and backward passes run inside ``observe()``, then ``compute_importance()`` scores the
groups and forgets the batch. Nothing else of a run depends on the criterion.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpdeploy.criteria import Criterion, ScoredLinear
from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.sharded import get_rows, is_sharded
from lpdeploy.plan import GroupSpec, Slice
from lpdeploy.pruning.importance import Importance, score_linear
from lpdeploy.pruning.ranks import Ranks

Positions = Mapping[str, Tensor] | None


@dataclass(frozen=True)
class ScoreForm:
    """How the scores of single weights become the score of a group.

    Attributes:
        absolute: Sum absolute values instead of squares.
        normalize: Divide the scores of each Linear by their L2 norm before they are added to
            those of the other Linears of a group.
    """

    absolute: bool = False
    normalize: bool = False


@dataclass
class Scorer:
    """Scores the groups that are still in a live model.

    Attributes:
        criterion: What is observed, and how it is scored.
        model: The causal LM inside peft.
        specs: The groups to score.
        form: How scores are summed.
        ranks: The processes that share the batch.
        offload_gradients: Keep gradients of the weights in CPU memory.
        attention_mask: Which tokens of the next forward pass are real, shape (B, T); set before
            each one. Gradients are zero at padding, but features are not.
    """

    criterion: Criterion
    model: nn.Module
    specs: tuple[GroupSpec, ...]
    form: ScoreForm = field(default_factory=ScoreForm)
    ranks: Ranks = field(default_factory=Ranks)
    offload_gradients: bool = False
    attention_mask: Tensor | None = None
    _observed: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Watch the forward and backward passes of one batch, in as many parts as it has."""
        self._observed = {}  # without that of a batch that was broken off
        weights = self._list_weights() if self.criterion.weight_gradients else {}
        handles = [*self._watch_gradients(weights), *self._watch_inputs(), *self._watch_features()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight in weights.values():
                weight.requires_grad = False

    @torch.no_grad()
    def compute_importance(self, kept: Positions = None) -> Importance:
        """Score every group from the batch that was observed, and forget it.

        Args:
            kept: Which groups to score where the others are masked but still in the model:
                spec name -> ascending positions, shape (kept,). All if None.

        Returns:
            Importance of each spec, shape (groups still there,), float32.
        """
        observed, self._observed = self._observed, {}
        if self.criterion.score_outputs is not None:
            return {}  # which are scored when they go
        if self.criterion.score_groups is not None:
            return self._score_groups(self.criterion.score_groups, kept)
        if not self.criterion.weight_gradients:  # those are summed one layer's at a time
            self.ranks.sum(list(observed.values()))
        if self.criterion.score_features is not None:
            return {name: _select(score, name, kept) for name, score in observed.items()}
        return self._score_weights(observed, kept)

    def _score_groups(self, score: Callable[[int], Tensor], kept: Positions) -> Importance:
        scores = {}
        for spec in self.specs:
            piece = spec.slices[0]
            weight = get_base_linear(self.model.get_submodule(piece.module)).weight
            alive = weight.shape[piece.dim] // piece.block if kept is None else len(kept[spec.name])
            scores[spec.name] = score(alive).to(weight.device)
        # On a CPU, dropout draws from the same numbers, as many as a rank's rows need.
        self.ranks.copy_first(list(scores.values()))
        return scores

    def _score_weights(self, observed: dict[str, Tensor], kept: Positions) -> Importance:
        """Add up the scores of each group's Linears (Eq. 4)."""
        parts: list[tuple[str, Tensor]] = []
        for spec in self.specs:
            for piece in spec.slices:
                part = self._score_linear(piece, observed.pop(piece.module, None))
                # Before the norm: what is masked must not count in it, since what is cut does not.
                parts.append((spec.name, _select(part, spec.name, kept)))
        if is_sharded(self.model):  # each rank has summed over its own rows of the weights
            self.ranks.sum([part for _, part in parts])
        scores: Importance = {}
        for name, part in parts:
            if self.form.normalize:
                part.div_(part.norm().clamp_min(torch.finfo(part.dtype).tiny))
            _accumulate(scores, name, part)
        return scores

    def _score_linear(self, piece: Slice, observed: Tensor | None) -> Tensor:
        linear: Any = self.model.get_submodule(piece.module)
        if self.criterion.weight_gradients and self.ranks.size > 1:
            assert observed is not None
            observed = observed.to(self.ranks.device, torch.float32)
            self.ranks.sum([observed])
        return score_linear(
            self.criterion,
            get_rows(get_base_linear(linear)),
            ScoredLinear(**vars(get_lora_weights(linear)), observed=observed),
            dim=piece.dim,
            block=piece.block,
            absolute=self.form.absolute,
        )

    def _list_weights(self) -> dict[str, Tensor]:
        modules = [piece.module for spec in self.specs for piece in spec.slices]
        return {name: get_base_linear(self.model.get_submodule(name)).weight for name in modules}

    def _watch_gradients(self, weights: Mapping[str, Tensor]) -> Iterator[RemovableHandle]:
        """Let autograd compute the gradients of the weights, too."""
        for module, weight in weights.items():
            weight.requires_grad = True
            take = partial(self._take_gradient, module)
            yield weight.register_post_accumulate_grad_hook(take)

    def _take_gradient(self, module: str, weight: Tensor) -> None:
        # Taken at once, so that with off-loading one layer's gradient is on the device at a time.
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        # In fp32 on the CPU: sums of many micro-batches in bf16 would lose most of them.
        gradient = gradient.cpu().float() if self.offload_gradients else gradient
        _accumulate(self._observed, module, gradient)

    def _watch_inputs(self) -> Iterator[RemovableHandle]:
        """Add up what the criterion measures of each Linear's input features."""
        if (measure := self.criterion.measure_inputs) is None:
            return
        for module in self._list_weights():
            add = partial(self._add_inputs, module, measure)
            yield self.model.get_submodule(module).register_forward_pre_hook(add)

    def _add_inputs(
        self, module: str, measure: Callable[[Tensor], Tensor], _: nn.Module, args: Any
    ) -> None:
        values = measure(args[0].detach().float())  # (B, T, in)
        if self.attention_mask is not None:
            values = values * self.attention_mask.to(values.device).unsqueeze(-1)
        _accumulate(self._observed, module, values.flatten(0, -2).sum(dim=0))  # -> (in,)

    def _watch_features(self) -> Iterator[RemovableHandle]:
        """Show the criterion the input of each output projection with its gradient."""
        if (score := self.criterion.score_features) is None:
            return
        for spec in self.specs:
            for piece in spec.slices:
                if piece.dim == 1:
                    score_piece = partial(score, block=piece.block, absolute=self.form.absolute)
                    watch = partial(self._show_features, spec.name, score_piece)
                    yield self.model.get_submodule(piece.module).register_forward_pre_hook(watch)

    def _show_features(
        self,
        name: str,
        score: Callable[[Tensor, Tensor], Tensor],
        _: nn.Module,
        args: Any,
    ) -> tuple[Tensor, ...]:
        def show(hidden: Tensor, gradient: Tensor) -> None:
            _accumulate(self._observed, name, score(hidden, gradient))

        return (_Watch.apply(args[0], show), *args[1:])


class _Watch(torch.autograd.Function):
    """The identity, which shows its input and the gradient in it to a function.

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


def _accumulate(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add to a sum in place, so that no third tensor of its size exists; ``part`` may become it."""
    if name in sums:
        sums[name] += part
    else:
        sums[name] = part


def _select(score: Tensor, name: str, kept: Positions) -> Tensor:
    return score if kept is None else score[kept[name].to(score.device)]

"""Two faster ways to run a torch model at a fixed shape: compiled layers, and a CUDA graph.

`TorchRunner` is the third: eager, with a cache that grows. A server that runs torch would use one
of these, so the suite times all three.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from lpdeploy.benchmark.worker import Timing, Workload, time_work
from lpdeploy.pruning.compilation import apply_compile

COMPILED, GRAPH = "torch-compile", "torch-graph"
_SLACK = 8
"""Tokens that a cache holds beyond those of a trial: what the capture of a step decodes."""


class StaticModel:
    """A causal LM that runs prompts of one length and batch.

    Attributes:
        model: The transformers model, or the ``PeftModel`` around it.
    """

    def __init__(self, model: Any, *, mode: str, device: str) -> None:
        """Keep the model; ``mode`` is ``torch-compile`` or ``torch-graph``."""
        self.model, self._mode, self._device = model, mode, device
        self._prepared: tuple[tuple[Workload, str], Callable[[], Any], Callable[[], None]] | None
        self._prepared = None

    def time(self, workload: Workload, phase: str) -> Timing:
        """Run one trial of ``prefill`` or ``decode``; the first one compiles or captures."""
        if self._prepared is None or self._prepared[0] != (workload, phase):
            self._prepared = None  # frees the cache of another workload first
            self._prepared = ((workload, phase), *self._prepare(workload, phase))
        _, work, reset = self._prepared
        reset()
        timing = time_work(work, device=self._device)
        steps = workload.decode if phase == "decode" else 1
        return Timing(timing.seconds / steps, timing.bytes)

    def _prepare(
        self, workload: Workload, phase: str
    ) -> tuple[Callable[[], Any], Callable[[], None]]:
        ids = self.build_ids(workload)
        if phase == "prefill":
            return self.build_prefill(ids), lambda: None
        step = DecodeStep(self.model, ids, max_len=workload.tokens + workload.decode + _SLACK)
        once = self._speed_up(step.run)
        return lambda: [once() for _ in range(workload.decode)], step.reset

    def build_ids(self, workload: Workload) -> Tensor:
        """Return the prompt that every trial takes, shape (batch, tokens)."""
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, workload.tokens)
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, shape, generator=generator).to(self._device)

    def build_prefill(self, ids: Tensor) -> Callable[[], Tensor]:
        """Return what computes the logits after the last token of a prompt, (batch, 1, vocab).

        Compiled layers keep no cache: the number of a layer would make each a program of its own.
        """
        compiled = self._mode == COMPILED
        model = share_weights(self.model) if compiled else self.model

        @torch.no_grad()
        def prefill() -> Tensor:
            return model(input_ids=ids, use_cache=not compiled, logits_to_keep=1).logits

        if not compiled:
            return self._speed_up(prefill)
        apply_compile(model.get_base_model() if hasattr(model, "peft_config") else model)
        return prefill

    def _speed_up(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self._mode == COMPILED:
            return torch.compile(work, dynamic=False)
        return capture(work) if self._device != "cpu" else work


class DecodeStep:
    """Decode one token after another into a cache of fixed length, without a word to the host."""

    def __init__(self, model: Any, ids: Tensor, *, max_len: int) -> None:
        """Run the prompt ``ids``, shape (B, T), into the cache."""
        self._model, self._length = model, ids.shape[1]
        self._token = ids[:, -1:].clone()
        self._slots = torch.arange(max_len, device=ids.device)
        self._position = torch.tensor(self._length, device=ids.device)
        self._cache = StaticCache(config=model.config, max_cache_len=max_len)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def run(self) -> Tensor:
        """Decode the next token; return its logits, shape (B, 1, vocab)."""
        seen = (self._slots <= self._position).view(1, 1, 1, -1)
        logits = self._model(
            input_ids=self._token,
            attention_mask=seen,
            position_ids=self._position.view(1, 1).expand(len(self._token), 1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._position.add_(1)
        return logits

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the end of the prompt."""
        self._position.fill_(self._length)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._length)


def share_weights(model: Any) -> Any:
    """Copy the modules of a model, so that one can be compiled; both have the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the kernels of a call as a CUDA graph; return what runs them again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up outside of the graph
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay

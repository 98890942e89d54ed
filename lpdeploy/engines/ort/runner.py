"""What ``export_ort`` wrote, run over a cache that is written in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lpdeploy.engines.contract import Contract, load_contract
from lpdeploy.engines.ort import ENGINE
from lpdeploy.engines.ort_session import (
    bind_tensor,
    build_session,
    check_computes,
    split_device,
)
from lpdeploy.engines.runner import Output
from lpdeploy.errors import LpdeployError


@dataclass
class OrtCache:
    """Keys and values of a batch, each row from 0 on without padding.

    Attributes:
        buffers: Key and value of each layer, shape (B, kv_heads, capacity, head_dim).
        lengths: Tokens of each row.
        capacity: Tokens that there is room for.
        binding: An IO binding that reads and writes the buffers, kept from step to step.
        step: What is bound as the graph's other inputs while single tokens are decoded.
        logits: What is bound as its output meanwhile; None on a GPU.
    """

    buffers: list[Tensor]
    lengths: list[int]
    capacity: int = 0
    binding: Any = None
    step: dict[str, Tensor] | None = None
    logits: Tensor | None = None

    def view(self, start: int, stop: int) -> "OrtCache":
        """Return some of the rows as a cache of their own, over the same memory."""
        buffers = [buffer[start:stop] for buffer in self.buffers]
        return OrtCache(buffers, self.lengths[start:stop], self.capacity)

    def move_row(self, source: int, target: int) -> None:
        """Copy what a row holds over another."""
        length = self.lengths[source]
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length


class OrtRunner:
    """An ONNX Runtime session over a graph with ``GroupQueryAttention``.

    Past and present of a layer are one buffer, bound by its address: a decoded token costs the
    reading of the cache, and no copy of it. The operator wants rows that start at 0 and end at
    lengths of their own, so padding on the left is taken off before and put back after.

    Attributes:
        name: ``ort``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        vocab_size: Width of the logits.
        max_positions: Longest past + present in tokens: what the graph was exported for.
        contract: What ``io.json`` says.
    """

    name = ENGINE.name

    def __init__(self, session: Any, contract: Contract, *, device: str = "cpu") -> None:
        self.precision: str = contract.precision
        self.vocab_size: int = contract.model.vocab_size
        self.max_positions: int = contract.max_seq_len
        self.contract = contract
        self._session = session
        self._device = torch.device(device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past: OrtCache | None = None,
        last_only: bool = False,
        reserve: int = 0,
    ) -> Output:
        """Run T new tokens after a past of P tokens.

        Args:
            input_ids: Shape (B, T), int64, on any device.
            attention_mask: Shape (B, P + T), int64; 0 at padding, which stands on the left.
            past: ``Output.past`` of the previous call, which is written into, or None.
            last_only: Compute only the logits of the last token, and the last layer's FFN for
                that token alone.
            reserve: Tokens to come that the cache is to have room for.

        Returns:
            Logits, float32, on the session's device (undefined at padding), and the cache.

        Raises:
            LpdeployError: The longest row is longer than the graph was exported for.
        """
        ids, mask = input_ids.cpu(), attention_mask.cpu()
        tokens = ids.shape[1]
        news = mask[:, -1] if tokens == 1 else mask[:, -tokens:].sum(dim=1)
        fresh = news.tolist()  # new tokens of each row
        cache = past or self._build_cache(len(ids), capacity=0)
        totals = [length + count for length, count in zip(cache.lengths, fresh, strict=True)]
        self._make_room(cache, max(totals), reserve=reserve)
        # The operator takes a batch of prompts or of single tokens; what else there is goes row
        # by row, over the same buffers.
        if tokens == 1 and all(fresh) and any(cache.lengths):
            logits = self._decode(ids, totals, cache)
        elif all(fresh) and not any(cache.lengths):
            cache.step = None
            logits = self._prefill(ids, fresh, cache, last_only=last_only)
        else:
            cache.step = None
            logits = self._run_rows(ids, fresh, totals, cache, last_only=last_only)
        cache.lengths = totals
        return Output(logits, cache)

    def _prefill(
        self, ids: Tensor, fresh: list[int], cache: OrtCache, *, last_only: bool
    ) -> Tensor:
        """Run rows of any lengths together: (B, T) -> (B, T or 1, vocab)."""
        width, longest = ids.shape[1], max(fresh)
        if min(fresh) < width:
            # Left-aligned: (B, T) -> (B, longest), each row from its first token on.
            padding = width - torch.tensor(fresh).unsqueeze(1)
            ids = ids.gather(1, (torch.arange(longest) + padding) % width)
        inputs = self._build_inputs(ids, fresh, fresh, last_only=last_only)
        logits = self._bind_and_run(cache.binding, inputs)
        if last_only or longest == width:
            return logits
        return pad(logits, (0, 0, width - longest, 0))

    def _decode(self, ids: Tensor, totals: list[int], cache: OrtCache) -> Tensor:
        """Run one token of every row: (B, 1) -> (B, 1, vocab)."""
        if cache.step is None:
            cache.step = self._build_inputs(ids, [1] * len(ids), totals, last_only=True)
            self._bind_inputs(cache.binding, cache.step)
            if self._device.type == "cpu":  # on a GPU the next run could overtake the copy
                cache.logits = self._bind_logits(cache.binding, batch=len(ids), kept=1)
        else:
            # What is bound stays where it is and takes new numbers: after a run of the graph the
            # processor's caches hold weights, so that every call from Python costs a multiple.
            cache.step["input_ids"].copy_(ids)
            cache.step["seqlens_k"].add_(1)
            cache.step["total_sequence_length"].add_(1)
        if cache.logits is None:
            return self._run(cache.binding, batch=len(ids), kept=1)
        self._session.run_with_iobinding(cache.binding)
        return cache.logits.clone()

    def _run_rows(
        self,
        ids: Tensor,
        fresh: list[int],
        totals: list[int],
        cache: OrtCache,
        *,
        last_only: bool,
    ) -> Tensor:
        kept = 1 if last_only else ids.shape[1]
        rows = torch.zeros(len(ids), kept, self.vocab_size, device=self._device)
        for row, count in enumerate(fresh):
            if count:
                only = slice(row, row + 1)
                binding = self._bind([buffer[only] for buffer in cache.buffers])
                inputs = self._build_inputs(
                    ids[only, -count:], fresh[only], totals[only], last_only=last_only
                )
                logits = self._bind_and_run(binding, inputs)
                rows[row, -logits.shape[1] :] = logits[0]
        return rows

    def _build_inputs(
        self, ids: Tensor, fresh: list[int], totals: list[int], *, last_only: bool
    ) -> dict[str, Tensor]:
        """Build what the graph is told beside its cache (``Lengths`` of the exporter).

        Args:
            ids: Shape (B, T), rows that start at 0.
            fresh: New tokens of each row.
            totals: Past and new tokens of each row.
            last_only: Only the logits of the last token are wanted.
        """
        kept = 1 if last_only else ids.shape[1]
        newest = torch.tensor(fresh).view(-1, 1, 1) - 1  # (B, 1, 1)
        inputs = {
            # A copy: decoding writes later tokens into it.
            "input_ids": ids.clone(memory_format=torch.contiguous_format),
            "seqlens_k": torch.tensor(totals, dtype=torch.int32) - 1,
            "logits_positions": newest + torch.arange(1 - kept, 1).view(-1, 1),  # (B, K, 1)
        }
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        # The operator reads this one on the CPU, wherever it runs.
        inputs["total_sequence_length"] = torch.tensor(max(totals), dtype=torch.int32)
        return inputs

    def _bind_and_run(self, binding: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        self._bind_inputs(binding, inputs)
        batch, kept, _ = inputs["logits_positions"].shape
        return self._run(binding, batch=batch, kept=kept)

    def _bind_inputs(self, binding: Any, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            bind_tensor(binding, name, tensor)

    def _run(self, binding: Any, *, batch: int, kept: int) -> Tensor:
        """Run the graph on what is bound: logits of shape (B, K, vocab)."""
        logits = self._bind_logits(binding, batch=batch, kept=kept)
        self._session.run_with_iobinding(binding)
        return logits

    def _bind_logits(self, binding: Any, *, batch: int, kept: int) -> Tensor:
        logits = torch.empty(batch, kept, self.vocab_size, device=self._device)
        bind_tensor(binding, "logits", logits, output=True)
        return logits

    def _bind(self, buffers: list[Tensor]) -> Any:
        """Bind each buffer as the past that is read and the present that is written."""
        binding = self._session.io_binding()
        for item, buffer in zip(self.contract.caches, buffers, strict=True):
            bind_tensor(binding, item.name, buffer)
            present = item.name.replace("past_key_values", "present")
            bind_tensor(binding, present, buffer, output=True)
        return binding

    def build_cache(self, rows: int) -> OrtCache:
        """Build an empty cache whose rows have room for ``max_positions`` tokens each.

        For batches whose rows come and go: ``view`` gives the rows that a call is to run.
        """
        return self._build_cache(rows, capacity=self.max_positions)

    def _build_cache(self, rows: int, *, capacity: int) -> OrtCache:
        buffers = [
            torch.empty(
                item.resolve({"batch": rows, "past": capacity}),
                dtype=getattr(torch, item.dtype),
                device=self._device,
            )
            for item in self.contract.caches
        ]
        return OrtCache(buffers, [0] * rows, capacity)

    def _make_room(self, cache: OrtCache, needed: int, *, reserve: int) -> None:
        if needed > self.max_positions:
            raise LpdeployError(
                f"{needed} tokens do not fit an export for {self.max_positions}. "
                "Shorten the prompt, or export again with a larger `max_seq_len`."
            )
        if needed <= cache.capacity:
            if cache.binding is None:
                cache.binding = self._bind(cache.buffers)
            return
        # Twice as much where it was not said how many will come, so that copies stay few.
        wanted = needed + reserve if cache.capacity == 0 else max(needed + reserve, 2 * needed)
        cache.capacity = min(wanted, self.max_positions)
        for index, old in enumerate(cache.buffers):
            grown = old.new_empty(*old.shape[:2], cache.capacity, old.shape[3])
            grown[:, :, : old.shape[2]] = old
            cache.buffers[index] = grown
        cache.binding, cache.step = self._bind(cache.buffers), None


def load_ort_runner(folder: Path, *, device: str = "cpu") -> OrtRunner:
    """Open what ``export_ort`` wrote.

    Args:
        folder: With ``model.onnx``, ``model.onnx.data`` and ``io.json``.
        device: ``cpu``, ``cuda`` or ``cuda:1``. The graph runs there or not at all.

    Raises:
        ArtifactError: A file is missing, damaged or of another export.
        MissingDependencyError: ONNX Runtime, or its provider for ``device``, is not installed.
    """
    kind, index = split_device(device)
    contract = load_contract(folder, ENGINE)
    contract.check_files(folder, fix=ENGINE.fix)
    check_computes(folder, contract, kind)
    place = f"{kind}:{index}" if kind == "cuda" else kind
    return OrtRunner(build_session(folder, device), contract, device=place)

"""The rows of a running batch: who may join it, and when."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lpdeploy.engines.ort.runner import OrtRunner
from lpdeploy.engines.runner import Runner, pad_left

_MAX_PREFILL_TOKENS = 2048
"""So many tokens of prompts, padding included, run at once: the rows that decode wait for them."""


class Size(NamedTuple):
    """What a request needs, in tokens."""

    prompt: int
    new: int


class Rows(Protocol):
    """A batch on a runner, row by row. Row i of a call is the i-th that is running."""

    def count_startable(self, waiting: Sequence[Size]) -> int:
        """Return how many of those who wait, the first ones, can start together now."""
        ...

    def start(self, prompts: Sequence[list[int]]) -> Tensor:
        """Run prompts in new rows behind those that run: logits of their last tokens, (n, vocab).

        Args:
            prompts: As many as ``count_startable`` said.
        """
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of every running row: logits, (rows, vocab)."""
        ...

    def leave(self, row: int) -> None:
        """Give a row up. The last running row takes its number."""
        ...

    def clear(self) -> None:
        """Give all rows up."""
        ...


class JoiningRows:
    """Rows of one cache, which a prompt can join between any two steps.

    Running rows stand at the front of the cache, so that a step reads no others: a row that
    leaves is written over by the last one.

    Args:
        runner: The engine.
        size: Rows that can run at once; each has room for ``max_positions`` tokens.
    """

    def __init__(self, runner: OrtRunner, size: int) -> None:
        self._runner = runner
        self._size = size
        self._cache = runner.build_cache(size)
        self._running = 0
        self._front: Any = None  # the running rows, as the last step left them

    def count_startable(self, waiting: Sequence[Size]) -> int:
        """Return how many of those who wait can start now: at least one where a row is free."""
        count = longest = 0
        for size in waiting[: self._size - self._running]:
            longest = max(longest, size.prompt)
            if count and longest * (count + 1) > _MAX_PREFILL_TOKENS:
                break
            count += 1
        return count

    def start(self, prompts: Sequence[list[int]]) -> Tensor:
        """Run prompts in new rows: logits of their last tokens, (n, vocab)."""
        stop = self._running + len(prompts)
        self._cache.lengths[self._running : stop] = [0] * len(prompts)
        tokens, mask = pad_left(list(prompts))
        joined = self._cache.view(self._running, stop)
        logits = self._runner.forward(
            tokens, attention_mask=mask, past=joined, last_only=True
        ).logits
        self._cache.lengths[self._running : stop] = joined.lengths
        self._running, self._front = stop, None
        return logits[:, -1]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of every running row: logits, (rows, vocab)."""
        if self._front is None:
            self._front = self._cache.view(0, self._running)
        ids = torch.tensor(tokens).unsqueeze(1)  # (rows,) -> (rows, 1)
        # The cache knows the lengths; of the mask the runner reads the new tokens alone.
        output = self._runner.forward(
            ids, attention_mask=torch.ones_like(ids), past=self._front, last_only=True
        )
        self._cache.lengths[: self._running] = self._front.lengths
        return output.logits[:, -1]

    def leave(self, row: int) -> None:
        """Give a row up. The last running row takes its number."""
        self._running -= 1
        if row != self._running:
            self._cache.move_row(self._running, row)
        self._front = None

    def clear(self) -> None:
        """Give all rows up."""
        self._running, self._front = 0, None


class StandingRows:
    """A batch that starts together, on any runner: nobody joins before the last row has left.

    Args:
        runner: The engine.
        size: Rows that can run at once.
    """

    def __init__(self, runner: Runner, size: int) -> None:
        self._runner = runner
        self._size = size
        self._order: list[int] = []  # where in the batch each running row stands
        self._mask = torch.zeros(0, 0, dtype=torch.int64)
        self._past: Any = None

    def count_startable(self, waiting: Sequence[Size]) -> int:
        """Return how many of those who wait can start now: none while a batch runs."""
        count = prompt = new = 0
        for size in waiting[: 0 if self._order else self._size]:
            # Shorter prompts are padded, so that every row takes the positions of the longest.
            prompt, new = max(prompt, size.prompt), max(new, size.new)
            if prompt + new > self._runner.max_positions:
                break
            count += 1
        return count

    def start(self, prompts: Sequence[list[int]]) -> Tensor:
        """Run prompts as a new batch: logits of their last tokens, (n, vocab)."""
        tokens, self._mask = pad_left(list(prompts))
        order = list(range(len(prompts)))
        logits = self._run(tokens, order)
        self._order = order  # nobody runs here where the engine has failed
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of every running row: logits, (rows, vocab)."""
        # Rows that have left go on with tokens nobody reads: rows do not see each other.
        ids = torch.zeros(len(self._mask), 1, dtype=torch.int64)
        ids[self._order, 0] = torch.tensor(tokens)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        return self._run(ids, self._order)

    def _run(self, tokens: Tensor, order: Sequence[int]) -> Tensor:
        output = self._runner.forward(
            tokens, attention_mask=self._mask, past=self._past, last_only=True
        )
        self._past = output.past
        return output.logits[order, -1]

    def leave(self, row: int) -> None:
        """Give a row up. The last running row takes its number."""
        self._order[row] = self._order[-1]
        self._order.pop()
        if not self._order:
            self.clear()

    def clear(self) -> None:
        """Give all rows up."""
        self._order, self._past = [], None


def build_rows(runner: Runner, size: int) -> Rows:
    """Choose the rows that a runner admits: joining ones where its cache can be divided."""
    return (
        JoiningRows(runner, size) if isinstance(runner, OrtRunner) else StandingRows(runner, size)
    )

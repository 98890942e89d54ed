"""Continuous decoding: requests that join and leave one running batch."""

import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from lpdeploy.engines.runner import Runner
from lpdeploy.errors import LpdeployError
from lpdeploy.servers.triton.rows import Size, build_rows
from lpdeploy.servers.triton.sampling import Sampler, Sampling

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"
"""Why a request ended: a stop token or its listener said so, its tokens are used up, or nobody
waits for it any more."""


class BusyError(LpdeployError):
    """More requests wait than the batcher keeps."""


@dataclass(eq=False)
class Request:
    """A prompt to continue, and who hears of it.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: At most so many are added.
        on_token: Is told each new token, a stop token included, and why it is the last one, or
            None. It returns whether to end the request after this token. Called from the
            batcher's thread, which it must not hold up.
        on_error: Is told instead where the engine fails.
        stop_ids: Tokens that end it.
        is_cancelled: Whether nobody waits for it any more; asked before each step.
        sampling: How tokens are chosen.
    """

    prompt: list[int]
    max_new_tokens: int
    on_token: Callable[[int | None, str | None], bool]
    on_error: Callable[[Exception], None]
    stop_ids: Collection[int] = ()
    is_cancelled: Callable[[], bool] = lambda: False
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def size(self) -> Size:
        """What it needs, in tokens."""
        return Size(len(self.prompt), self.max_new_tokens)


@dataclass(eq=False)
class _Running:
    """A request that has a row."""

    request: Request
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


class Batcher:
    """Runs requests together, in a thread of its own, until it is closed.

    Before each step, requests that wait take the rows that are free: their prompts run together,
    and from then on they decode with those that were there before. A request that has ended
    leaves its row at once.

    Args:
        runner: The engine; nobody else may use it.
        max_batch: Requests that decode at once.
        max_waiting: Requests that may wait for a row.
    """

    def __init__(self, runner: Runner, *, max_batch: int, max_waiting: int = 1024) -> None:
        self._runner = runner
        self._rows = build_rows(runner, max_batch)
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for a row.

        Raises:
            ValueError: Its prompt is empty, or it needs more positions than the engine has.
            BusyError: Too many wait already, or the batcher is closed.
        """
        self._check(request)
        with self._changed:
            if self._closed:
                raise BusyError("The server is shutting down. Ask again once it is back.")
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(
                    f"{self._max_waiting} requests wait already. Ask again in a moment."
                )
            self._waiting.append(request)
            self._changed.notify()

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise ValueError("the prompt has no tokens; give at least one")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_new_tokens}; it must be at least 1")
        needed = sum(request.size)
        if needed > self._runner.max_positions:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"need {needed} positions, and the model is served with "
                f"{self._runner.max_positions}; shorten the prompt or ask for fewer tokens"
            )

    def close(self, timeout: float | None = None) -> None:
        """Finish what runs and what waits, and end the thread.

        Args:
            timeout: Wait so many seconds at most; None for as long as it takes.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if not (self._waiting or self._running):
                    return
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever an engine raises ends requests
                self._fail(error)

    def _turn(self) -> None:
        """Let the cancelled go, the waiting join, and all take a token."""
        for row in reversed(range(len(self._running))):
            if self._running[row].request.is_cancelled():
                self._tell(self._running[row].request, None, CANCELLED)
                self._leave(row)
        self._admit()
        if self._running:
            self._take(0, self._rows.step([running.tokens[-1] for running in self._running]))

    def _admit(self) -> None:
        while joined := self._pick():
            first = len(self._running)
            self._running += [_Running(request, Sampler(request.sampling)) for request in joined]
            self._take(first, self._rows.start([request.prompt for request in joined]))

    def _pick(self) -> list[Request]:
        with self._changed:
            for request in [each for each in self._waiting if each.is_cancelled()]:
                self._waiting.remove(request)
                self._tell(request, None, CANCELLED)
            count = self._rows.count_startable([request.size for request in self._waiting])
            return [self._waiting.popleft() for _ in range(count)]

    def _take(self, first: int, logits: Tensor) -> None:
        """Give each row from ``first`` on its next token: logits of shape (n, vocab)."""
        best = logits.argmax(dim=-1).tolist()
        # From the last one on: a row that leaves gives its number to the last.
        for index in reversed(range(len(best))):
            row = first + index
            running = self._running[row]
            token = running.sampler.choose(logits[index], best[index])
            running.tokens.append(token)
            reason = self._find_reason(running)
            if self._tell(running.request, token, reason) or reason:
                self._leave(row)

    def _tell(self, request: Request, token: int | None, reason: str | None) -> bool:
        """Tell a listener, and return whether its request is to end."""
        try:
            return request.on_token(token, reason)
        except Exception as error:  # noqa: BLE001 - one listener's fault is not the others'
            request.on_error(error)
            return True

    def _find_reason(self, running: _Running) -> str | None:
        if running.tokens[-1] in running.request.stop_ids:
            return STOP
        return LENGTH if len(running.tokens) == running.request.max_new_tokens else None

    def _leave(self, row: int) -> None:
        self._rows.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _fail(self, error: Exception) -> None:
        failed, self._running = self._running, []
        self._rows.clear()
        for running in failed:
            running.request.on_error(error)

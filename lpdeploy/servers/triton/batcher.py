"""Continuous decoding: requests that join and leave one running batch."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from torch import Tensor

from lpdeploy.engines.runner import Runner
from lpdeploy.engines.sampler import Sampler
from lpdeploy.engines.sampling import Sampling
from lpdeploy.errors import LpdeployError
from lpdeploy.servers.triton.rows import Size, build_rows

logger = logging.getLogger(__name__)

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
    """A request that has a row, or waits for one."""

    request: Request
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


class Batcher:
    """Runs requests together, in a thread of its own, until it is closed.

    Before each step, requests that wait take the rows that are free: their prompts run together,
    and from then on they decode with those that were there before. A request that has ended
    leaves its row at once. Whatever goes wrong with one request, in its sampling or with those who
    listen to it, ends that request alone.

    Args:
        runner: The engine; nobody else may use it.
        max_batch: Requests that decode at once.
        max_waiting: Requests that may wait for a row.
    """

    def __init__(self, runner: Runner, *, max_batch: int, max_waiting: int = 1024) -> None:
        self._runner = runner
        self._rows = build_rows(runner, max_batch)
        self._max_waiting = max_waiting
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for a row.

        Raises:
            ValueError: Its prompt is empty or has a token that the model does not know, or it needs
                more positions than the engine has.
            BusyError: Too many wait already, or the batcher is closed.
        """
        self._check(request)
        waiting = _Running(request, Sampler(request.sampling))
        with self._changed:
            self.check_room()
            self._waiting.append(waiting)
            self._changed.notify()

    def check_room(self) -> None:
        """Check that one more request may wait.

        Raises:
            BusyError: Too many wait already, or the batcher is closed.
        """
        if self._closed:
            raise BusyError("The server is shutting down. Ask again once it is back.")
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(f"{self._max_waiting} requests wait already. Ask again in a moment.")

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise ValueError("the prompt has no tokens; give at least one")
        if not all(0 <= token < self._runner.vocab_size for token in request.prompt):
            raise ValueError(
                f"the prompt has a token that the model does not embed; it knows 0 to "
                f"{self._runner.vocab_size - 1}"
            )
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
            if self._is_cancelled(self._running[row].request):
                self._leave(row)
        self._admit()
        if self._running:
            self._take(0, self._rows.step([running.tokens[-1] for running in self._running]))

    def _admit(self) -> None:
        while joined := self._pick():
            first = len(self._running)
            try:
                logits = self._rows.start([each.request.prompt for each in joined])
            except Exception as error:  # noqa: BLE001 - those that run already are not concerned
                for each in joined:
                    _report(each.request, error)
                continue
            self._running += joined
            self._take(first, logits)

    def _pick(self) -> list[_Running]:
        with self._changed:
            here = list(self._waiting)
        # Listeners are asked without the lock: one may hold it up, or submit another request.
        gone = [each for each in here if self._is_cancelled(each.request)]
        with self._changed:
            for each in gone:
                self._waiting.remove(each)
            count = self._rows.count_startable([each.request.size for each in self._waiting])
            return [self._waiting.popleft() for _ in range(count)]

    def _is_cancelled(self, request: Request) -> bool:
        """Tell whether nobody waits for a request any more; its listener is told that it ended."""
        try:
            gone = request.is_cancelled()
        except Exception as error:  # noqa: BLE001 - one listener's fault is not the others'
            _report(request, error)
            return True
        if gone:
            self._tell(request, None, CANCELLED)
        return gone

    def _take(self, first: int, logits: Tensor) -> None:
        """Give each row from ``first`` on its next token: logits of shape (n, vocab)."""
        best = logits.argmax(dim=-1).tolist()
        # From the last one on: a row that leaves gives its number to the last.
        for index in reversed(range(len(best))):
            row = first + index
            running = self._running[row]
            try:
                token = running.sampler.choose(logits[index], best[index])
            except Exception as error:  # noqa: BLE001 - of this row's numbers alone
                _report(running.request, error)
                self._leave(row)
                continue
            running.tokens.append(token)
            reason = self._find_reason(running)
            if self._tell(running.request, token, reason) or reason:
                self._leave(row)

    def _tell(self, request: Request, token: int | None, reason: str | None) -> bool:
        """Tell a listener, and return whether its request is to end."""
        try:
            return request.on_token(token, reason)
        except Exception as error:  # noqa: BLE001 - one listener's fault is not the others'
            _report(request, error)
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
            _report(running.request, error)


def _report(request: Request, error: Exception) -> None:
    """Tell the listener of a request that it failed; one that cannot hear it is only logged."""
    try:
        request.on_error(error)
    except Exception:
        logger.exception("A request failed, and so did the one who was told.")

"""What SIGINT and SIGTERM do to a command."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lpdeploy.cli.common import is_first_rank, log
from lpdeploy.environment import count_ranks
from lpdeploy.errors import RunEndedError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FIRST_RANK_SECONDS = 5.0
_NOTED = "Ending after this step, with a checkpoint. Send the signal again to end at once."


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does: it stops its processes and removes its scratch.

    Ranks other than the first end in silence.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if is_first_rank():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    else:
        _reset(*_SIGNALS)


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set ``stop``, for a run that then ends after the current step.

    The second signal ends a single process at once. A rank ignores it, and keeps ignoring it until
    the process ends: launchers send several signals, also to the ranks that survive a lost one,
    and these need the time to write a checkpoint and say so.
    """
    alone = count_ranks() == 1

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def note(*_: object) -> None:
        stop.set()
        if alone:
            restore()
            with suppress(RuntimeError):  # the signal came while another message was written
                log(_NOTED)

    ignored = signal.SIG_IGN  # as nohup leaves SIGINT for what it starts
    noted = [number for number in _SIGNALS if signal.getsignal(number) is not ignored]
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield
    finally:
        if alone:
            restore()


@contextmanager
def explain_interrupt(begun: threading.Event) -> Iterator[None]:
    """Say what an interrupted command leaves where it has not begun to train.

    Args:
        begun: Set once there is something that a resumed run can go on from.

    Raises:
        RunEndedError: It was interrupted before that.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if begun.is_set():
            raise
        raise RunEndedError(
            "Interrupted before the first step, so there is no run to resume. Give the same "
            "command again."
        ) from error


def let_first_rank_speak() -> None:
    """Give the first rank time to report an error that all ranks of a run may share.

    Once it has reported it and ended, the launcher ends the other ranks, which stay silent. A rank
    that is still there after a few seconds has failed alone, and reports its own error.
    """
    if not is_first_rank():
        _reset(signal.SIGTERM)
        time.sleep(_FIRST_RANK_SECONDS)


def _reset(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)

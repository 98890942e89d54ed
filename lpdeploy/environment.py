"""What a process shares with the libraries in it: environment variables, warnings and loggers."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lpdeploy.errors import LpdeployError

# Each warns, at its import or on every call, of what a user of lpdeploy can do nothing about:
# bitsandbytes of a kernel that it would download, gguf and lm_eval of their progress.
_TALKATIVE = ("bitsandbytes.backends.cpu.ops", "gguf", "lm_eval")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MAX_RANKS = 65_536
_TRUST = "LPDEPLOY_TRUST_REMOTE_CODE"


def quieten_libraries() -> None:
    """Silence what other libraries announce to their authors, in a process that is ours alone.

    For the command line and the processes that are started for it, before they import anything
    else. Variables that the user has set in the environment stay as they are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C; whoever started them ends them.

    A terminal sends the signal to all processes of a command at once, and each of them would tell
    what it was interrupted in. In a thread other than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what is started
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def count_ranks() -> int:
    """Return how many processes a launcher started for this run: 1 without a launcher.

    Raises:
        LpdeployError: The environment names several, and not all that they need to find each other.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    given = {name: os.environ.get(name, "") for name in _RANK_VARIABLES}
    missing = [name for name, value in given.items() if not value]
    if missing:
        _refuse_ranks(f"WORLD_SIZE is {size!r}, but it has no {', '.join(missing)}")
    for name, value in {"WORLD_SIZE": size, **given}.items():
        if name != "MASTER_ADDR" and not value.isdecimal():
            _refuse_ranks(f"{name} is {value!r}, which is no whole number")
    if not int(given["RANK"]) < int(size) <= _MAX_RANKS:
        _refuse_ranks(f"RANK is {given['RANK']} of WORLD_SIZE {size}")
    return int(size)


def _refuse_ranks(what: str) -> NoReturn:
    raise LpdeployError(
        f"The environment does not describe a distributed run: {what}. Start it with 'accelerate "
        "launch', or unset WORLD_SIZE to run a single process."
    )


@contextmanager
def trust_remote_code() -> Iterator[None]:
    """Let code that comes with a checkpoint run meanwhile, also in processes that are started.

    A tokenizer may bring Python files of its own, which can do anything that the user can. Without
    this, they are never run, and nothing asks whether to. The code of models is never run: lpdeploy
    has classes of its own for them.
    """
    with set_variable(_TRUST, "1"):
        yield


def is_remote_code_trusted() -> bool:
    """Tell whether code that comes with a checkpoint may run."""
    return os.environ.get(_TRUST) == "1"


@contextmanager
def set_variable(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable meanwhile, for this process and those that it starts.

    Args:
        name: Of the variable.
        value: None leaves it as it is.
    """
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

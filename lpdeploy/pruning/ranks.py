"""What differs where a run has several ranks: who runs what, what is summed, who speaks.

Each rank holds all of LoRA, its moments and the scores, runs its share of the micro-batches of the
global batch, and takes every decision itself, from the same sums. The first rank alone writes.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import IGNORED
from lpdeploy.environment import count_ranks
from lpdeploy.errors import LpdeployError, RankLostError, RunEndedError
from lpdeploy.models.loading import resolve_device

# How long a rank waits for a peer that lives but does not answer. A dead one is noticed at once.
_TIMEOUT = timedelta(minutes=10)
_POLL_SECONDS = 1e-4
# How long it waits for anyone once it was told to end; launchers kill after 30 seconds.
_PATIENCE_SECONDS = 15.0
OTHER_START = (
    "it has other options, or sees another model, other data or another checkpoint. Give every "
    "rank the same command, and paths that all of them see."
)
"""Why ranks may not begin together."""
_WRAPPERS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


@dataclass
class Ranks:
    """The processes that prune one model together; one process is the case of size 1.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        device: Where the messages between them are made.
        stop: Set by the caller to end the run after the current step.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files, and speaks to the user."""
        return self.rank == 0

    def deal(self, micros: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
        """Return the micro-batches that this rank runs: every ``size``-th.

        All ranks run as many, since sharded weights are gathered by all ranks at once; where the
        number does not divide, the last ranks run one in which nothing counts.
        """
        missing = -len(micros) % self.size
        return [*micros, *[_make_empty(micros[-1])] * missing][self.rank :: self.size]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, in one message for each dtype.

        Every rank receives the same bits, so that all go on as one.

        Args:
            tensors: Of the same shapes on every rank, on ``device``; changed in place.

        Raises:
            RankLostError: A rank is gone, or did not answer for ten minutes.
        """
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            own = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.detach().reshape(-1) for t in own])
            with self.watch():
                self._finish(dist.all_reduce(flat, async_op=True))
            for tensor, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first rank."""
        if not self.is_first:
            for tensor in tensors:
                tensor.zero_()
        self.sum(tensors)

    def check_stop(self) -> None:
        """End the run on all ranks after the same step if any of them was told to stop.

        Raises:
            RunEndedError: At least one was.
        """
        told = torch.tensor(int(self.stop.is_set()), device=self.device)
        self.sum([told])
        if told:
            raise RunEndedError(RunEndedError.SENTENCE)

    def check_same(self, text: str, *, otherwise: str) -> None:
        """Compare a hash of ``text`` over the ranks.

        Raises:
            LpdeployError: It differs on some rank; says which, and ``otherwise``.
        """
        if self.size == 1:
            return
        digest = torch.frombuffer(
            bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8
        )
        table = torch.zeros(self.size, len(digest), dtype=torch.int32, device=self.device)
        table[self.rank] = digest.to(self.device)
        self.sum([table])
        odd = [rank for rank, row in enumerate(table.tolist()) if row != table[0].tolist()]
        if odd:
            raise LpdeployError(f"Rank {odd[0]} of {self.size} differs from rank 0: {otherwise}")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Turn what a backend raises when a rank does not answer into one sentence.

        gloo raises at once where the connection of a killed rank closes, and after the timeout
        where a rank lives but hangs.

        Raises:
            RankLostError: That.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_about_peers(error):
                raise
            raise RankLostError(
                f"Rank {self.rank} of {self.size} lost another rank, which was killed or has "
                "failed."
            ) from error

    def is_first_to_notice(self) -> bool:
        """Tell whether this rank is the first of those left that found another gone.

        It then writes the checkpoint and says so, whichever it is: all hold the same state.
        """
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.add("lpdeploy/lost", 1) == 1
        except RuntimeError:  # it was held by the rank that is gone, not by a launcher
            return True

    def _finish(self, work: dist.Work) -> None:
        # Not ``wait`` alone: while a backend waits for a dead peer, no signal would get through.
        deadline = None
        while not work.is_completed():
            time.sleep(_POLL_SECONDS)
            if self.stop.is_set():
                deadline = deadline or time.monotonic() + _PATIENCE_SECONDS
                if time.monotonic() > deadline:
                    raise dist.DistBackendError("a rank did not answer while the run was ending")
        work.wait()


def join_ranks(options: PruneConfig, *, stop: threading.Event | None = None) -> Ranks:
    """Join the other processes that a launcher has started, if there are any.

    Args:
        options: How to prune.
        stop: Set by the caller to end the run after the current step.

    Raises:
        LpdeployError: accelerate is to wrap the model, the batch cannot be dealt evenly, one
            process alone is to shard it, or the environment describes no whole group of ranks.
    """
    from accelerate import PartialState

    for name in _WRAPPERS:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise LpdeployError(
                f"accelerate is configured for {name}, but the model must not be wrapped: groups "
                "are cut out of it. Use 'accelerate launch --multi_gpu', and `shard=True` to "
                "spread a base over the GPUs."
            )
    ranks = Ranks(device=torch.device(resolve_device(options.device)))
    if count_ranks() > 1:
        state = PartialState(cpu=ranks.device.type == "cpu", timeout=_TIMEOUT)
        ranks = Ranks(rank=state.process_index, size=state.num_processes, device=state.device)
    ranks.stop = stop or ranks.stop
    _check_share(options, ranks.size)
    return ranks


def leave_ranks() -> None:
    """Part from the other processes, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_share(options: PruneConfig, size: int) -> None:
    if options.shard and size == 1:
        raise LpdeployError(
            "`shard=True` spreads the base over several ranks, and this is the only one. Start "
            "with 'accelerate launch --num_processes 8 -m lpdeploy prune', or leave `shard` out."
        )
    micro, batch = options.micro_batch_size, options.batch_size
    if batch % (size * micro):
        raise LpdeployError(
            f"`batch_size` {batch} cannot be dealt evenly over {size} ranks in micro-batches of "
            f"{micro}. Choose a multiple of {size * micro}, or another `micro_batch_size`."
        )


def _make_empty(micro: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make a micro-batch without a target or a real token: it adds zero to whatever is summed."""
    return {
        **micro,
        "labels": torch.full_like(micro["labels"], IGNORED),
        "attention_mask": torch.zeros_like(micro["attention_mask"]),
    }


def _is_about_peers(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that name its source files, NCCL its own kind.
    return isinstance(error, dist.DistError) or "gloo" in str(error)

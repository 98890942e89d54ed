"""What the unpruned model expects behind each token, on disk: computed once, before training.

A teacher beside the student doubles the memory, and its pass slows down every step; ``LiveTeacher``
is for those who have the memory, and no space on disk. Otherwise, the unpruned model runs once over
the rows that training will see, before anything else is loaded. Its most probable tokens are kept
in a file that later runs with the same model, data and settings use again. Rows are written one
after the other, so a run that was stopped goes on where it was.
"""

import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpdeploy.artifacts import explain_full_disk, save_json
from lpdeploy.data.batches import Progress, TokenDataset, list_batch, split_batch
from lpdeploy.data.cache import hash_identity
from lpdeploy.errors import ArtifactError
from lpdeploy.machine import format_bytes
from lpdeploy.pruning.loss import Taught, count_chunk_tokens

logger = logging.getLogger(__name__)

# Increase this when the same identity gives other numbers than before.
_VERSION = 1
_LOG_PROB = np.dtype(np.float16)
_CHECK = np.dtype(np.uint32)
_LEAST = torch.finfo(torch.float16).min  # 0 times minus infinity would be no number


class Teacher(Protocol):
    """What tells a training what the unpruned model expects."""

    def teach(self, micro: Mapping[str, Tensor]) -> Taught:
        """Return what it expects behind each token of a micro-batch.

        Args:
            micro: ``input_ids`` as ``TokenDataset.collate`` pads them, and their numbers, ``rows``.
        """


@dataclass(frozen=True)
class LiveTeacher:
    """The unpruned model in memory, which runs beside the one in training.

    Attributes:
        model: A causal LM in eval mode.
        top_k: Tokens that it tells behind each token.
        weight: Of the divergence in the loss.
        temperature: By which its logits are divided.
        autocast: Makes the context in which it computes.
    """

    model: Any
    top_k: int
    weight: float
    temperature: float
    autocast: Callable[[], Any]

    @torch.no_grad()
    def teach(self, micro: Mapping[str, Tensor]) -> Taught:
        """Run the model over a micro-batch; see ``Teacher``."""
        ids = micro["input_ids"].to(self.model.lm_head.weight.device)
        with self.autocast():
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        found = _find_top(self.model, hidden.flatten(0, 1), self.top_k, self.temperature)
        log_probs, tokens = (tensor.unflatten(0, ids.shape) for tensor in found)
        log_probs = log_probs.clamp_min(_LEAST)  # of no others, if it tells all tokens
        return Taught(log_probs, tokens, weight=self.weight, temperature=self.temperature)


@dataclass(frozen=True)
class TeacherCache:
    """A folder with the most probable tokens behind each token of some rows.

    Attributes:
        folder: Holds ``identity.json``, ``tokens`` (log-probabilities and ids, row after row) and
            ``checks`` (a CRC-32 a row; 0 for one that is not there).
        dataset: The rows.
        top_k: Tokens that are kept behind each token.
        wide: Whether the vocabulary needs ids of four bytes.
        weight: Of the divergence in the loss.
        temperature: By which the teacher's logits were divided.
    """

    folder: Path
    dataset: TokenDataset
    top_k: int
    wide: bool
    weight: float
    temperature: float

    @property
    def _id(self) -> np.dtype[Any]:
        return np.dtype(np.int32 if self.wide else np.uint16)

    @property
    def bytes_a_token(self) -> int:
        """Bytes on disk for each token."""
        return (self.top_k + 1) * _LOG_PROB.itemsize + self.top_k * self._id.itemsize

    def count_bytes(self, rows: Iterable[int]) -> int:
        """Return the bytes on disk of some rows."""
        return int(self.dataset.lengths[list(rows)].sum()) * self.bytes_a_token

    def list_missing(self, rows: Iterable[int]) -> list[int]:
        """List those of some rows that are not there yet."""
        checks = self._load_checks()
        return [row for row in rows if not checks[row]]

    def save(self, row: int, log_probs: Tensor, ids: Tensor) -> None:
        """Write what is expected behind the tokens of a row, as in ``Taught``."""
        data = log_probs.clamp_min(_LEAST).to(torch.float16).cpu().numpy().tobytes()
        data += ids.cpu().numpy().astype(self._id).tobytes()
        with explain_full_disk(self.folder):
            _write_at(self.folder / "tokens", data, at=self._find(row))
            # After the data, so that a row whose check is there is whole.
            check = np.array([zlib.crc32(data) or 1], _CHECK).tobytes()
            _write_at(self.folder / "checks", check, at=row * _CHECK.itemsize)

    def teach(self, micro: Mapping[str, Tensor]) -> Taught:
        """Read the rows of a micro-batch; see ``Teacher`` and ``load``."""
        return self.load(micro["rows"].tolist())

    def load(self, rows: Sequence[int]) -> Taught:
        """Read some rows, padded on the right as ``TokenDataset.collate`` pads them.

        Raises:
            ArtifactError: A row is missing, or its bytes are not those that were written.
        """
        checks, longest = self._load_checks(), int(self.dataset.lengths[list(rows)].max())
        log_probs = torch.zeros(len(rows), longest, self.top_k + 1, dtype=torch.float16)
        ids = torch.arange(self.top_k).repeat(len(rows), longest, 1)  # any, but each one once
        with (self.folder / "tokens").open("rb") as file:
            for place, row in enumerate(rows):
                length = int(self.dataset.lengths[row])
                file.seek(self._find(row))
                data = file.read(length * self.bytes_a_token)
                if (zlib.crc32(data) or 1) != checks[row]:
                    raise ArtifactError(
                        f"'{self.folder}' lacks what the unpruned model expects in row {row}, or "
                        "was damaged. Delete that folder, and prune again. Several machines need "
                        "one cache that all of them see: set LPDEPLOY_CACHE."
                    )
                end = length * (self.top_k + 1) * _LOG_PROB.itemsize
                found = np.frombuffer(data[:end], _LOG_PROB).reshape(length, -1)
                log_probs[place, :length] = torch.from_numpy(found.copy())
                found = np.frombuffer(data[end:], self._id).reshape(length, -1)
                ids[place, :length] = torch.from_numpy(found.astype(np.int64))
        return Taught(log_probs, ids, weight=self.weight, temperature=self.temperature)

    def _find(self, row: int) -> int:
        return int(self.dataset.offsets[row]) * self.bytes_a_token

    def _load_checks(self) -> NDArray[np.uint32]:
        path, checks = self.folder / "checks", np.zeros(len(self.dataset), _CHECK)
        if path.is_file():
            found = np.frombuffer(path.read_bytes()[: checks.nbytes], np.uint8)
            checks.view(np.uint8)[: len(found)] = found
        return checks


def _write_at(path: Path, data: bytes, *, at: int) -> None:
    # Not through a mapped file: where the disk is full, that ends the process without a word.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        while data:
            written = os.pwrite(handle, data, at)
            data, at = data[written:], at + written
    finally:
        os.close(handle)


def find_teacher_folder(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Return the folder of a cache for all that its contents depend on, and make it."""
    identity = {"version": _VERSION, **identity}
    folder = cache / "teachers" / hash_identity(identity)
    if not (folder / "identity.json").exists():
        save_json(folder / "identity.json", identity)
    return folder


def list_training_rows(
    dataset: TokenDataset, *, steps: int, batch_size: int, seed: int
) -> list[int]:
    """List the rows that the steps of a run see, each once."""
    seen: dict[int, None] = {}
    for step in range(steps):
        seen |= dict.fromkeys(list_batch(len(dataset), step=step, batch_size=batch_size, seed=seed))
        if len(seen) == len(dataset):
            break
    return list(seen)


@torch.no_grad()
def fill_cache(
    cache: TeacherCache,
    model: Any,
    rows: Sequence[int],
    *,
    batch_size: int,
    autocast: Callable[[], Any],
    on_progress: Progress | None = None,
) -> None:
    """Run the unpruned model over rows, and keep its most probable tokens.

    Args:
        cache: Where to.
        model: A causal LM in eval mode.
        rows: Of the data set.
        batch_size: Rows of a pass.
        autocast: Makes the context in which it computes.
        on_progress: Is told (rows done, all rows).

    Raises:
        DiskFullError: There is no space left.
    """
    device = model.lm_head.weight.device
    done = 0
    for micro in split_batch(rows, cache.dataset.lengths, micro_batch_size=batch_size):
        ids = cache.dataset.collate(micro)["input_ids"].to(device)
        with autocast():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for row, states in zip(micro, hidden, strict=True):
            real = states[: cache.dataset.lengths[row]]
            cache.save(row, *_find_top(model, real, cache.top_k, cache.temperature))
        done += len(micro)
        if on_progress is not None:
            on_progress(done, len(rows))


def _find_top(model: Any, states: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    head = model.lm_head.weight
    size = count_chunk_tokens(head.shape[0], head.device.type)
    parts = []
    for part in states.to(head.dtype).split(size):
        logs = ((part @ head.t()).float() / temperature).log_softmax(dim=-1)
        top = logs.topk(top_k, dim=-1)
        others = logs.scatter_(1, top.indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
        parts.append((torch.cat([top.values, others], dim=1), top.indices))
    log_probs, ids = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(ids)


def describe_cache(cache: TeacherCache, rows: Sequence[int], missing: Sequence[int]) -> str:
    """Say how large a cache is, and how much of it is still to be made."""
    size = format_bytes(cache.count_bytes(rows))
    what = f"{cache.top_k} per position, {len(rows):,} rows, {size}"
    if not missing:
        return f"Using the unpruned model's cached predictions ({what}) in '{cache.folder}'."
    return (
        f"Running the unpruned model over {len(missing):,} new rows; its most probable next tokens "
        f"({what}) are kept in '{cache.folder}'."
    )

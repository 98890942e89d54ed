"""Safetensors files read and written in blocks of rows, and hashed on the way.

A file is read once from its beginning to its end, and written likewise, so that memory is a few
blocks whatever the size of a tensor. What is read is hashed in a thread, what is written is hashed
and written in another, while the blocks after it are read and cut.
"""

import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpdeploy.errors import ArtifactError, quote_error

# Small enough to stay in the cache between reading, hashing, cutting and writing.
BLOCK_BYTES = 1 << 20
# Buffers that are read into in turn. A block is hashed, and written, before its buffer's next turn;
# several, since of some blocks nothing is written.
_DEPTH = 6
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says of one tensor.

    Attributes:
        dtype: In the format's own words: ``F32``, ``BF16``.
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same in torch's words."""
        return _DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return self.torch_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes

    def iterate_shapes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yield the first row and the shape of each block; a row at least."""
        if not self.shape:
            yield 0, ()
            return
        rows, rest = self.shape[0], self.shape[1:]
        step = max(1, BLOCK_BYTES // max(1, math.prod(rest) * self.item_bytes))
        for first in range(0, rows, step):
            yield first, (min(step, rows - first), *rest)


def load_layout(file: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Returns:
        Tensor name -> what it is, in the order of the bytes.

    Raises:
        ArtifactError: The file is missing, damaged, or holds a type of number that is not known.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            layout = {
                name: TensorInfo(piece.get_dtype(), tuple(piece.get_shape()))
                for name, piece in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise _describe_unreadable(file, error) from error
    for name, info in layout.items():
        if info.dtype not in _DTYPES:
            raise ArtifactError(
                f"'{file}' holds {name} as {info.dtype}, which is not read. Save the model in "
                "float32, float16 or bfloat16."
            )
    return layout


def iterate_blocks(
    file: Path, *, hashes: MutableMapping[str, str]
) -> Iterator[tuple[str, int, Tensor]]:
    """Read a safetensors file from its beginning to its end.

    Args:
        file: What to read.
        hashes: Gets the SHA-256 of the whole file under its name, after the last block.

    Yields:
        (name, first row, rows): a block of a tensor. It lies in a buffer that a later one
        overwrites, ``_DEPTH`` blocks on.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    layout = load_layout(file)
    largest = max((math.prod(s) * i.item_bytes for i in layout.values() for _, s in
                   i.iterate_shapes()), default=0)  # fmt: skip
    buffers = itertools.cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(_DEPTH)])
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as stream, _Background() as hashing:
            length = stream.read(8)
            digest.update(length + stream.read(int.from_bytes(length, "little")))
            for name, info in layout.items():
                for first, shape in info.iterate_shapes():
                    block = next(buffers)[: math.prod(shape) * info.item_bytes]
                    _read_into(stream, block)
                    hashing.submit(digest.update, block.numpy())
                    yield name, first, block.view(_DTYPES[info.dtype]).view(shape)
            hashing.wait()
        hashes[file.name] = digest.hexdigest()
    except OSError as error:
        raise _describe_unreadable(file, error) from error


def _describe_unreadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"'{file}' cannot be read: {quote_error(error)}. Copy the checkpoint anew."
    )


def _read_into(stream: Any, block: Tensor) -> None:
    view = block.numpy().data
    while view:
        count = stream.readinto(view)
        if not count:
            raise OSError("it ended early")
        view = view[count:]


def write_tensors(
    file: Path, layout: Mapping[str, TensorInfo], blocks: Iterator[tuple[str, Tensor]]
) -> str:
    """Write a safetensors file from blocks of rows.

    Args:
        file: Where to.
        layout: Its tensors, in the order in which their blocks come.
        blocks: (name, rows), which stay as they are for the ``_DEPTH - 1`` after them; only
            those of ``layout`` are taken.

    Returns:
        The SHA-256 of the file.
    """
    digest = hashlib.sha256()
    with file.open("wb") as stream, _Background() as writing:

        def write(data: Any) -> None:
            digest.update(data)
            stream.write(data)

        write(_build_header(layout))
        for name, info in layout.items():
            left = info.num_bytes
            while left:
                got, block = next(blocks)
                left -= block.nbytes
                if got != name or left < 0:
                    raise ValueError(f"a block of {got} does not fit into {name}")
                data = block.contiguous().view(-1).view(torch.uint8).numpy()
                writing.submit(write, data.data)
        writing.wait()
    return digest.hexdigest()


def _build_header(layout: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses one without
    start = 0
    for name, info in layout.items():
        stop = start + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers after it are aligned
    return len(text).to_bytes(8, "little") + text


class _Background:
    """Work in a thread of its own, in its order; that which is ``_DEPTH`` pieces back is done."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> "_Background":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        """Begin work, whose arguments stay as they are for the next ``_DEPTH - 1`` pieces."""
        self._pending.append(self._pool.submit(work, *arguments))
        while len(self._pending) >= _DEPTH:
            self._pending.popleft().result()

    def wait(self) -> None:
        """Wait for all that was begun."""
        while self._pending:
            self._pending.popleft().result()

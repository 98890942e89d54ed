"""What this machine can do at most: bytes copied and products computed a second, by torch."""

import torch

_COPY_BYTES = 1 << 28
_MATRIX = 2048
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class LimitsProbe:
    """Two works whose times say how fast memory and arithmetic are while others are timed.

    Attributes:
        units: What each work does: bytes read and written, or floating-point operations.
    """

    def __init__(self, *, device: str, precision: str = "fp32") -> None:
        # Matrix products on a GPU are as fast as their precision; a CPU computes in float32.
        dtype = _DTYPES.get(precision, torch.float32) if device != "cpu" else torch.float32
        self._source = torch.ones(_COPY_BYTES // 4, device=device)
        self._target = torch.empty_like(self._source)
        size = _MATRIX if device == "cpu" else 4 * _MATRIX
        self._left = torch.randn(size, size, device=device, dtype=dtype)
        self._right = torch.randn(size, size, device=device, dtype=dtype)
        self.units = {"copy": 2.0 * _COPY_BYTES, "matrix": 2.0 * size**3}

    def run(self, work: str) -> None:
        """Do ``copy`` or ``matrix`` once."""
        if work == "copy":
            self._target.copy_(self._source)
        else:
            torch.mm(self._left, self._right)

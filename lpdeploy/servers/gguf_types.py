"""What the matrices of a GGUF file may be written in; vectors stay in F32 as its readers expect."""

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0", "q8_0": "Q8_0"}
"""Precision -> type that the ``gguf`` library writes."""
K_QUANTS = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
"""Precisions that llama.cpp's own quantizer makes, most of them of several types."""
K_BLOCK = 256
"""Weights of a row that share their scales in a K-quant."""
SMALL_BLOCKS = ("q4_0", "iq4_nl")
"""Precisions that it makes of blocks of 32, which the rows of a pruned model fit more often."""


def list_precisions() -> list[str]:
    """List the precisions of a package for llama.cpp."""
    return [*TYPES, *K_QUANTS, *SMALL_BLOCKS]

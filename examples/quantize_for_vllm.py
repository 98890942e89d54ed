"""Round a compacted model to 4 bits for vLLM, with llm-compressor in an environment of its own.

llm-compressor wants an older transformers than lpdeploy, so the two do not live together:

python -m venv llm-compressor
llm-compressor/bin/pip install llmcompressor==0.14.0.1
llm-compressor/bin/python examples/quantize_for_vllm.py RUN/model OUTPUT gptq TEXT.txt
vllm serve OUTPUT
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoTokenizer

ROWS, TOKENS = 128, 512
# The head keeps its precision, as in most published checkpoints.
LINEARS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
METHODS = {
    "gptq": lambda: GPTQModifier(scheme="W4A16", **LINEARS),
    "awq": lambda: AWQModifier(scheme="W4A16_ASYM", **LINEARS),
    "nvfp4": lambda: QuantizationModifier(scheme="NVFP4A16", **LINEARS),  # needs no text
}


def load_rows(model: str, text: str) -> Dataset:
    """Cut the text that the model was pruned with into rows of tokens."""
    tokens = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))
    ids = tokens["input_ids"][: ROWS * TOKENS]
    rows = [ids[start : start + TOKENS] for start in range(0, len(ids), TOKENS)]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )


def main(model: str, output: str, method: str, text: str | None = None) -> None:
    """Round the projections of a model, and write what vLLM reads."""
    data = {} if text is None else {"dataset": load_rows(model, text), "max_seq_length": TOKENS}
    oneshot(
        model=model,
        recipe=METHODS[method](),
        num_calibration_samples=ROWS,
        output_dir=output,
        **data,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

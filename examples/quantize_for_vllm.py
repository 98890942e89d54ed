"""Round a compacted model to 4 bits for vLLM, with llm-compressor in an environment of its own.

llm-compressor wants an older transformers than lpdeploy, so the two do not live together:

python -m venv llm-compressor
llm-compressor/bin/pip install llmcompressor==0.14.0.1
llm-compressor/bin/python examples/quantize_for_vllm.py RUN/model OUTPUT gptq DATA
vllm serve OUTPUT

DATA is what the model was pruned with: text, or a .jsonl whose rows have `messages`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

try:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
except ImportError as error:
    sys.exit(f"{error}. Run this with the Python of the environment that the first lines describe.")

ROWS, TOKENS = 128, 512
# The head keeps its precision, as in most published checkpoints.
LINEARS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
METHODS = {
    "gptq": lambda: GPTQModifier(scheme="W4A16", **LINEARS),
    "awq": lambda: AWQModifier(scheme="W4A16_ASYM", **LINEARS),
    "nvfp4": lambda: QuantizationModifier(scheme="NVFP4A16", **LINEARS),  # needs no text
}


def load_rows(model: str, data: str) -> Dataset:
    """Return rows of tokens: one for each conversation, or pieces of the text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = Path(data).read_text(encoding="utf-8")
    if data.endswith(".jsonl"):
        chats = [json.loads(line)["messages"] for line in text.splitlines()[:ROWS]]
        written = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        encoded = tokenizer(written, add_special_tokens=False)["input_ids"]
        rows = [ids[:TOKENS] for ids in encoded]
    else:
        ids = tokenizer(text)["input_ids"][: ROWS * TOKENS]
        rows = [ids[start : start + TOKENS] for start in range(0, len(ids), TOKENS)]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )


def main(model: str, output: str, method: str, data: str | None = None) -> None:
    """Round the projections of a model, and write what vLLM reads."""
    if data is None and method != "nvfp4":
        sys.exit(f"{method} needs data to calibrate with. Add the file that you pruned with.")
    rows = {} if data is None else {"dataset": load_rows(model, data), "max_seq_length": TOKENS}
    oneshot(
        model=model,
        recipe=METHODS[method](),
        num_calibration_samples=ROWS,
        output_dir=output,
        **rows,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Show what models answer, what they weigh, and which part of their time is the output head's.

    python -m tools.measure.answers MODEL... --output docs/measurements/answers-NAME.json

Each model, a checkpoint folder, answers the same questions greedily through its chat template. The
head is the product with the embedding matrix that makes the logits of one position; pruning leaves
it as large as it was. The models take turns, token by token, in fp32.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import count_parameters
from tools.measure.common import build_parser, report, save_measurement

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I keep bread fresh for longer?",
)
PROMPT_TOKENS, REPEATS = 256, 32


class TimedHead:
    """The seconds that a model and its output head took, one entry a forward pass."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.whole: list[float] = []
        self.head: list[float] = []
        self._begun = 0.0
        model.lm_head.register_forward_pre_hook(lambda *_: self._start())
        model.lm_head.register_forward_hook(lambda *_: self._stop())

    def _start(self) -> None:
        self._begun = time.perf_counter()

    def _stop(self) -> None:
        self.head.append(time.perf_counter() - self._begun)

    def run(self, tokens: Tensor, past: Any = None) -> Any:
        """Run one pass that needs the logits of its last position alone."""
        start = time.perf_counter()
        output = self.model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        self.whole.append(time.perf_counter() - start)
        return output

    def take(self) -> dict[str, float]:
        """Return the medians in ms, and the share of the head; the next ones start anew."""
        whole, head = (1000 * statistics.median(times) for times in (self.whole, self.head))
        self.whole.clear()
        self.head.clear()
        return {"ms": whole, "head_ms": head, "head_share": head / whole}


def answer(model: Any, tokenizer: Any, question: str, *, tokens: int) -> str:
    """Answer a question greedily."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    new = found[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def time_heads(models: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Time prefill and decode of each model, in turn."""
    timed = {name: TimedHead(model) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    fewest = min(model.config.vocab_size for model in models.values())
    tokens = torch.randint(fewest, (1, PROMPT_TOKENS), generator=torch.manual_seed(0))
    past: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        for repeat in range(-1, REPEATS):  # the first one warms up
            for name, each in timed.items():
                if phase == "prefill":
                    past[name] = each.run(tokens).past_key_values
                else:
                    each.run(tokens[:, :1], past[name])
                if repeat < 0:
                    each.take()
            report(repeat + 1, REPEATS)
        for name, each in timed.items():
            found[name][phase] = each.take()
    return found


def main() -> None:
    """Read the command line, ask and time the models, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=60)
    options = parser.parse_args()
    document: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "repeats": REPEATS, "models": {}}
    models = {}
    with torch.inference_mode():
        for folder in options.models:
            # A run has its model in a folder of that name.
            name = folder.parent.name if folder.name == "model" else folder.name
            models[name] = load_model(folder, dtype="fp32").eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            document["models"][name] = {
                "parameters": count_parameters(load_config(folder)),
                "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                "answers": {
                    question: answer(models[name], tokenizer, question, tokens=options.tokens)
                    for question in QUESTIONS
                },
            }
        for name, phases in time_heads(models).items():
            document["models"][name] |= phases
    save_measurement(options.output, document)


if __name__ == "__main__":
    main()

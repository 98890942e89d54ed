"""Task files made in place, of words that the tiny models' tokenizer knows."""

import json
import random

from tokenizers import processors
from transformers import AutoTokenizer

from tests.helpers import WORDS, make_tiny_model


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_task_files(folder, *, items=12):
    """Save piqa, arc_easy, winogrande and mmlu; some contexts exceed the 128 positions."""
    rng = random.Random(0)

    def text(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def ask(number, choices):
        query = f"Question: {text(150, 180) if number == 3 else text(2, 20)}"
        options = [text(1, 6) for _ in range(choices)]
        return {"query": query, "choices": options, "gold": rng.randrange(choices), "other": 1}

    piqa = [ask(n, 2) for n in range(items)]
    write_rows(folder / "piqa.jsonl", [{**row, "query": row["query"] + "\n"} for row in piqa])
    write_rows(folder / "arc_easy.jsonl", [ask(n, 3 + n % 3) for n in range(items)])
    write_rows(folder / "mmlu.jsonl", [ask(n, 4) for n in range(items)])
    contexts = [
        {
            "context_options": [text(3, 8), text(3, 8)],
            "continuation": text(1, 5),
            "gold": rng.randrange(2),
        }
        for _ in range(items)
    ]
    write_rows(folder / "winogrande.jsonl", contexts)
    return folder


def make_model(folder, *, adds_bos=True):
    """Save a tiny model whose tokenizer starts texts with bos by itself, or does not."""
    make_tiny_model(folder, heads=4, kv_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        tokenizer.save_pretrained(folder)
    return folder

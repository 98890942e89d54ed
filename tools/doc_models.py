"""Tables about what a model says, weighs and takes."""

from typing import Any

from tools.doc_text import describe, write_table


def render_answers(data: dict[str, Any]) -> str:
    """Put what models answer side by side, and say which part of their time the head takes."""
    models = data["models"]
    rows = [
        (
            name,
            f"{model['parameters'] / 1e6:.1f}",
            f"{model['bytes'] / 1e6:.0f}",
            *(
                f"{model[phase]['ms']:.3g} ({model[phase]['head_share']:.0%})"
                for phase in ("prefill", "decode")
            ),
        )
        for name, model in models.items()
    ]
    header = ("model", "parameters, M", "weights, MB", "prefill, ms (head)", "decode, ms (head)")
    about = (
        f"A prompt of {data['prompt_tokens']} tokens, and one token after it, with torch in fp32; "
        f"medians of {data['repeats']} passes, the models in turn. In brackets: the share of the "
        "output head."
    )
    questions = list(next(iter(models.values()))["answers"])
    said = [
        (question, *(" ".join(model["answers"][question].split()) for model in models.values()))
        for question in questions
    ]
    greedy = "Greedy answers through the chat template, cut after the same number of tokens."
    return "\n\n".join(
        [
            write_table(header, rows, about, describe(data, "peft")),
            write_table(("question", *models), said, greedy),
        ]
    )


def render_formats(data: dict[str, Any]) -> str:
    """Compare the number formats of one model."""
    formats = data["formats"]
    first = next(iter(formats.values()))
    rows = [
        (
            name,
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.2f} ({row['perplexity'] / first['perplexity'] - 1:+.1%})",
            f"{row['same_next_token']:.1%}",
            f"{row['same_greedy_tokens']} of {data['decoded_tokens']}",
            _write_rate(row),
        )
        for name, row in formats.items()
    ]
    header = ("format", "MB", "perplexity", "same next token", "same first tokens", "tokens/s")
    about = (
        f"{data['model']}, {data['segments']} segments of {data['seq_len']} tokens of "
        f"{data['text']}. The same next token: the share of positions where the format and fp32 "
        f"rank the same token first. The same first tokens: how many of {data['decoded_tokens']} "
        "that are decoded greedily are those of fp32. Tokens/s: decode of one sequence, median "
        f"(p10 to p90) of {data['rounds']} rounds in which the formats take turns."
    )
    return write_table(header, rows, about, describe(data))


def _write_rate(row: dict[str, Any]) -> str:
    median, slow, fast = (1000 / row[f"decode_{part}ms"] for part in ("", "p90_", "p10_"))
    return f"{median:.1f} ({slow:.1f} to {fast:.1f})"

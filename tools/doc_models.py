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


def render_int4(data: dict[str, Any]) -> str:
    """Compare ways to round weights to 4 bits on several models."""
    models = data["models"]
    first = next(iter(models.values()))
    rows = [
        (name, *(_write_way(model, name) for model in models.values())) for name in first["ways"]
    ]
    texts = ", ".join(
        f"{name} {model['perplexity']:.2f} ({model['segments']} segments of {model['seq_len']} "
        f"tokens of {model['text']})"
        for name, model in models.items()
    )
    kinds = data["product"]["kinds"]
    plain = kinds["symmetric"]["median_us"]
    times = ", ".join(f"{name} {kind['median_us'] / plain:.2f}" for name, kind in kinds.items())
    about = (
        "What rounding adds to perplexity, and bits of a weight with its scales. Unrounded "
        f"perplexity: {texts}. The time of a product of one token with a matrix of "
        f"{data['product']['width']:,} x {data['product']['width']:,} in ONNX Runtime, against "
        f"symmetric blocks of 32: {times}."
    )
    return write_table(("weights", *models), rows, about, describe(data))


def _write_way(model: dict[str, Any], name: str) -> str:
    way = model["ways"][name]
    return f"{way['perplexity'] / model['perplexity'] - 1:+.1%} ({way['bits']:.2f} bits)"

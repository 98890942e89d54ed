"""Greedy or sampled generation with a KV cache, on any engine."""

import torch
from torch import Tensor

from lpdeploy.engines.runner import Runner, pad_left


def generate(
    runner: Runner,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: set[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    Args:
        runner: The model.
        prompts: Token ids of each row, at least one a row.
        max_new_tokens: At most so many tokens are added to a row.
        eos_ids: Tokens that end their row; may be empty.
        temperature: 0 takes the most likely token, as ``model.generate(do_sample=False)`` does;
            above 0 samples from ``softmax(logits / temperature)``.
        seed: Of the sampling. The same seed gives the same tokens on every engine as long as
            their logits agree; draws are made for the batch as a whole.

    Returns:
        The new tokens of each row, its stop token included.

    Raises:
        ValueError: A prompt is empty, an argument is out of range, or prompt and new tokens
            together exceed the model's positions.
    """
    if not prompts:
        return []
    _check(runner, prompts, max_new_tokens, temperature)
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = pad_left(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    past = None
    for _ in range(max_new_tokens):
        output = runner.forward(
            tokens, attention_mask=mask, past=past, last_only=True, reserve=max_new_tokens
        )
        past = output.past
        tokens = _choose(output.logits[:, -1], temperature, generator).unsqueeze(1)  # (B,) -> (B,1)
        for row in sorted(running):
            rows[row].append(int(tokens[row]))
            if rows[row][-1] in eos_ids:
                running.remove(row)
        if not running:
            break
        # A finished row goes on with tokens nobody reads: rows do not see each other.
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return rows


def _check(
    runner: Runner, prompts: list[list[int]], max_new_tokens: int, temperature: float
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token, such as <s>")
    needed = max(len(prompt) for prompt in prompts) + max_new_tokens
    if needed > runner.max_positions:
        raise ValueError(
            f"the longest prompt and {max_new_tokens} new tokens need {needed} positions, the "
            f"model has {runner.max_positions}; shorten the prompt or ask for fewer tokens"
        )


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Choose the next token of each row: (B, vocab) -> (B,), int64, on the CPU."""
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    # Sampled on the CPU: one generator, whatever device the engine runs on.
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)  # (B, 1) -> (B,)

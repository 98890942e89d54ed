"""Greedy or sampled generation with a KV cache, on any engine."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lpdeploy.engines.runner import Runner, pad_left
from lpdeploy.engines.sampler import Sampler
from lpdeploy.engines.sampling import Sampling

OnToken = Callable[[int, int], None]
"""Called with a row and its new token."""


def generate(
    runner: Runner,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: set[int],
    sampling: Sampling | None = None,
    on_token: OnToken = lambda *_: None,
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    Args:
        runner: The model.
        prompts: Token ids of each row, at least one a row.
        max_new_tokens: At most so many tokens are added to a row.
        eos_ids: Tokens that end their row; may be empty.
        sampling: How tokens are chosen; greedily if None, as ``model.generate(do_sample=False)``
            does. Row i draws with the seed ``sampling.seed + i``, so that equal prompts differ, and
            a row does not depend on the others. The same seed gives the same tokens on every engine
            as long as their logits agree.
        on_token: Is told each token when it is chosen.

    Returns:
        The new tokens of each row, its stop token included.

    Raises:
        ValueError: A prompt is empty, ``max_new_tokens`` is below 1, or prompt and new tokens
            together exceed the model's positions.
    """
    if not prompts:
        return []
    _check(runner, prompts, max_new_tokens)
    samplers = _build_samplers(sampling or Sampling(), len(prompts))
    tokens, mask = pad_left(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    past = None
    for _ in range(max_new_tokens):
        output = runner.forward(
            tokens, attention_mask=mask, past=past, last_only=True, reserve=max_new_tokens
        )
        past = output.past
        tokens = _choose(output.logits[:, -1], samplers).unsqueeze(1)  # (B,) -> (B, 1)
        for row in sorted(running):
            rows[row].append(int(tokens[row]))
            on_token(row, rows[row][-1])
            if rows[row][-1] in eos_ids:
                running.remove(row)
        if not running:
            break
        # A finished row goes on with tokens nobody reads: rows do not see each other.
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return rows


def _build_samplers(sampling: Sampling, count: int) -> list[Sampler]:
    seeds = [None if sampling.seed is None else sampling.seed + row for row in range(count)]
    return [Sampler(replace(sampling, seed=seed)) for seed in seeds]


def _check(runner: Runner, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token, such as <s>")
    needed = max(len(prompt) for prompt in prompts) + max_new_tokens
    if needed > runner.max_positions:
        raise ValueError(
            f"the longest prompt and {max_new_tokens} new tokens need {needed} positions, the "
            f"model has {runner.max_positions}; shorten the prompt or ask for fewer tokens"
        )


def _choose(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Choose the next token of each row: (B, vocab) -> (B,), int64, on the CPU."""
    best = logits.argmax(dim=-1).tolist()  # of all rows at once
    return torch.tensor([each.choose(logits[i], best[i]) for i, each in enumerate(samplers)])

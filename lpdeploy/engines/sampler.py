"""How the next token is chosen from logits."""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lpdeploy.engines.sampling import Sampling


class Sampler:
    """Chooses the tokens of one request, with draws of its own: no other row changes them."""

    def __init__(self, sampling: Sampling) -> None:
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._greedy = sampling.temperature == 0
        self._warpers: list[LogitsProcessor] = []
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: Tensor, best: int) -> int:
        """Choose a token.

        Args:
            logits: Shape (vocab,).
            best: Their argmax, found for all rows at once.
        """
        if self._greedy:
            return best
        scores = logits.float().cpu().unsqueeze(0)  # (1, vocab)
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

"""How good a model is: perplexity as in the paper."""

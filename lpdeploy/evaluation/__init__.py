"""How good a model is: perplexity and tasks as in the paper."""

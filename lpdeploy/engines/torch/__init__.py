"""transformers on torch."""

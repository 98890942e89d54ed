"""What a LLaMA-family model is: its groups, its adapters, cutting it, its checkpoint."""

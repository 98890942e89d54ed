"""lpdeploy: prune a LLaMA-family model while it fine-tunes with LoRA, and ship it dense."""

__version__ = "0.1.0"

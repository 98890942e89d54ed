"""Text and instruction data: from a hub name or a local file to batches of tokens."""

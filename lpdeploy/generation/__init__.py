"""Text in, text out: what a model says, and a conversation with it."""

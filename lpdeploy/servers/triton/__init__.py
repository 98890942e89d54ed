"""Triton: its model repository, and the models in it."""

"""Serving an export: requests that come and go in one batch, and text in and out."""

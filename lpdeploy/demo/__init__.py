"""The embedded demo: a small trained model, its text, and the walk through the whole line."""

"""The tables and figures of the paper, run on a model of the user's own."""

"""Instructions that show what a pruned model can still do."""

PAPER = (
    "Tell me about alpacas.",
    "Translate the sentence 'I have no mouth but I must scream' into Spanish.",
    "Write a Python program that prints the first 10 Fibonacci numbers.",
)
"""Those of the paper's Table 9: common sense, translation and code."""

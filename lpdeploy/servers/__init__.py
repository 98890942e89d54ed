"""What serves a pruned model: which shapes it loads, and the folder it opens."""

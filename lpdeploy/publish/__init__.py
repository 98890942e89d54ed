"""What a run gives to the Hugging Face hub, and how it gets there."""

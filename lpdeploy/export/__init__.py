"""From a dense checkpoint to what an inference engine loads."""

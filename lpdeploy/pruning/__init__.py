"""LoRAPrune, arXiv:2305.18403: importance, schedule, selection and the training loop."""

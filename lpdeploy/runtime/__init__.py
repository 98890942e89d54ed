"""One way to run a model on any engine, to generate with it, and to prove two equal."""

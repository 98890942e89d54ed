"""How fast a model is, and the page that shows it."""

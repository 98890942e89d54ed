"""What a model runs on: exporters, runners, and the one interface over them."""

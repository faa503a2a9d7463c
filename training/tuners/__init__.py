"""Which weights move: one file a way."""

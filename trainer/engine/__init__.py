"""The training loop that all stages share, and what it rests on."""

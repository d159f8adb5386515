"""Where the picture comes from: a model with one thing left out or swapped at a time."""

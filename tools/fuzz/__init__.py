"""Seeded mutants of every kind of input: what they do must be a result or one sentence, soon and within bounds."""

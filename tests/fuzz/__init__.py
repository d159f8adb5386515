"""Hostile and damaged inputs: named cases of every fault that was found, and seeded mutants of every kind."""

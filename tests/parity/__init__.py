"""Comparison with numbers of the published implementation: `python -m tests.parity DIR`."""

"""Weights files: telling what they are, reading the published layouts, writing and reading our own."""

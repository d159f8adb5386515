"""Downloading weights from a stand-in for the hub."""

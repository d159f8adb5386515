"""Tests that need a ComfyUI checkout."""

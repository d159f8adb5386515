"""The groups that can be computed through a ComfyUI host: `python -m tests.parity DIR --backend host`."""

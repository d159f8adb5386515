"""Stage 1: a tagger learns to see through degradation. `python -m trainer.stage1`."""

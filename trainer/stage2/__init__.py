"""Stage 2: ControlNet and RCA are trained around a frozen base model. `python -m trainer.stage2`."""

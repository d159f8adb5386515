"""`python -m seesr_core upscale` from end to end with a tiny model."""

"""The command line: `python -m seesr_core upscale` and `tags`."""

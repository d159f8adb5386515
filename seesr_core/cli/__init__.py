"""The command line: `upscale`, `tags`, and for the weights `download`, `convert`, `inspect` and `doctor`."""

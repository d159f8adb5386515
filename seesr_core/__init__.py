"""SeeSR (semantics-aware real-world image super-resolution, CVPR 2024) without a host: networks, sampling, files,
command line."""

__version__ = "1.0.0"

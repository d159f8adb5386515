"""Getting weights: which there are, downloading, converting, looking into them, and judging an installation."""

"""Photo files in, finished pictures out: reading, sizes, writing."""

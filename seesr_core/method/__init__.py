"""The method: equations, networks, sampling. Nothing here reads a file or asks a host."""

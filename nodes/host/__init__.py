"""Subclasses and patches of the host's own classes, and probes of what this host can do."""

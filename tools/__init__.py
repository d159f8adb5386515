"""Programs for people who work on the project: each runs as `python -m tools.NAME` from the project's folder."""

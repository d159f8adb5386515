"""`python -m tools.bench`: what SeeSR costs, outside and inside ComfyUI, as Markdown and JSON."""

"""SeeSR for ComfyUI. Importing this without a host is harmless."""

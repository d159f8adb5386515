"""SeeSR for ComfyUI: the host's entry point. Importing this without a host is harmless."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The extension that the host asks for its nodes."""
    from .nodes import SeeSRExtension

    return SeeSRExtension()

"""Words for the person at the graph, from code that runs deep inside the host."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger(__name__)


def warn_on_node(message: str) -> None:
    """Log a warning, and show it on the node that is running where the host has a way to."""
    log.warning(message)
    # Looked up rather than imported: importing the host's server starts parts of it.
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    send = getattr(getattr(server, "instance", None), "send_progress_text", None)
    context = getattr(sys.modules.get("comfy_execution.utils"), "get_executing_context", lambda: None)()
    if send is not None and context is not None:
        send(message, context.node_id)

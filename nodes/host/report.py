"""Words for the person at the graph, from code that runs deep inside the host."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)


_story: ContextVar[list[str] | None] = ContextVar("story", default=None)
"""What the running node has said so far, if it keeps all of it in sight."""


@contextmanager
def story() -> Iterator[Callable[[str], None]]:
    """Inside, what is said on the node stays there; the function given says a line that the next one replaces."""
    told: list[str] = []
    token = _story.set(told)
    try:
        yield lambda passing: _show("\n".join([*told, passing]))
    finally:
        _story.reset(token)


def tell_on_node(message: str) -> None:
    """Show `message` on the node that is running, where the host has a way to."""
    told = _story.get()
    if told is None:
        _show(message)
    else:
        told.append(message)
        _show("\n".join(told))


def warn_on_node(message: str) -> None:
    """Log a warning, and show it on the node that is running where the host has a way to."""
    log.warning(message)
    tell_on_node(message)


def _show(message: str) -> None:
    # Looked up rather than imported: importing the host's server starts parts of it.
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    send = getattr(getattr(server, "instance", None), "send_progress_text", None)
    context = getattr(sys.modules.get("comfy_execution.utils"), "get_executing_context", lambda: None)()
    if send is not None and context is not None:
        send(message, context.node_id)

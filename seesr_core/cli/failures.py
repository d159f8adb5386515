"""Photos that failed in a folder: remembered while the others go on, listed at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SeeSRError, SettingsError
from .console import say_error

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Failures:
    """What went wrong so far."""

    keep_going: bool
    """Whether an error is remembered (a folder) or ends the command (one photo)."""
    messages: dict[Path, str] = field(default_factory=dict)
    """One sentence for each photo that failed."""

    @contextmanager
    def guard(self, photo: Path) -> Iterator[None]:
        """Inside, errors about `photo` are remembered."""
        try:
            yield
        except SettingsError:
            raise
        except SeeSRError as error:
            self._remember(photo, str(error), error)
        except Exception as error:
            # A fault of ours on one photo must not cost a night's work on the others.
            log.debug("%s", photo, exc_info=True)
            self._remember(photo, f"{photo}: unexpected {type(error).__name__}: {error}", error)

    def _remember(self, photo: Path, message: str, error: Exception) -> None:
        if not self.keep_going:
            raise error
        self.messages[photo] = " ".join(message.split())

    def list(self, total: int) -> int:
        """Say what failed; returns the exit code."""
        if not self.messages:
            return 0
        say_error(f"error: {len(self.messages)} of {total} photos failed:")
        for message in self.messages.values():
            say_error(f"  {message}")
        return 1

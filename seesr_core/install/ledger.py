"""What was downloaded, from where, with which hash: kept beside the files, so that they can be told from others later.

For most published files nobody has stated a hash. The first download notes it, and from then on the file must have it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from ..formats.schema import MalformedError, Whole, Within, read, read_json
from ..runtime.files import write_text

log = logging.getLogger(__name__)

LEDGER = ".seesr-downloads.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One file as it came."""

    sha256: Annotated[str, Within(64, 64)]
    """Its hash."""
    bytes: Whole
    """Its size."""
    source: str
    """Who gave it."""
    commit: str = ""
    """Which version of the source's repository, if it said so."""
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    """When."""


@dataclass(slots=True)
class Ledger:
    """The records of one target folder."""

    root: Path
    """The folder."""

    def find(self, path: Path) -> Record | None:
        """What is known of the file at `path`; nothing is of files outside of the root."""
        return self._read().get(self._name(path)) if path.is_relative_to(self.root) else None

    def note(self, path: Path, record: Record) -> None:
        """Keep the record of a file that has just come.

        Raises:
            ResourceError: the folder cannot be written to.
        """
        records = {**self._read(), self._name(path): record}
        entries = {name: asdict(entry) for name, entry in sorted(records.items())}
        write_text(self.root / LEDGER, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _read(self) -> dict[str, Record]:
        path = self.root / LEDGER
        if not path.exists():
            return {}
        try:
            found: dict[str, Record] = read(dict[str, Record], read_json(path))
            return found
        except (OSError, MalformedError) as error:
            log.warning("%s is damaged (%s) and is begun anew", path, error)
            return {}

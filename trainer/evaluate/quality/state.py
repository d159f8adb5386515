"""Figures that are already known, kept beside the report: what was computed once is never computed again.

An entry's key is a hash of everything that the figure depends on, the pictures' bytes included, so that an entry can be
out of use but never wrong. Every process appends to a file of its own and reads all of them.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from seesr_core.errors import ResourceError
from seesr_core.formats.schema import parse_json
from seesr_core.runtime.files import read_text

from .metrics import Outcome


class Known:
    """Outcomes by key, on disk.

    Args:
        report: the report that they belong to; files are called after it.
        rank: which of several processes this is.
    """

    def __init__(self, report: Path, rank: int = 0) -> None:
        self._report, self._rank = report, rank
        self._outcomes: dict[str, Outcome] = {}
        self._file: IO[str] | None = None
        self.read()

    def read(self) -> None:
        """Take in what all processes have written so far; a line that was cut off by an interruption is passed over."""
        pattern = f"{glob.escape(self._report.stem)}.figures-*.jsonl"
        for path in sorted(self._report.parent.glob(pattern)):
            for line in read_text(path, errors="replace").splitlines():
                try:
                    entry = parse_json(line)
                    self._outcomes[entry["key"]] = Outcome(entry["value"], entry["why"])
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, key: str) -> Outcome | None:
        """The outcome, if it is known."""
        return self._outcomes.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        """Remember an outcome.

        Raises:
            ResourceError: it cannot be written.
        """
        self._outcomes[key] = outcome
        try:
            self._append(json.dumps({"key": key, "value": outcome.value, "why": outcome.why}))
        except OSError as error:
            raise ResourceError(f"Cannot write beside {self._report}: {error.strerror or error}.") from error

    def _append(self, line: str) -> None:
        if self._file is None:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            path = self._report.with_name(f"{self._report.stem}.figures-{self._rank}.jsonl")
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that an interruption may have cut off
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def key_of(facts: Mapping[str, Any]) -> str:
    """A short text that differs when any of the facts does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]

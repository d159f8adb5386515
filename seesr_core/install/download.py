"""Downloading what the manifest lists: what is missing, from the first source that gives it, verified, put in place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ResourceError, WeightsError
from ..runtime.memory import require_disk
from .hashing import Progress, sha256
from .hub import Remote, SourceError, fetch, locate
from .ledger import LEDGER, Ledger, Record
from .manifest import Asset, RemoteFile, Source
from .places import Target
from .verify import check_file

STAGING = ".seesr-download"
PRESENT, DOWNLOADED, CACHED, MISSING, FAILED, ABSENT = (
    "present",
    "downloaded",
    "from the hub cache",
    "missing",
    "failed",
    "not offered",
)
BAD = (MISSING, FAILED)

Bar = Callable[[str], AbstractContextManager[Progress]]
"""Makes a progress bar of a name."""


@dataclass(kw_only=True, slots=True)
class Item:
    """One file and what became of it."""

    asset: Asset
    """The asset that the file belongs to."""
    file: RemoteFile
    """What the manifest says of the file."""
    path: Path
    """Path that the file belongs at."""
    state: str = MISSING
    """What became of the file: one of this module's constants."""
    checked_by: str = ""
    """What its verification rests on: "sha256" or "content"."""
    source: str = ""
    """The source that gave the file."""
    reasons: tuple[str, ...] = ()
    """What went wrong, one sentence each."""

    @property
    def bad(self) -> bool:
        """Whether the asset is incomplete because of it."""
        return self.state in BAD and not self.file.optional

    @property
    def bytes(self) -> int:
        """Size of the file in bytes; the expected one where it is not there."""
        return self.path.stat().st_size if self.path.is_file() else self.file.expected_bytes


@dataclass(kw_only=True, slots=True)
class Download:
    """A command's work."""

    target: Target
    """The folder that receives the files."""
    bar: Bar = lambda name: nullcontext(lambda done, total: None)
    """Progress of transfers and hashing."""

    @property
    def ledger(self) -> Ledger:
        """What is known of the files of the target."""
        return Ledger(self.target.root)

    def items(self, assets: Iterable[Asset]) -> list[Item]:
        """Every file of `assets`, those that are there verified."""
        found = [Item(asset=asset, file=file, path=path) for asset in assets for file, path in self.target.files(asset)]
        for item in found:
            self._look(item)
        return found

    def _look(self, item: Item) -> None:
        if not item.path.is_file():
            return
        try:
            with self.bar(f"checking {item.path.name}") as progress:
                item.checked_by = check_file(item.path, item.file, announced=self._known(item), progress=progress)
            item.state = PRESENT
        except WeightsError as error:
            item.reasons = (str(error),)

    def take_from_cache(self, items: list[Item]) -> None:
        """Fill gaps with files that other programs have already brought into the hub's cache; no network is used."""
        for item in list(_gaps(items)):
            for source, cached in _cached(item.file):
                with self._guard(item, f"the hub cache of {source}"):
                    part = self._part(item, "cache")
                    _link_or_copy(cached, part)
                    self._install(item, part, Remote(url="", tag="cache"), str(source))
                    item.state = CACHED
                    self._tidy(items)
                    break

    def run(self, items: list[Item]) -> None:
        """Download what is missing.

        Raises:
            ResourceError: the disk has no room, the target cannot be written to, or another download is at work there.
        """
        gaps = list(_gaps(items))
        if not gaps:
            return
        with self._locked():
            offers = {id(item): self._first_offer(item) for item in gaps}
            self._require_room(gaps, offers)
            for item in gaps:
                self._bring(item, offers[id(item)])
        self._tidy(items)

    def _first_offer(self, item: Item) -> tuple[Source, Remote] | None:
        """The first source that has a file of the right size and hash; what is wrong with the others is noted."""
        return next(self._offers(item, item.file.sources), None)

    def _offers(self, item: Item, sources: Iterable[Source]) -> Iterator[tuple[Source, Remote]]:
        for source in sources:
            with self._guard(item, str(source)):
                remote = locate(source, item.file.path)
                _compare(remote, item.file, self._known(item))
                yield source, replace(remote, size=item.file.size or remote.size)

    def _require_room(self, gaps: list[Item], offers: dict[int, tuple[Source, Remote] | None]) -> None:
        needed = 0
        for item in gaps:
            offer = offers[id(item)]
            if offer is not None:
                part = self._part(item, offer[1].tag)
                have = part.stat().st_size if part.exists() else 0
                needed += max((offer[1].size or item.file.expected_bytes) - have, 0)
        require_disk(self.target.root, needed, f"Downloading {len(gaps)} files")

    def _bring(self, item: Item, first: tuple[Source, Remote] | None) -> None:
        if first is not None and self._try(item, *first):
            return
        later = item.file.sources[item.file.sources.index(first[0]) + 1 :] if first else ()
        if not any(self._try(item, source, remote) for source, remote in self._offers(item, later)):
            item.state = ABSENT if item.file.optional else FAILED

    def _try(self, item: Item, source: Source, remote: Remote) -> bool:
        with self._guard(item, str(source)):
            part = self._part(item, remote.tag)
            with self.bar(item.path.name) as progress:
                fetch(remote, part, progress)
            self._install(item, part, remote, str(source))
            item.state = DOWNLOADED
            return True
        return False

    def _known(self, item: Item) -> str | None:
        """The hash that a file had when it came; one that the manifest states comes before it."""
        record = self.ledger.find(item.path)
        return record.sha256 if record else None

    def _install(self, item: Item, part: Path, remote: Remote, source: str) -> None:
        """Verify a whole file, note its hash, and let it take its place; a wrong one is removed."""
        wanted = item.file.sha256 or self._known(item) or remote.sha256
        try:
            with self.bar(f"checking {item.path.name}") as progress:
                item.checked_by = check_file(part, item.file, announced=wanted, progress=progress)
                digest = wanted or sha256(part, progress)
        except WeightsError as error:
            part.unlink()
            raise SourceError(str(error).replace(str(part), "what came")) from error
        try:
            item.path.parent.mkdir(parents=True, exist_ok=True)
            size = part.stat().st_size
            os.replace(part, item.path)
        except OSError as error:
            raise ResourceError(f"Cannot write {item.path}: {error.strerror or error}.") from error
        item.source, item.reasons = source, ()
        self.ledger.note(item.path, Record(sha256=digest, bytes=size, source=source, commit=remote.commit))

    def _part(self, item: Item, tag: str) -> Path:
        """Where the bytes gather. Another content has another name, so that two versions are never mixed."""
        mark = hashlib.sha256(f"{item.file.path}|{tag}".encode()).hexdigest()[:12]
        folder = self._staging()
        return folder / f"{item.asset.name}-{item.path.name}.{mark}.part"

    def _staging(self) -> Path:
        folder = self.target.root / STAGING
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"Cannot write into {self.target.root}: {error.strerror or error}. Choose another folder."
            ) from error
        return folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(self._staging() / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ResourceError(f"Another download into {self.target.root} is at work: wait for it.") from error
        with lock:
            yield

    @contextmanager
    def _guard(self, item: Item, where: str) -> Iterator[None]:
        """Inside, a source that fails is noted and the next one has its turn."""
        try:
            yield
        except SourceError as error:
            item.reasons = (*item.reasons, f"{where}: {error}")

    def _tidy(self, items: list[Item]) -> None:
        """Remove partial files once nothing is left that could continue them."""
        if not any(item.bad for item in items):
            shutil.rmtree(self.target.root / STAGING, ignore_errors=True)


def _gaps(items: Iterable[Item]) -> Iterator[Item]:
    return (item for item in items if item.state == MISSING)


def _compare(remote: Remote, file: RemoteFile, known: str | None) -> None:
    """Spare a download that is known to be in vain."""
    wanted = file.sha256 or known
    if wanted and remote.sha256 and wanted != remote.sha256:
        noted = "" if file.sha256 else f", as {LEDGER} noted when it first came; without that entry any is taken"
        raise SourceError(f"it offers a file with the sha256 {remote.sha256[:12]}…: expected {wanted[:12]}…{noted}")
    if file.size and remote.size and file.size != remote.size:
        raise SourceError(f"it offers a file of {remote.size:,} bytes: expected {file.size:,}")


def _cached(file: RemoteFile) -> Iterator[tuple[Source, Path]]:
    from huggingface_hub import try_to_load_from_cache

    for source in file.sources:
        if source.repo:
            kind = None if source.type == "model" else source.type
            found = try_to_load_from_cache(
                source.repo, f"{source.prefix}{file.path}", repo_type=kind, revision=source.revision
            )
            if isinstance(found, str):
                yield source, Path(found).resolve()


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link costs no room; where the disk is another, a copy is made."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        require_disk(target.parent, source.stat().st_size, f"Copying {source.name}")
        shutil.copyfile(source, target)

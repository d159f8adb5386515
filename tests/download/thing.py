"""One file to download, from one of two places."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from seesr_core.install.download import Download, Item
from seesr_core.install.manifest import Asset, Layout, RemoteFile, Source
from seesr_core.install.places import Target

BODY = random.Random(0).randbytes(40_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
FIRST, SECOND = Source(repo="first/weights", prefix="sub/"), Source(repo="second/copy")


def entry(**changes: object) -> RemoteFile:
    values = {"path": "a/file.txt", "kind": "text", "sources": (FIRST, SECOND), **changes}
    return RemoteFile(**values)  # type: ignore[arg-type]


def asset(*files: RemoteFile) -> Asset:
    layouts = {"folder": Layout(place="thing", files=files), "comfy": Layout(place="dape/published", files=files)}
    return Asset(name="thing", title="A thing", licence="none", unverified="", needs=(), layouts=layouts)


def download(folder: Path, *files: RemoteFile) -> list[Item]:
    work = Download(target=Target.folder(folder))
    items = work.items([asset(*files)])
    work.take_from_cache(items)
    work.run(items)
    return items


def one(folder: Path, **changes: object) -> Item:
    (item,) = download(folder, entry(**changes))
    return item

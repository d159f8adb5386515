"""Downloading from a stand-in hub on its good and bad days."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from seesr_core.errors import ResourceError, SettingsError
from seesr_core.install import hub as hub_module
from seesr_core.install.download import STAGING, Download
from seesr_core.install.ledger import LEDGER
from seesr_core.install.manifest import Source
from seesr_core.install.places import Target

from ..hub_server import Hub
from .thing import BODY, DIGEST, FIRST, SECOND, asset, download, entry, one


def test_a_file_arrives_verified_and_nothing_else_stays(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)
    item = one(tmp_path / "to")
    assert (item.state, item.source, item.checked_by) == ("downloaded", "first/weights", "sha256")
    assert item.path.read_bytes() == BODY
    assert sorted(path.name for path in (tmp_path / "to").rglob("*")) == [LEDGER, "a", "file.txt", "thing"]
    hub.requests.clear()
    assert one(tmp_path / "to").state == "present"
    assert hub.requests == []


def test_a_cut_connection_is_continued(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, cuts=[15_000, 7_000])
    item = one(tmp_path)
    assert item.path.read_bytes() == BODY
    assert hub.gets("first/weights/sub/a/file.txt") == ["", "bytes=15000-", "bytes=22000-"]


def test_a_cut_costs_little_of_what_has_come(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000_000)
    hub.add("first/weights/sub/a/file.txt", BODY * 40, cuts=[1_500_000])
    assert one(tmp_path).path.read_bytes() == BODY * 40
    again = int(hub.gets("first/weights/sub/a/file.txt")[1].strip("bytes=-"))
    assert again > 1_500_000 - hub_module._CHUNK


def test_a_killed_download_is_continued_by_the_next(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)

    def kill(done: int, total: int) -> None:
        if done == 15_000:
            raise KeyboardInterrupt

    work = Download(target=Target.folder(tmp_path), bar=lambda name: _Bar(kill))
    with pytest.raises(KeyboardInterrupt):
        work.run(work.items([asset(entry())]))
    (part,) = (tmp_path / STAGING).glob("*.part")
    assert part.read_bytes() == BODY[:15_000]
    assert one(tmp_path).path.read_bytes() == BODY
    assert hub.gets("first/weights/sub/a/file.txt")[-1] == "bytes=15000-"


class _Bar:
    def __init__(self, show: Callable[[int, int], None]) -> None:
        self.show = show

    def __enter__(self) -> Callable[[int, int], None]:
        return self.show

    def __exit__(self, *error: object) -> None:
        pass


def test_another_mirror_continues_the_same_content(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, cuts=[9_000] + [0] * 40)
    hub.add("second/copy/a/file.txt", BODY)
    item = one(tmp_path)
    assert (item.source, item.path.read_bytes()) == ("second/copy", BODY)
    assert hub.gets("second/copy/a/file.txt") == ["bytes=9000-"]


def test_a_slow_body_is_given_up_and_continued(
    hub: Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.add("first/weights/sub/a/file.txt", BODY, stalls=[12_000], pause=3)
    assert one(tmp_path).path.read_bytes() == BODY
    assert hub.gets("first/weights/sub/a/file.txt") == ["", "bytes=12000-"]


def test_a_server_that_ignores_ranges(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, cuts=[12_000], ignores_ranges=True)
    assert one(tmp_path).path.read_bytes() == BODY


def test_not_found(hub: Hub, tmp_path: Path) -> None:
    hub.add("second/copy/a/file.txt", BODY)
    needed, optional = download(
        tmp_path, entry(), entry(path="b.json", kind="json", optional=True, sources=(FIRST, SECOND))
    )
    assert (needed.state, needed.source) == ("downloaded", "second/copy")
    assert optional.state == "not offered"
    assert not optional.bad
    assert optional.reasons == ("first/weights: it has no such file", "second/copy: it has no such file")


def test_too_many_requests_are_waited_for(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, statuses=[429, 429], statuses_of_get=[429])
    assert one(tmp_path).state == "downloaded"
    assert waits[:2] == [7, 7]  # what the server asked for
    assert len(waits) == 3


@pytest.mark.parametrize("which", ["statuses", "statuses_of_get"])
def test_too_many_requests_for_ever(hub: Hub, waits: list[float], tmp_path: Path, which: str) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, **{which: [429]}, always=True)
    hub.add("second/copy/a/file.txt", BODY)
    item = one(tmp_path / "both")
    assert (item.state, item.source) == ("downloaded", "second/copy")
    alone = one(tmp_path / "alone", sources=(FIRST,))
    assert alone.reasons == ("first/weights: it refuses more requests for now (429)",)


@pytest.mark.parametrize(("status", "words"), [(401, "asks for a login"), (403, "access is refused"), (501, "501")])
def test_refusals_are_named_at_once(hub: Hub, waits: list[float], tmp_path: Path, status: int, words: str) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, statuses=[status], always=True)
    item = one(tmp_path, sources=(FIRST,))
    assert words in item.reasons[0]
    assert (len(hub.requests) <= 2, waits) == (True, [])


def test_a_server_that_is_gone(waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    item = one(tmp_path, sources=(FIRST,))
    assert item.state == "failed"
    assert item.reasons[0].startswith("first/weights: the transfer failed (")


def test_plain_urls(hub: Hub, waits: list[float], tmp_path: Path) -> None:
    hub.add("lists/x.txt", BODY, cuts=[1000])
    source = Source(url=f"{hub.url}/plain/lists/x.txt")
    item = one(tmp_path, size=len(BODY), sha256=DIGEST, sources=(source,))
    assert (item.state, item.path.read_bytes()) == ("downloaded", BODY)
    assert hub.gets("lists/x.txt") == ["", "bytes=1000-"]


def test_too_little_room_is_told_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": len(BODY) - 1}))
    with pytest.raises(ResourceError, match="Downloading 1 files needs at least 0 MB on disk"):
        one(tmp_path)
    assert not hub.gets("first/weights/sub/a/file.txt")


def test_a_disk_that_fills_up_loses_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)
    counted = hub_module._Counted.write

    def write(self: hub_module._Counted, data: bytes) -> int:
        if self._handle.tell() >= 15_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return counted(self, data)

    with monkeypatch.context() as full:
        full.setattr(hub_module._Counted, "write", write)
        with pytest.raises(ResourceError, match="is full: make room and give the same command again"):
            one(tmp_path)
    assert one(tmp_path).path.read_bytes() == BODY
    assert hub.gets("first/weights/sub/a/file.txt")[-1] == "bytes=15000-"


def test_a_folder_that_cannot_be_written_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="is a file: expected a folder"):
        one(tmp_path / "file")
    with pytest.raises(ResourceError, match="Cannot write into"):
        one(tmp_path / "file" / "below")


def test_two_downloads_at_once(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    with FileLock(tmp_path / STAGING / "lock"), pytest.raises(ResourceError, match="Another download"):
        one(tmp_path)


def test_a_truncated_file_that_is_there_is_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)
    (tmp_path / "thing" / "a").mkdir(parents=True)
    (tmp_path / "thing" / "a" / "file.txt").write_bytes(BODY[:100])
    assert one(tmp_path, size=len(BODY)).path.read_bytes() == BODY

"""Downloading from a stand-in hub on its good and bad days."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from seesr_core.cli import download as command
from seesr_core.cli import main as cli
from seesr_core.errors import ResourceError, SettingsError
from seesr_core.install import hub as hub_module
from seesr_core.install.download import STAGING, Download, Item
from seesr_core.install.ledger import LEDGER
from seesr_core.install.manifest import Asset, Layout, RemoteFile, Source
from seesr_core.install.places import Target

from .hub_server import COMMIT, Hub, serve
from .test_checkpoints_refusals import MARK, Payload
from .weights_files import adapter, save

BODY = random.Random(0).randbytes(40_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
FIRST, SECOND = Source(repo="first/weights", prefix="sub/"), Source(repo="second/copy")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants

    # What has come of a chunk is lost when the connection breaks; small ones let small files break off.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    # Not the hub cache of whoever runs the tests.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with serve(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting takes no time in tests; how long it would have been is noted."""
    noted: list[float] = []
    monkeypatch.setattr("time.sleep", noted.append)
    return noted


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


def test_a_body_with_another_hash_is_dropped_for_the_next_source(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, body=BODY[::-1])
    hub.add("second/copy/a/file.txt", BODY)
    item = one(tmp_path)
    assert (item.state, item.source) == ("downloaded", "second/copy")
    assert item.path.read_bytes() == BODY


def test_only_wrong_bodies_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY, body=BODY[::-1])
    item = one(tmp_path)
    assert item.state == "failed"
    assert not item.path.exists()
    assert not list(tmp_path.rglob("*.part"))
    wrong = hashlib.sha256(BODY[::-1]).hexdigest()
    assert f"first/weights: what came has the sha256 {wrong[:12]}…: expected {DIGEST[:12]}…" in item.reasons[0]
    assert item.reasons[1:] == ("second/copy: it has no such file",)


def test_what_cannot_be_right_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", BODY)
    hub.add("second/copy/a/file.txt", BODY[:-1])
    item = one(tmp_path, size=len(BODY), sha256="0" * 64)
    assert item.state == "failed"
    assert not hub.gets("first/weights/sub/a/file.txt")
    assert item.reasons[0] == f"first/weights: it offers a file with the sha256 {DIGEST[:12]}…: expected 000000000000…"
    other = one(tmp_path, size=len(BODY), sources=(SECOND,))
    assert other.reasons == ("second/copy: it offers a file of 39,999 bytes: expected 40,000",)


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


def test_the_hub_cache_is_used_first(hub: Hub, tmp_path: Path) -> None:
    repo = tmp_path / "hub-cache" / "models--second--copy"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT / "a").mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "a" / "file.txt").write_bytes(BODY)
    item = one(tmp_path / "to", sha256=DIGEST)
    assert (item.state, item.source, item.path.read_bytes()) == ("from the hub cache", "second/copy", BODY)
    assert hub.requests == []


def test_content_is_verified_where_no_hash_is_known(hub: Hub, tmp_path: Path) -> None:
    path = save(tmp_path / "DAPE.pth", adapter())
    hub.add("second/copy/DAPE.pth", path.read_bytes(), secretive=True)
    good = one(tmp_path / "a", path="DAPE.pth", kind="dape-lora", sources=(SECOND,))
    assert (good.state, good.checked_by) == ("downloaded", "content")
    wrong = one(tmp_path / "b", path="DAPE.pth", kind="ram", sources=(SECOND,))
    assert wrong.reasons == ("second/copy: what came looks like the published DAPE adapter: expected DAPE.pth (ram).",)
    short = one(tmp_path / "c", path="DAPE.pth", kind="dape-lora", parameters=1_777_664, sources=(SECOND,))
    assert "with 128 parameters: expected 1,777,664" in short.reasons[0]


def test_an_unsafe_pickle_is_refused_and_named(hub: Hub, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3), "payload": Payload(tmp_path)}, tmp_path / "DAPE.pth")
    hub.add("second/copy/DAPE.pth", (tmp_path / "DAPE.pth").read_bytes(), secretive=True)
    item = one(tmp_path / "to", path="DAPE.pth", kind="dape-lora", sources=(SECOND,))
    assert "what came is refused: it is a pickle that asks for the code of" in item.reasons[0]
    assert not item.path.exists()
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"prediction_type": "v_prediction"}, "belongs to a v-prediction model"),
        ({"prediction_type": "sample"}, "belongs to prediction_type 'sample': expected prediction_type 'epsilon'"),
        ([1], "belongs to prediction_type None"),
    ],
)
def test_a_mirror_of_another_model_is_told_by_its_scheduler(
    hub: Hub, tmp_path: Path, content: object, words: str
) -> None:
    hub.add("second/copy/s.json", json.dumps(content).encode())
    item = one(tmp_path, path="s.json", kind="json", values={"prediction_type": "epsilon"}, sources=(SECOND,))
    assert words in item.reasons[0]


def test_a_login_page_instead_of_a_text(hub: Hub, tmp_path: Path) -> None:
    hub.add("second/copy/a/file.txt", b"<html>Sign in</html>")
    assert "what came is a web page" in one(tmp_path, sources=(SECOND,)).reasons[0]


@pytest.fixture
def shop(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A manifest with one asset of two files, one of which is offered."""
    hub.add("first/weights/sub/a/file.txt", BODY)
    files = (entry(sources=(FIRST,)), entry(path="b.txt", sources=(FIRST, SECOND)))
    monkeypatch.setattr(command, "load_manifest", lambda: {"thing": asset(*files)})
    monkeypatch.setattr(command, "DEFAULT_ASSETS", ("thing",))
    return hub


def test_the_command_lists_failures_and_can_be_repeated(
    shop: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["download", "--to", str(tmp_path / "w")]
    assert cli.main(arguments) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[0].split() == ["asset", "size", "state", "checked", "by", "source", "where"]
    assert f"thing  40 kB  downloaded  sha256      first/weights  {tmp_path}/w/thing/a/file.txt" in out
    assert "error: b.txt: first/weights: it has no such file; second/copy: it has no such file" in err
    assert "error: 1 of 2 files are not there; the same command tries them again." in err
    shop.add("second/copy/b.txt", b"hello")
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"then: python -m seesr_core doctor --to {tmp_path}/w" in out


def test_the_host_has_its_own_folders(shop: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--comfy", str(tmp_path)]) == 2
    assert "is no ComfyUI folder: expected one with `models` inside" in capfd.readouterr().err
    (tmp_path / "models").mkdir()
    cli.main(["download", "--comfy", str(tmp_path)])
    assert (tmp_path / "models" / "dape" / "published" / "a" / "file.txt").read_bytes() == BODY


@pytest.mark.parametrize("variable", [False, True])
def test_offline_verifies_without_a_request(
    shop: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], variable: bool
) -> None:
    (tmp_path / "thing" / "a").mkdir(parents=True)
    (tmp_path / "thing" / "a" / "file.txt").write_bytes(BODY)
    if variable:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [] if variable else ["--offline"]
    assert cli.main(["download", "--to", str(tmp_path), "--json", *options]) == 1
    states = [item["state"] for item in json.loads(capfd.readouterr().out)]
    assert states == ["present", "missing"]
    assert shop.requests == []


def test_the_list_needs_no_network(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--list", "--what", "all"]) == 0
    out = capfd.readouterr().out
    assert "ram: RAM, the tagger (Swin-L, 14 million images). Licence: Apache-2.0" in out
    assert "  unverified: " in out


def test_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--what", "everything"]) == 2
    assert cli.main(["download", "--to", "a", "--comfy", "b"]) == 2


def test_an_unknown_hash_is_noted_at_the_first_download_and_asked_for_afterwards(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", b"some text")
    item = one(tmp_path)
    assert (item.state, item.checked_by) == ("downloaded", "content")
    (record,) = json.loads((tmp_path / LEDGER).read_text()).values()
    assert record["sha256"] == hashlib.sha256(b"some text").hexdigest()
    assert (record["source"], record["commit"], record["bytes"]) == ("first/weights", COMMIT, 9)
    assert (one(tmp_path).state, one(tmp_path).checked_by) == ("present", "sha256")
    item.path.write_bytes(b"some test")
    assert (one(tmp_path).state, item.path.read_bytes()) == ("downloaded", b"some text")


def test_another_content_under_the_same_name_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("first/weights/sub/a/file.txt", b"x" * 2000)
    path = one(tmp_path).path
    path.unlink()
    hub.add("first/weights/sub/a/file.txt", b"y" * 2000)
    hub._digests.clear()
    item = one(tmp_path)
    assert (item.state, path.exists()) == ("failed", False)
    assert "as .seesr-downloads.json noted when it first came" in item.reasons[0]
    (tmp_path / LEDGER).write_text("[" * 5000)
    assert one(tmp_path).state == "downloaded"


@pytest.mark.parametrize(
    ("endpoint", "token", "sent"),
    [
        ("https://huggingface.co", "secret", None),
        ("https://hub.huggingface.co", "", None),
        ("https://huggingface.co.evil.org", "", False),
        ("https://mirror.org", "secret", "secret"),
        (None, "", None),
    ],
)
def test_the_login_is_for_its_own_host(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, token: str, sent: object
) -> None:
    """None lets the library look for the login, False forbids it."""
    monkeypatch.setenv("HF_TOKEN", token)
    assert hub_module._login(endpoint) == sent


def test_the_login_does_not_follow_to_another_host(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    name = "first/weights/sub/a/file.txt"
    with serve(Hub()) as other:
        other.add(name, b"some text")
        hub.add(name, b"some text", elsewhere=f"{other.url}/{name}")
        assert one(tmp_path).state == "downloaded"
    assert set(hub.logins) == {"Bearer secret"}
    assert other.logins == [""]

"""What came is what was asked for: hashes, content, the hub cache, and to whom the login goes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from seesr_core.install import hub as hub_module
from seesr_core.install.ledger import LEDGER

from ..hub_server import COMMIT, Hub, serve
from ..test_checkpoints_refusals import MARK, Payload
from ..weights_files import adapter, save
from .thing import BODY, DIGEST, SECOND, one


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
        ("https://huggingface.co@evil.org", "", False),
        ("http://huggingface.co", "", False),
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

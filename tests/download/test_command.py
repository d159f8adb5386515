"""`download`: what it lists, repeats and does without the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seesr_core.cli import download as command
from seesr_core.cli import main as cli

from ..hub_server import Hub
from .thing import BODY, FIRST, SECOND, asset, entry


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

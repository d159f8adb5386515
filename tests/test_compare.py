"""`compare A B -o PAGE`: one page that needs no other file."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seesr_core.cli import main as cli
from seesr_core.cli.compare import pair_up

from .tiny_model import photo


def pictures_of(page: Path) -> list[Image.Image]:
    """What lies in a page, decoded."""
    found = re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


def test_two_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The page holds both, B first as it lies below, and asks for nothing else."""
    small, large = photo(12, 8, seed=1), photo(48, 32, seed=2)
    small.save(tmp_path / "a & b.png")
    large.save(tmp_path / "large.tif")
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path / "a & b.png"), str(tmp_path / "large.tif"), "-o", str(page)]) == 0
    assert capfd.readouterr().out == f"{page}: 1 pair\n"
    after, before = pictures_of(page)
    assert np.array_equal(np.asarray(before), np.asarray(small))
    assert np.abs(np.asarray(after.convert("RGB")).astype(int) - np.asarray(large)).mean() < 6
    text = page.read_text(encoding="utf-8")
    assert "--ratio: 48 / 32" in text
    assert "a &amp; b.png, 12×8 | large.tif, 48×32" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_folders_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same name, the same stem, or more at its end; who is left alone is told of."""
    for name in ("a/one.jpg", "a/two.png", "a/three.png", "a/alone.png", "b/one.jpg", "b/two.webp", "b/three_4x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(8, 8).save(tmp_path / name)
    pairs = pair_up(tmp_path / "a", tmp_path / "b")
    assert {(a.name, b.name) for a, b in pairs} == {
        ("one.jpg", "one.jpg"),
        ("two.png", "two.webp"),
        ("three.png", "three_4x.png"),
    }
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(page)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{page}: 3 pairs\n"
    assert "alone.png" in err
    assert len(pictures_of(page)) == 6


@pytest.mark.parametrize(
    ("given", "said", "code"),
    [
        (("a.png", "folder", "-o", "p.html"), "a folder and a file", 2),
        (("a.png", "b.png", "-o", "p.txt"), "must be named *.html", 2),
        (("a.png", "nowhere.png", "-o", "p.html"), "cannot be read", 1),
        (("folder", "others", "-o", "p.html"), "has the name of one in", 1),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    said: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "folder/c.png", "others/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo(8, 8).save(name)
    assert cli.main(["compare", *given]) == code
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert not (tmp_path / "p.html").exists()

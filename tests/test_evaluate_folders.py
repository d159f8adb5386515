"""`python -m trainer.evaluate` from folders to report, table and contact sheet."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError
from trainer.deep_features import PACKAGE
from trainer.evaluate.commands import main
from trainer.evaluate.pictures import list_pictures
from trainer.evaluate.quality import iqa
from trainer.evaluate.quality.metrics import DEEP
from trainer.evaluate.report.sheet import contact_sheet
from trainer.evaluate.report.tables import Column, markdown

from .niqe_files import noise, write_niqe_params
from .tiny_model import photo

NAMES = ("one", "two")


@pytest.fixture(autouse=True)
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not they are installed here."""
    monkeypatch.setattr(iqa, "load_pyiqa", lambda: (None, "pyiqa is not installed"))
    monkeypatch.setitem(sys.modules, PACKAGE.replace("-", "_"), None)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """LR of 24 × 20, HR and SR of four times the size; SR is a little brighter than HR, and `two` is a JPEG there."""
    for kind in ("lr", "hr", "sr"):
        (tmp_path / kind).mkdir()
    for seed, name in enumerate(NAMES):
        hr = photo(96, 80, seed).point(lambda level: level // 2)
        hr.save(tmp_path / "hr" / f"{name}.png")
        hr.resize((24, 20), Image.Resampling.BICUBIC).save(tmp_path / "lr" / f"{name}.png")
        hr.point(lambda level: level + 2).save(tmp_path / "sr" / f"{name}.{'jpg' if seed else 'png'}", quality=100)
    return tmp_path


def arguments(folders: Path, *more: str) -> list[str]:
    return ["--sr", str(folders / "sr"), "--json", str(folders / "report.json"), *more]


def all_folders(folders: Path) -> list[str]:
    return arguments(folders, "--hr", str(folders / "hr"), "--lr", str(folders / "lr"))


def report_of(folders: Path) -> dict:
    return json.loads((folders / "report.json").read_text("utf-8"))


def test_report_and_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(all_folders(folders)) == 0
    report = report_of(folders)
    assert list(report["rows"]) == ["bicubic", "SR", "HR"]
    sr = report["rows"]["SR"]
    # Two levels more in every channel are 2 · 219/255 in studio luma.
    assert sr["pictures"]["one"]["psnr_y"] == pytest.approx(20 * np.log10(255 / (2 * 219 / 255)), abs=1e-6)
    assert sr["mean"]["psnr_y"] == pytest.approx(np.mean([sr["pictures"][name]["psnr_y"] for name in NAMES]))
    assert sr["count"] == {"psnr_y": 2, "ssim_y": 2}
    assert "psnr_y" not in report["rows"]["HR"]["mean"]
    assert "studio range" in report["settings"]["psnr_y"]
    table = capsys.readouterr().out
    low, high = sr["interval"]["psnr_y"]
    assert low <= sr["mean"]["psnr_y"] <= high
    assert f"| SR | {sr['mean']['psnr_y']:.2f} [{low:.2f}, {high:.2f}] | {sr['mean']['ssim_y']:.4f} [" in table
    assert "| 2 pictures, protocol B | PSNR-Y ↑ | SSIM-Y ↑ |" in table
    assert "| PSNR-Y | trainer.evaluate " in table
    assert "NIQE absent: pyiqa is not installed; no pristine model (--niqe-params)." in table
    assert set(report["absent"]) == {"lpips", "dists", "fid", "niqe", "maniqa", "musiq", "clipiqa", DEEP}


def test_a_metric_that_was_named_but_is_not_there_ends_it(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert main([*all_folders(folders), "--metrics", "psnr_y", "lpips"]) == 1
    message = caplog.records[-1].getMessage()
    assert "cannot be computed here: lpips (pyiqa is not installed" in message
    assert not (folders / "report.json").exists()


def test_without_originals_only_niqe_is_left(folders: Path) -> None:
    noise(200, 200).save(folders / "sr" / "big.png")
    params = write_niqe_params(folders / "niqe.npz")
    assert main(arguments(folders, "--niqe-params", str(params))) == 0
    report = report_of(folders)
    assert {key for key, why in report["absent"].items() if why == "no originals (--hr)"} == {
        "psnr_y",
        "ssim_y",
        "lpips",
        "dists",
        "fid",
        DEEP,
    }
    assert list(report["rows"]) == ["SR"]
    assert report["rows"]["SR"]["pictures"]["one"] == {}, "96×80 pixels are less than two blocks"
    assert report["rows"]["SR"]["count"] == {"niqe": 1}
    assert report["rows"]["SR"]["interval"] == {}, "one figure has no interval"
    assert report["rows"]["SR"]["missing"]["niqe"] == {"fewer than 2 blocks of 96² with any texture": list(NAMES)}
    assert report["rows"]["SR"]["mean"]["niqe"] == report["rows"]["SR"]["pictures"]["big"]["niqe"] > 0


def test_unmatched_names_are_listed_and_left_out(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(96, 80, 7).save(folders / "sr" / "extra.png")
    (folders / "lr" / "two.png").unlink()
    assert main(all_folders(folders)) == 0
    report = report_of(folders)
    assert report["unmatched"] == {"sr": ["extra", "two"], "hr": ["two"]}
    assert list(report["rows"]["SR"]["pictures"]) == ["one"]
    assert "Only in --sr, left out: extra, two." in capsys.readouterr().out


def test_contact_sheet(folders: Path) -> None:
    sheet = folders / "sheet.png"
    assert main([*all_folders(folders), "--sheet", str(sheet), "--sheet-rows", "1"]) == 0
    with Image.open(sheet) as image:
        assert image.width == 3 * (96 + 4)
        assert image.height == 80 + 32 + 4
        original = np.asarray(Image.open(folders / "hr" / "one.png"))
        assert np.array_equal(np.asarray(image)[32:112, 200:296], original)


def test_sheet_cuts_the_centre_and_never_resizes() -> None:
    big, small = photo(60, 50, 1), photo(10, 12, 2)
    sheet = np.asarray(contact_sheet([("x", {"a": big, "b": small})], cell=20))
    assert np.array_equal(sheet[32:52, :20], np.asarray(big)[15:35, 20:40])
    assert np.array_equal(sheet[32:44, 24:34], np.asarray(small))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: photo(90, 80).save(f / "sr" / "one.png"), r"one\.png: it has 90×80 pixels, its original 96×80"),
        (lambda f: (f / "sr" / "one.png").write_bytes(b""), r"one\.png is empty"),
        (lambda f: photo(96, 80).save(f / "hr" / "one.bmp"), r"one\.bmp and one\.png; leave one"),
        (
            lambda f: [(f / "lr" / f"{name}.png").rename(f / "lr" / f"x{name}.png") for name in NAMES],
            "No name is in all",
        ),
    ],
)
def test_refusals_are_one_sentence(folders: Path, caplog: pytest.LogCaptureFixture, spoil, message: str) -> None:
    spoil(folders)
    with caplog.at_level(logging.ERROR):
        assert main(all_folders(folders)) == 1
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().count("\n") == 0
    assert re.search(message, caplog.records[0].getMessage())
    assert not (folders / "report.json").exists()


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        list_pictures(tmp_path / "none")
    with pytest.raises(DataError, match="No pictures"):
        list_pictures(tmp_path)


def test_absent_figures_are_dashes_and_zero_is_zero() -> None:
    columns = (Column(key="a", title="A"), Column(key="b", title="B", digits=1))
    assert markdown("x", {"row": {"b": 0.0}}, columns).splitlines()[-1] == "| row | – | 0.0 |"


def test_tensors_round_trip() -> None:
    from trainer.evaluate.pictures import as_picture, as_tensor, enlarge

    picture = photo(6, 4)
    assert as_tensor(picture).shape == (3, 4, 6)
    assert np.array_equal(np.asarray(as_picture(as_tensor(picture))), np.asarray(picture))
    assert enlarge(picture, torch.zeros(3, 9, 11)).size == (11, 9)

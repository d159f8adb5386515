"""`python -m trainer.evaluate sets`: whole sets by one command, with a tiny model."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seesr_core.errors import DataError, SettingsError
from trainer.evaluate.testsets.sets import Options, model_key, run

from .checkpoint_files import write_zeros
from .tiny_model import photo, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two pairs, two originals of different sizes, one photo."""
    for seed, name in enumerate("ab"):
        for place, side in (("pairs/HR", 64), ("pairs/LR", 16), ("clean", 80 + 20 * seed)):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            photo(side, side, seed).save(tmp_path / place / f"{name}.png")
    (tmp_path / "real").mkdir()
    photo(20, 16, 7).save(tmp_path / "real" / "c.jpg")
    return tmp_path


def options(work: Path, model: Path, **changes: Any) -> Options:
    sets = {"pairs": (work / "pairs",), "originals": (work / "clean",), "photos": (work / "real",)}
    given: dict[str, Any] = {**sets, "model": str(model), "metrics": ("psnr_y", "ssim_y"), "device": "cpu"}
    return Options(**{**given, "out": work / "out", "backend": "own", **changes})


def test_every_set_is_upscaled_and_measured(work: Path, model: Path) -> None:
    summary = run(options(work, model))
    assert {name: part["pictures"] for name, part in summary["sets"].items()} == {"pairs": 2, "clean": 2, "real": 1}
    assert summary["sets"]["real"]["rows"] == {"bicubic": {}, "SR": {}}, "no original, no PSNR"
    for name in ("pairs", "clean"):
        assert set(summary["sets"][name]["rows"]["SR"]) == {"psnr_y", "ssim_y"}
        assert summary["sets"][name]["rows"]["SR"] != summary["sets"][name]["rows"]["bicubic"]
    key = model_key(str(model))
    for name in ("report.json", "report.md", "report.html", "pictures.csv", "SR/a.png"):
        assert (work / "out" / "clean" / key / name).is_file()
    with Image.open(work / "out" / "clean" / "pairs" / "HR" / "b.png") as hr:
        assert hr.size == (64, 64), "the largest square of 32s that the smallest has"
    report = json.loads((work / "out" / "pairs" / key / "report.json").read_text("utf-8"))
    assert report["rows"]["SR"]["mean"] == summary["sets"]["pairs"]["rows"]["SR"]


def test_the_command_resumes(work: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    sets = ["--pairs", str(work / "pairs"), "--photos", str(work / "real"), "--out", str(work / "out")]
    words = [*sets, "--model", str(model), "--name", "tiny", "--metrics", "psnr_y", "--backend", "own"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "sets", *words, "--device", "cpu"])
    times = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("trainer.evaluate", run_name="__main__")
        assert ended.value.code == 0
        times.append((work / "out" / "pairs" / model_key(str(model)) / "SR" / "a.png").stat().st_mtime_ns)
    assert times[0] == times[1]
    out = capsys.readouterr().out
    assert "| pairs, 2 pictures, tiny |" in out
    assert "| real, 1 pictures, bicubic | – |" in out
    assert (work / "out" / "summary.md").read_text("utf-8") in out


def test_another_model_gets_results_of_its_own(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    assert model_key(str(other)) == model_key(str(model))
    folder = other / "dape.safetensors"
    tagger = folder.read_bytes()
    folder.write_bytes(tagger[:-4] + bytes(4))
    assert model_key(str(other)) != model_key(str(model))


def test_refusals(work: Path, model: Path) -> None:
    with pytest.raises(SettingsError, match="Nothing to measure"):
        Options(out=work)
    with pytest.raises(SettingsError, match="Several sets are called real"):
        options(work, model, originals=(work / "real",))
    with pytest.raises(SettingsError, match="--paper names other, which is no set"):
        options(work, model, paper={"other": "RealSR"})
    write_zeros(work / "real" / "broken.jpg", {"a": (1,)})
    with pytest.raises(DataError, match=r"Not all photos of .*real could be upscaled"):
        run(options(work, model, pairs=(), originals=()))
    photo(20, 20).save(work / "clean" / "small.png")
    with pytest.raises(DataError, match="a side below 32 pixels"):
        run(options(work, model, pairs=(), photos=()))

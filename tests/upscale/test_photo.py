"""`upscale` of one photo with a tiny model: sizes, options, reports, what reaches the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ..golden import ROOT
from ..tiny_model import photo
from .command import run


def test_a_photo_becomes_a_larger_one_quietly(
    model: Path, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "result.png"
    assert run(model, source, target) == 0
    assert capfd.readouterr() == ("", "")
    with Image.open(target) as result:
        assert (result.size, result.mode) == ((80, 64), "RGB")
    assert os.listdir(target.parent) == ["result.png"]


def test_the_same_command_gives_the_same_file(model: Path, source: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in "abc")
    for target, seed in ((first, 3), (again, 3), (other, 4)):
        assert run(model, source, target, "--seed", seed) == 0
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("to", "size"), [("100", (100, 80)), ("60p", (75, 60)), ("90x90", (90, 72)), ("90x90 crop", (90, 90))]
)
def test_a_result_of_a_wished_size(to: str, size: tuple[int, int], model: Path, source: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run(model, source, tmp_path / "result.png", "--to", to, "--json", report) == 0
    with Image.open(tmp_path / "result.png") as result:
        assert result.size == size
    assert json.loads(report.read_text())["sizes"]["final"] == list(size)


def test_quality_makes_smaller_files(model: Path, source: Path, tmp_path: Path) -> None:
    sizes = []
    for quality in (20, 90):
        assert run(model, source, tmp_path / f"{quality}.jpg", "--quality", quality) == 0
        sizes.append((tmp_path / f"{quality}.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    assert run(model, source, tmp_path / "a.jpg", "--quality", 101) == 2


def test_metadata_stays_unless_it_is_stripped(model: Path, source: Path, tmp_path: Path) -> None:
    with Image.open(source) as image:
        image.save(source, dpi=(200, 200))
    for options, kept in (((), True), (("--strip",), False)):
        target = tmp_path / f"{kept}.png"
        assert run(model, source, target, *options) == 0
        with Image.open(target) as result:
            assert ("dpi" in result.info) is kept


def test_a_pipe_of_photos(model: Path, source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seesr_core", "upscale", "-", "-", "--format", "webp", "--model", str(model)]
    done = subprocess.run(
        [*command, "--device", "cpu"], input=source.read_bytes(), capture_output=True, cwd=ROOT, check=True
    )
    (tmp_path / "piped.webp").write_bytes(done.stdout)
    with Image.open(tmp_path / "piped.webp") as result:
        assert (result.format, result.size) == ("WEBP", (80, 64))


def test_a_preset_lies_between_the_model_and_what_is_given(model: Path, source: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    given = ("--preset", "turbo", "--steps", 3, "--json", report)
    assert run(model, source, tmp_path / "result.png", *given) == 0
    settings = json.loads(report.read_text())["settings"]
    assert (settings["steps"], settings["cfg"], settings["spacing"]) == (3, 1.0, "trailing")
    assert settings["start_timestep"] == 999  # the model's own is 600
    assert settings["min_size"] == 64  # no preset speaks of it: the model's own


def test_the_report(model: Path, source: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run(model, source, tmp_path / "out.png", "--scale", 2, "--cfg", 1, "--no-tags", "--json", report) == 0
    told = json.loads(report.read_text())
    assert (told["status"], told["model"], told["dtype"]) == ("done", str(model), "float32")
    assert told["input"].endswith("photo.png")
    assert (told["sizes"]["lr"], told["sizes"]["final"]) == ([20, 16], [40, 32])
    assert (told["settings"]["cfg"], told["settings"]["steps"]) == (1.0, 2)  # given, and the model's own
    assert {phase["name"] for phase in told["phases"]} >= {"prompts", "sample", "decode"}
    assert told["tags"]
    assert told["prompt"] == ", ,clean, high-resolution, 8k"


def test_transparency_grey_profile_and_rotation_reach_the_file(model: Path, tmp_path: Path) -> None:
    grey = photo(16, 20, mode="LA")
    grey.putalpha(photo(16, 20, seed=5, mode="L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "in.png", exif=exif, icc_profile=b"profile")
    assert run(model, tmp_path / "in.png", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as result:
        assert (result.size, result.mode, result.info["icc_profile"]) == ((80, 64), "LA", b"profile")
        assert np.ptp(np.asarray(result.getchannel("A")).astype(int)) > 50


def test_every_flag_is_understood(model: Path, source: Path, tmp_path: Path) -> None:
    text = ["--prompt", "a", "--added-prompt", "b", "--negative", "ü"]
    sampling = ["--steps", 4, "--start", "lr", "--start-timestep", 300, "--spacing", "trailing", "--solver", "unipc"]
    tiles = ["--tile", 64, "--overlap", 8, "--tile-batch", 2, "--vae-tile", 128]
    strengths = ["--control-scale", 0.5, "--rca-scale", 0.5, "--threshold", 0.9, "--color-fix", "wavelet"]
    report = tmp_path / "r.json"
    places = ["--local-prompts", "both", "--region-strength", 0.5, "--spatial-cfg", "auto", "--fidelity", 0.25]
    sampling += ["--cfg", 2, "--cfg-start", 0.2, "--cfg-end", 0.9, "--control-reuse", 2]
    options = [*text, *sampling, *tiles, *strengths, *places, "--frame", 0, "--json", report]
    assert run(model, source, tmp_path / "out.webp", *options) == 0
    told = json.loads(report.read_text())
    assert (told["timesteps"], told["tiles"], told["prompt"][-5:]) == ([249], 2, ", a,b")
    chosen = [told["settings"][name] for name in ("cfg_start", "cfg_end", "control_reuse")]
    assert chosen == [0.2, 0.9, 2]
    placed = {name: told["settings"][name] for name in ("local_prompts", "region_strength", "spatial_cfg", "fidelity")}
    assert list(placed.values()) == ["both", 0.5, "auto", 0.25]


def test_overwrite_does_everything_again(model: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    assert run(model, source, target, "--seed", 1) == 0
    before = target.read_bytes()
    assert run(model, source, target, "--seed", 2, "--overwrite") == 0
    assert target.read_bytes() != before


def test_progress_and_a_summary_on_a_terminal(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seesr_core.cli.console.is_terminal", lambda: True)
    monkeypatch.setattr("seesr_core.cli.upscale.is_terminal", lambda: True)
    assert run(model, source, tmp_path / "out.png") == 0
    out, err = capfd.readouterr()
    assert "[1/1] photo.png: " in err
    assert " left" in err
    assert "out.png: 80×64 in " in out
    assert "; tags: " in out


QUIET = {
    "command": "from seesr_core.cli.main import main; sys.exit(main(['upscale', *sys.argv[1:]]))",
    "library": "from seesr_core.models import load_models; load_models('nano', device='cpu', dtype='bf16')",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["library", "command"])
def test_libraries_do_not_warn_on_a_normal_run(way: str, source: Path, tmp_path: Path) -> None:
    """The embedded model in half precision, of whose change diffusers would warn."""
    files = [str(source), str(tmp_path / "out.png"), "--dtype", "bf16", "--device", "cpu"]
    command = [sys.executable, "-c", f"import sys; {QUIET[way]}", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "" or (way == "library" and "float32" not in done.stderr)

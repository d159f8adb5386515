"""`upscale` from end to end with a tiny model: files, folders, reports, exit codes, interruptions."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seesr_core.cli import main as cli
from seesr_core.cli import upscale
from seesr_core.models import load_models
from seesr_core.pictures.reading import read_photo

from .golden import ROOT
from .tiny_model import photo, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    photo(20, 16).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good photos of one name, one with transparency, three bad files, and one that is none."""
    place = tmp_path / "photos"
    place.mkdir()
    photo(seed=1).save(place / "a.jpg")
    photo(seed=2).save(place / "a.png")
    logo = photo(seed=3, mode="RGBA")
    logo.putalpha(128)
    logo.save(place / "logo.webp", lossless=True)
    (place / "broken.jpg").write_bytes((place / "a.jpg").read_bytes()[:200])
    (place / "empty.png").touch()
    frames = [photo(seed=i) for i in range(3)]
    frames[0].save(place / "film.gif", save_all=True, append_images=frames[1:])
    (place / "notes.txt").write_text("not a picture")
    return place


def run(model: Path, *arguments: object) -> int:
    given = [str(argument) for argument in arguments]
    return cli.main(["upscale", *given, "--model", str(model), "--device", "cpu", "--dtype", "fp32"])


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


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three photos, one in a folder of its own and one in a hidden one."""
    place = tmp_path / "tree"
    for name in ("a.jpg", "deep/b.webp", ".cache/c.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        photo(8, 8).save(place / name)
    return place


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["a.png"]),
        (("--recursive",), ["a.png", "deep/b.png"]),
        (("--recursive", "--format", "same"), ["a.jpg", "deep/b.webp"]),
        (("--format", "webp", "--suffix", "_4x"), ["a_4x.webp"]),
    ],
)
def test_names_of_results(
    options: tuple[str, ...], expected: list[str], model: Path, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(model, tree, out, *options) == 0
    assert names(out) == expected
    with Image.open(out / expected[0]) as result:
        assert result.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[expected[0].rsplit(".", 1)[1]]


def test_results_inside_the_searched_folder_are_not_photos(model: Path, tree: Path) -> None:
    for _ in range(2):
        assert run(model, tree, tree / "out", "--recursive") == 0
    assert names(tree / "out") == ["a.png", "deep/b.png"]


def test_a_pattern_is_a_folder_of_its_photos(model: Path, tree: Path, tmp_path: Path) -> None:
    assert run(model, tree / "**" / "*.webp", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["deep/b.png"]


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


def test_several_processes_share_the_photos_out(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each photo in one process, whichever begins first; each failure told once; reports of their own."""
    out, seen = tmp_path / "out", []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        run(model, folder, out, "--json", tmp_path / "report.json")
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        seen.append({Path(entry["input"]).name: entry["status"] for entry in report["photos"]})
    assert not seen[0].keys() & seen[1].keys()
    assert {**seen[0], **seen[1]}.keys() == {"a.jpg", "a.png", "logo.webp", "broken.jpg", "empty.png", "film.gif"}
    assert names(out) == ["a.jpg.png", "a.png.png", "logo.png"]
    assert capfd.readouterr().err.count("empty.png") == 1


def test_a_dry_run_writes_nothing(
    model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale, "load_models", None)
    assert run(model, folder, tmp_path / "out", "--dry-run", "--to", "80") == 1  # for the three bad files
    said = capfd.readouterr().out
    assert "logo.png: 16×16 to 80×80 with the embedded small model: 2 steps of 1 tiles" in said
    assert not names(tmp_path / "out")


def test_a_pipe_of_photos(model: Path, source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "seesr_core", "upscale", "-", "-", "--format", "webp", "--model", str(model)]
    done = subprocess.run(
        [*command, "--device", "cpu"], input=source.read_bytes(), capture_output=True, cwd=ROOT, check=True
    )
    (tmp_path / "piped.webp").write_bytes(done.stdout)
    with Image.open(tmp_path / "piped.webp") as result:
        assert (result.format, result.size) == ("WEBP", (80, 64))


def test_scale_and_size_are_not_given_both(model: Path, source: Path, tmp_path: Path, capfd: Any) -> None:
    assert run(model, source, tmp_path / "result.png", "--to", "4k", "--scale", 2) == 2
    assert "give one of them" in capfd.readouterr().err


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
    options = [*text, *sampling, *tiles, *strengths, *places, "--frame", 0, "--json", report]
    assert run(model, source, tmp_path / "out.webp", *options) == 0
    told = json.loads(report.read_text())
    assert (told["timesteps"], told["tiles"], told["prompt"][-5:]) == ([249], 2, ", a,b")
    placed = {name: told["settings"][name] for name in ("local_prompts", "region_strength", "spatial_cfg", "fidelity")}
    assert list(placed.values()) == ["both", 0.5, "auto", 0.25]


def test_a_folder_goes_on_past_bad_photos_and_lists_them(
    model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target, report = tmp_path / "results", tmp_path / "report.json"
    assert run(model, folder, target, "--json", report) == 1
    assert sorted(os.listdir(target)) == ["a.jpg.png", "a.png.png", "logo.png"]
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "warning: left out, not pictures by their suffix: notes.txt"
    assert lines[1] == "error: 3 of 6 photos failed:"
    assert [word in line for word, line in zip(("broken.jpg", "empty.png", "film.gif"), lines[2:], strict=True)]
    photos = json.loads(report.read_text())["photos"]
    assert [entry["status"] for entry in photos] == ["done"] * 3 + ["failed"] * 3
    assert "is empty (0 bytes)" in photos[4]["error"]


def test_a_second_run_skips_what_is_done(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken.jpg", "empty.png", "film.gif"):
        (folder / name).unlink()
    target, report = tmp_path / "results", tmp_path / "report.json"
    assert run(model, folder, target) == 0
    (target / "logo.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert run(model, folder, target, "--json", report) == 0
    after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"logo.png"}
    statuses = [entry["status"] for entry in json.loads(report.read_text())["photos"]]
    assert sorted(statuses) == ["done", "skipped", "skipped"]

    monkeypatch.setattr(upscale, "load_models", lambda *_, **__: pytest.fail("a finished folder needs no model"))
    assert run(model, folder, target) == 0


def test_overwrite_does_everything_again(model: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    assert run(model, source, target, "--seed", 1) == 0
    before = target.read_bytes()
    assert run(model, source, target, "--seed", 2, "--overwrite") == 0
    assert target.read_bytes() != before


def test_a_fault_of_ours_does_not_cost_the_other_photos(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path, **options: Any) -> Any:
        if path.name == "a.jpg":
            raise ZeroDivisionError("division by zero")
        return read_photo(path, **options)

    monkeypatch.setattr(upscale, "read_photo", read)
    assert run(model, folder, tmp_path / "results") == 1
    assert sorted(os.listdir(tmp_path / "results")) == ["a.png.png", "logo.png"]
    assert "a.jpg: unexpected ZeroDivisionError: division by zero" in capfd.readouterr().err


def refusal(model: Path, capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """The one line on stderr of a command that must fail."""
    assert run(model, *arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_result_that_exists_is_kept(
    model: Path, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"precious")
    assert "out.png exists already: give --overwrite to replace it" in refusal(model, capfd, source, target)
    assert target.read_bytes() == b"precious"


def test_a_photo_is_never_its_own_result(
    model: Path, source: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = source.read_bytes()
    assert "IN and OUT are the same file" in refusal(model, capfd, source, source, "--overwrite", code=2)
    assert "IN and OUT are the same folder" in refusal(model, capfd, folder, folder, "--overwrite", code=2)
    assert source.read_bytes() == before


def test_bad_places_are_told_before_the_work(
    model: Path, source: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(upscale, "load_models", lambda *_, **__: pytest.fail("the work began"))
    out = tmp_path / "out.png"
    for arguments, code, message in (
        ((tmp_path / "nowhere.png", out), 1, "nowhere.png does not exist: expected a picture or a folder"),
        ((source, tmp_path / "out.bmp2"), 1, "the unknown suffix .bmp2: expected one of .png"),
        ((source, source / "out.png"), 1, "Cannot write into"),
        ((source, out, "--json", source / "r.json"), 1, "Cannot write into"),
        ((source, out, "--json", tmp_path / "r.png"), 2, "The report must be named *.json"),
        ((folder, out), 2, "IN is a folder, so OUT must be one, too"),
        ((folder, source), 2, "IN is a folder, so OUT must be one, too"),
        ((tmp_path / "nothing", out), 1, "does not exist"),
    ):
        assert message in refusal(model, capfd, *arguments, code=code)
    assert not out.exists()


def test_an_empty_folder(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert "none holds no pictures" in refusal(model, capfd, tmp_path / "none", tmp_path / "out")


def test_a_folder_as_out_of_one_photo_takes_its_name(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert run(model, source, tmp_path / "results") == 0
    assert os.listdir(tmp_path / "results") == ["photo.png"]


def test_transparency_that_the_format_would_lose(
    model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = refusal(model, capfd, folder / "logo.webp", tmp_path / "out.jpg")
    assert "out.jpg: JPEG cannot keep the photo's transparency" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "many"], "argument --steps: invalid int value: 'many' (see seesr upscale --help)"),
        (["--solver", "euler"], "argument --solver: invalid choice: 'euler'"),
        (["--sacle", "2"], "unrecognized arguments: --sacle 2"),
        (["--tile", "100"], "The tile must be a multiple of 8 pixels, not 100"),
        (["--scale", "0"], "The scale must be from"),
        (["--device", "abacus"], "There is no device 'abacus' here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    model: Path, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["upscale", str(source), str(tmp_path / "out.png"), "--model", str(model), *options]
    assert cli.main(arguments) == 2
    assert f"error: {message}" in capfd.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_no_command_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capfd.readouterr().err == "error: the following arguments are required: COMMAND (see seesr --help)\n"


def test_a_model_that_cannot_be_loaded_stops_a_folder(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty model").mkdir()
    message = refusal(tmp_path / "empty model", capfd, folder / "a.jpg", tmp_path / "out.png")
    assert "empty model has no base model; expected" in message
    assert run(tmp_path / "empty model", folder, tmp_path / "results") == 1
    assert "photos failed" not in capfd.readouterr().err


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_the_middle_leaves_no_half_file(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seesr_core.method.sampling.ddpm_step", interrupt)
    target = tmp_path / "results" / "out.png"
    assert run(model, source, target) == 130
    assert capfd.readouterr().err == "error: Interrupted; no half file was left.\n"
    assert list(target.parent.iterdir()) == []


def test_ctrl_c_while_writing_leaves_no_half_file(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seesr_core.runtime.files._link", interrupt)
    assert run(model, source, tmp_path / "results" / "out.png") == 130
    assert list((tmp_path / "results").iterdir()) == []


def test_ctrl_c_in_a_folder_keeps_what_is_done_and_reports_it(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **options: Any) -> Any:
        return read_photo(path, **options) if path.name == "a.jpg" else interrupt()

    monkeypatch.setattr(upscale, "read_photo", read)
    report = tmp_path / "report.json"
    assert run(model, folder, tmp_path / "results", "--json", report) == 130
    assert os.listdir(tmp_path / "results") == ["a.jpg.png"]
    assert [entry["status"] for entry in json.loads(report.read_text())["photos"]] == ["done"]


def test_a_full_disk_loses_nothing(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("seesr_core.runtime.files.os.replace", full)
    target = tmp_path / "results" / "out.png"
    assert "out.png: No space left on device" in refusal(model, capfd, source, target)
    assert list(target.parent.iterdir()) == []


def test_too_little_memory_is_one_sentence(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    models = load_models(model, device="cpu", dtype="fp32")
    monkeypatch.setattr(upscale, "load_models", lambda *_, **__: models)
    monkeypatch.setattr("seesr_core.runtime.memory.available_memory", lambda device=None: 20_000_000)
    message = refusal(model, capfd, source, tmp_path / "out.png", "--scale", "60")
    assert "Upscaling 20×16 to 1200×960 pixels needs about" in message
    assert "choose a smaller scale or cut the photo into parts" in message


def test_memory_that_ends_while_loading_is_one_sentence(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(upscale, "load_models", exhausted)
    message = refusal(model, capfd, source, tmp_path / "out.png")
    assert "The memory is exhausted: close other programs" in message


def test_a_missing_library_names_the_extra(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(upscale, "load_models", missing)
    message = refusal(model, capfd, source, tmp_path / "out.png")
    assert message == "error: This needs the package diffusers: pip install 'comfyui-seesr[cli]'.\n"


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


def test_ctrl_c_from_outside_ends_with_130(model: Path, source: Path, tmp_path: Path) -> None:
    """A real signal to a real process, sent as soon as the sampling begins."""
    program = (
        "import os, signal, sys\n"
        "import seesr_core.method.sampling as sampling\n"
        "from seesr_core.cli.main import main\n"
        "step = sampling.ddpm_step\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have come with it ignored\n"
        "def signalled(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(*a, **k)\n"
        "sampling.ddpm_step = signalled\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "results" / "out.png"
    command = [sys.executable, "-c", program, "upscale", str(source), str(target), "--model", str(model)]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: Interrupted; no half file was left.\n")
    assert list(target.parent.iterdir()) == []


QUIET = {
    "command": "from seesr_core.cli.main import main; sys.exit(main(['upscale', *sys.argv[1:]]))",
    "library": "from seesr_core.models import load_models; load_models('nano', device='cpu', dtype='bf16')",
}


@pytest.mark.parametrize("way", QUIET)
def test_libraries_do_not_warn_on_a_normal_run(way: str, source: Path, tmp_path: Path) -> None:
    """The embedded model in half precision, of whose change diffusers would warn."""
    files = [str(source), str(tmp_path / "out.png"), "--dtype", "bf16", "--device", "cpu"]
    command = [sys.executable, "-c", f"import sys; {QUIET[way]}", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "" or (way == "library" and "float32" not in done.stderr)

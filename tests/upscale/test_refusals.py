"""What `upscale` does not do, in one sentence each and before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seesr_core.cli import main as cli
from seesr_core.cli import upscale
from seesr_core.models import load_models

from .command import refusal, run


def test_scale_and_size_are_not_given_both(model: Path, source: Path, tmp_path: Path, capfd: Any) -> None:
    assert run(model, source, tmp_path / "result.png", "--to", "4k", "--scale", 2) == 2
    assert "give one of them" in capfd.readouterr().err


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

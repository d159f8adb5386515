"""`doctor`: what is missing or wrong is said in sentences with the command that mends it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seesr_core.cli import main as cli
from seesr_core.formats.ram import write_dape
from seesr_core.install.convert_control import ControlJob
from seesr_core.install.doctor import NOTE, OK, PROBLEM, judge_environment, judge_host
from seesr_core.install.environment import Environment, as_numbers, free_disk, look_at_host
from seesr_core.install.ledger import LEDGER, Ledger, Record
from seesr_core.install.places import Target
from seesr_core.model_files import NANO_FOLDER
from seesr_core.runtime import cost

from .test_checkpoints_refusals import MARK, Payload
from .tiny_model import tagger
from .weights_files import save, write_base_file, write_base_folder, write_ram, write_seesr

RAM_PLUS = {"visual_encoder.patch_embed.proj.weight": torch.zeros(192, 3, 4, 4), "reweight_scale": torch.zeros(1)}


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measuring in tests."""
    monkeypatch.setattr(cost, "matrix_speed", lambda device, dtype: 1e11)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A host with everything that is needed, converted."""
    folder = tmp_path / "models"
    write_base_file(folder / "checkpoints" / "512-base-ema.safetensors", norm=0.02)
    published = write_seesr(tmp_path / "published")
    (folder / "seesr").mkdir()
    ControlJob(folder=published, target=folder / "seesr" / "seesr.safetensors").run()
    (folder / "dape").mkdir()
    write_dape(folder / "dape" / "dape.safetensors", *tagger())
    (tmp_path / "custom_nodes" / "seesr" / "seesr_core").mkdir(parents=True)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    return folder


def doctor(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--json", "--card", "RTX 4090", *map(str, arguments)])
    return code, json.loads(capfd.readouterr().out)


def problems(report: dict[str, Any], level: str = PROBLEM) -> list[tuple[str, str]]:
    return [(item["text"], item["mend"]) for item in report["findings"] if item["level"] == level]


def test_the_embedded_model_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capfd, "--size", "128x128")
    assert (code, problems(report), problems(report, NOTE)) == (0, [], [])
    assert [entry["kind"] for entry in report["files"]] == ["seesr-base", "seesr-dape", "seesr-control", "seesr-segsr"]
    assert all(len(entry["sha256"]) == 64 for entry in report["files"])
    assert report["prediction"]["model"] == "the embedded small model"
    assert report["prediction"]["sizes"]["final"] == [512, 512]


def test_a_host_that_is_well(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capfd, "--comfy", models.parent)
    assert (code, problems(report)) == (0, [])
    assert any("ComfyUI 0.33.0" in text for text, _ in problems(report, OK))
    assert report["prediction"]["model"] == "SeeSR on Stable Diffusion 2-base"


def test_as_text(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(models / "dape")
    assert cli.main(["doctor", "--comfy", str(models.parent), "--quick", "--card", "RTX 4090"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert f"problem  There is no tagger in {models}." in lines
    assert f"         → python -m seesr_core download --what ram dape --comfy {models.parent}" in lines
    assert lines[-1] == "1 problems, 0 notes."


Damage = Callable[[Path], Any]


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without(folder: Path, *names: str) -> None:
    """Remove files."""
    for name in names:
        (folder / name).unlink()


def half_of_seesr(models: Path) -> None:
    shutil.rmtree(models / "seesr")
    shutil.copytree(models.parent / "published" / "unet", models / "seesr" / "a" / "unet")


def ram_instead(models: Path, without_name: str) -> None:
    """Published files in place of the converted tagger, one of them missing."""
    write_ram(models / "dape", name="ram.pth")
    without(models / "dape", "dape.safetensors", without_name)


CASES: dict[str, tuple[Damage, str, str]] = {
    "no base": (lambda m: shutil.rmtree(m / "checkpoints"), "There is no base model in", "--what base --comfy"),
    "no control": (lambda m: shutil.rmtree(m / "seesr"), "There is no SeeSR file in", "--what seesr --comfy"),
    "truncated base": (
        lambda m: spoil(m / "checkpoints" / "512-base-ema.safetensors"),
        "512-base-ema.safetensors is truncated or damaged",
        "--what base --comfy",
    ),
    "RAM++": (
        lambda m: save(m / "dape" / "ram_plus.pth", RAM_PLUS),
        "is RAM++ (the successor of RAM, another network); it fits nothing here: SeeSR was trained with RAM, not RAM++",
        "--what ram --comfy",
    ),
    "another file under RAM's name": (
        lambda m: write_ram(m / "dape" / "published"),
        "bytes: the published file has 5,625,634,877",
        "--what ram --comfy",
    ),
    "a web page": (lambda m: (m / "dape" / "x.pth").write_bytes(b"<html>"), "is a web page or XML", ""),
    "half of SeeSR": (
        half_of_seesr,
        "has only one half of SeeSR: the seesr-controlnet is missing",
        "--what seesr --comfy",
    ),
    "only a v-prediction base": (
        lambda m: write_base_file(m / "checkpoints" / "512-base-ema.safetensors", norm=0.3),
        "There is no base model in",
        "--what base --comfy",
    ),
    "plain RAM": (
        lambda m: ram_instead(m, "DAPE.pth"),
        "is plain RAM and there is no DAPE adapter beside it",
        "--what dape --comfy",
    ),
    "no tag lists": (
        lambda m: ram_instead(m, "ram_tag_list.txt"),
        "has RAM but not its tag lists",
        "--what dape --comfy",
    ),
    "nano's control without nano": (
        lambda m: shutil.copy(NANO_FOLDER / "seesr" / "seesr-nano-control.safetensors", m / "seesr"),
        "has no base model that fits: it needs first channels and text width (64, 192)",
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong(models: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    damage, words, mend = CASES[name]
    damage(models)
    code, report = doctor(capfd, "--comfy", models.parent)
    assert code == 1
    texts = [(text, command) for text, command in problems(report) if words in text]
    assert len(texts) == 1, problems(report)
    assert texts[0][1] == f"python -m seesr_core download {mend} {models.parent}" if mend else texts[0][1] == ""


def test_foreign_checkpoints_are_the_users_own(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sdxl = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save(models / "checkpoints" / "sdxl.safetensors", sdxl)
    write_base_file(models / "checkpoints" / "v2-1_768.safetensors", norm=0.3)
    code, report = doctor(capfd, "--comfy", models.parent)
    assert (code, len(report["files"])) == (0, 4)
    ((text, _),) = problems(report, NOTE)
    assert "v2-1_768.safetensors is a single-file checkpoint (Stable Diffusion 2.x), probably a v-prediction" in text


def test_the_hosts_extra_folders_are_searched(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.move(models / "checkpoints", tmp_path / "elsewhere" / "sd")
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text("a:\n  base_path: elsewhere\n  checkpoints: |\n    nothing\n    sd\nb:\n  loras: x\n")
    code, report = doctor(capfd, "--comfy", tmp_path)
    assert (code, problems(report)) == (0, [])
    for text in ("a: [", "- 1", ""):
        config.write_text(text)
        assert doctor(capfd, "--comfy", tmp_path, "--quick")[0] == 1


def test_published_files_work_and_are_better_converted(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(models / "seesr")
    shutil.copytree(models.parent / "published", models / "seesr" / "published")
    (models / "dape" / "dape.safetensors").unlink()
    write_ram(models / "dape" / "published", name="ram.pth")
    code, report = doctor(capfd, "--comfy", models.parent)
    assert (code, problems(report)) == (0, [])
    assert {mend for _, mend in problems(report, NOTE)} == {f"python -m seesr_core convert --comfy {models.parent}"}


def test_a_folder_of_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, report = doctor(capfd, "--to", tmp_path / "nothing")
    assert code == 1
    assert (
        f"{tmp_path}/nothing does not exist.",
        f"python -m seesr_core download --to {tmp_path}/nothing",
    ) in problems(report)
    write_ram(tmp_path / "ram", name="ram.pth")
    write_seesr(tmp_path / "seesr")
    write_base_folder(tmp_path / "stable-diffusion-2-base", prediction_type="v_prediction")
    code, report = doctor(capfd, "--model", tmp_path)
    assert code == 1
    texts = "\n".join(text for text, _ in problems(report))
    assert "a v-prediction model (2.0 or 2.1 at 768 pixels); it fits nothing here" in texts
    assert f"There is no base model in {tmp_path}." in texts


def test_unsafe_pickles_are_refused_and_named(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"payload": Payload(tmp_path)}, models / "dape" / "x.pth")
    code, report = doctor(capfd, "--comfy", models.parent)
    assert code == 1
    assert "x.pth is refused: it is a pickle that asks for the code of" in problems(report)[0][0]
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("size", ["640", "0x5", "axb", "640x"])
def test_wrong_usage(size: str) -> None:
    assert cli.main(["doctor", "--size", size]) == 2
    assert cli.main(["doctor", "--card", "Voodoo 2"]) == 2
    assert cli.main(["doctor", "--comfy", "/nowhere"]) == 2


def environment(**changes: Any) -> Environment:
    values: dict[str, Any] = {
        "version": "1",
        "python": "3.11.7 (/python)",
        "system": "Linux",
        "torch": "2.13.0+cpu",
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "memory": 16_000_000_000,
        "device_memory": None,
        "packages": {"diffusers": "0.4", "einops": "1"},
    }
    return Environment(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "words", "mend"),
    [
        ({"python": "3.9.1 (/python)"}, "is too old: expected 3.10", ""),
        ({"torch": "2.3.1+cu121"}, "torch 2.3.1+cu121 is too old: expected 2.4", "pip install --upgrade torch"),
        ({"packages": {"einops": ""}}, "einops, which everything needs, is missing", "pip install comfyui-seesr"),
        (
            {"packages": {"diffusers": ""}},
            "diffusers, which the command line needs, is missing",
            "pip install 'comfyui-seesr[cli]'",
        ),
    ],
)
def test_the_environment(changes: dict[str, Any], words: str, mend: str) -> None:
    assert [finding.level for finding in judge_environment(environment())] == [OK]
    bad = [finding for finding in judge_environment(environment(**changes)) if finding.level == PROBLEM]
    assert [words in finding.text for finding in bad] == [True]
    assert bad[0].mend == mend


def test_nodes_need_no_command_line() -> None:
    findings = judge_environment(environment(packages={"diffusers": ""}), needs_command_line=False)
    assert [finding.level for finding in findings] == [OK, NOTE]


@pytest.mark.parametrize(
    ("version", "level"), [("0.3.64", OK), ("0.33.0", OK), ("1.0", OK), ("0.3.63", PROBLEM), ("0.2.9", PROBLEM)]
)
def test_the_hosts_version(models: Path, version: str, level: str) -> None:
    (models.parent / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (finding,) = judge_host(look_at_host(models))
    assert finding.level == level


def test_a_host_without_the_plugin(models: Path) -> None:
    shutil.rmtree(models.parent / "custom_nodes")
    findings = judge_host(look_at_host(models))
    assert [finding.level for finding in findings] == [OK, PROBLEM]
    assert findings[1].mend.startswith("ln -s ")
    (models.parent / "comfyui_version.py").unlink()
    assert [finding.level for finding in judge_host(look_at_host(models))] == [NOTE]


def test_small_things(tmp_path: Path) -> None:
    assert as_numbers("2.13.0+cu128") == (2, 13, 0)
    assert free_disk(tmp_path / "not" / "yet") == free_disk(tmp_path)
    assert Target.comfy(Path(shutil.copytree(tmp_path, tmp_path / "c" / "models"))).root.name == "models"


def test_too_large_for_this_machine(
    models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "available_memory", lambda device=None: 3_000_000_000)
    assert cli.main(["doctor", "--comfy", str(models.parent), "--quick"]) == 1
    out = capfd.readouterr().out
    assert "of 3.0 GB and very roughly" in out
    assert "too much for it." in out
    assert "→ a smaller --tile, a smaller --scale, or `--model nano`" in out


def test_damage_is_told_by_the_hashes_that_were_noted(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    control, base = models / "seesr" / "seesr.safetensors", models / "checkpoints" / "512-base-ema.safetensors"
    record = Record(sha256="0" * 64, bytes=base.stat().st_size, source="first/weights")
    Ledger(models).note(base, record)
    with control.open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(b"x" * 16)
    _, report = doctor(capfd, "--comfy", models.parent)
    texts = [text for text, _ in problems(report)]
    assert any(f"{base} has another sha256 than {LEDGER} noted when it came" in text for text in texts)
    assert any(f"{control} has another sha256 than it states of itself" in text for text in texts)
    _, quick = doctor(capfd, "--comfy", models.parent, "--quick")
    assert not any("sha256" in text for text, _ in problems(quick))

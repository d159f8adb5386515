"""Recipes overridden by TOML files and flags, and what is said about mistakes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seesr_core.errors import SettingsError
from trainer.engine import command
from trainer.engine.command import get_recipe
from trainer.engine.settings import overridden, read_toml
from trainer.stage2 import command as stage2
from trainer.stage2.recipes import STAGE2_RECIPES


def settings(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text, "utf-8")
    return path


def parse(path: Path, *more: str) -> stage2.Stage2Command:
    given = ["--recipe", "debug", "--settings", str(path), "--data", "d", "--base", "b", "--dape", "t", "--out", "o"]
    return command.parse(stage2.Stage2Command, STAGE2_RECIPES, [*given, *more], prog="stage2")


def test_a_file_overrides_the_recipe_and_flags_the_file(tmp_path: Path) -> None:
    text = "crop = 128\nhint-channels = [4, 4]\n[loop]\nlearning_rate = 1\nsteps = 7\n[degradation.first]\n"
    path = settings(tmp_path, text + "jpeg_quality = [40.0, 50.0]\n")
    found = parse(path, "--loop.steps", "9")
    assert (found.config.crop, found.config.hint_channels) == (128, (4, 4))
    assert found.config.loop.learning_rate == 1.0
    assert found.config.loop.steps == 9
    assert found.config.loop.batch_size == get_recipe(STAGE2_RECIPES, "debug").loop.batch_size
    assert found.config.degradation.first.jpeg_quality == (40.0, 50.0)
    assert found.settings == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corp = 128", r"mine\.toml: there is no setting corp\. Did you mean crop\?"),
        ("[loop]\nbatchsize = 2", r"there is no setting loop\.batchsize\. Did you mean loop\.batch_size\?"),
        ("loop = 3", r"loop is a table \(\[loop\]\), found 3"),
        ('crop = "128"', r"crop should be a whole number, found '128'"),
        ("gradient_checkpointing = 1", r"gradient_checkpointing should be true or false, found 1"),
        ("crop = 100", r"crop must be a positive multiple of 64 pixels, found 100"),
        ("crop = ", r"cannot be read as TOML settings"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = settings(tmp_path, text)
    with pytest.raises(SettingsError, match=message):
        overridden(get_recipe(STAGE2_RECIPES, "debug"), read_toml(path), path)


def test_a_misspelt_flag_is_answered_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(settings(tmp_path, ""), "--loop.batch-sise", "3")
    said = capsys.readouterr()
    assert "--loop.batch-size" in said.err + said.out


def test_the_recipe_for_24_gb_and_the_one_for_turbo_say_what_they_change() -> None:
    published: Any = get_recipe(STAGE2_RECIPES, "paper")
    small = get_recipe(STAGE2_RECIPES, "finetune-24gb")
    assert (small.trained, small.loop.optimizer, small.loop.micro_batch) == ("rca-image-encoder", "adamw-8bit", 2)
    assert small.gradient_checkpointing
    assert get_recipe(STAGE2_RECIPES, "turbo").timesteps == (249, 499, 749, 999)
    assert (published.trained, published.timesteps) == ("all", ())

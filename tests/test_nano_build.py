"""The whole training path with the debug recipe: every part, the files it ships, and interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.ram import read_dape
from tests.golden import ROOT
from trainer.nano.__main__ import main
from trainer.nano.build import BASE, CONTROL, DAPE_FILE, Builder
from trainer.nano.recipe import NANO_RECIPES

pytestmark = pytest.mark.slow

WORDS = (["cat", "animal"], ["dog", "animal"], ["car"], ["tree", "plant"])


def _write_photos(folder: Path, count: int = 12) -> Path:
    """Noise with some structure, and words for it."""
    lines = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        small = torch.rand(1, 3, 10, 12, generator=g)
        picture = torch.nn.functional.interpolate(small, (90, 110), mode="bicubic").clamp(0, 1)[0]
        array = (picture.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "tags": WORDS[number % len(WORDS)]}))
    (folder / "photos.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "photos.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The debug recipe, built once."""
    folder = tmp_path_factory.mktemp("nano")
    photos = _write_photos(folder)
    assert main(["--recipe", "debug", "--photos", str(photos), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_the_three_files_load_and_fit_each_other(run: Path):
    base = load_base(run / "model" / BASE)
    dape, vocabulary = read_dape(run / "model" / DAPE_FILE)
    control = read_control(run / "model" / CONTROL)
    assert control.context_dim == dape.config.token_width
    assert control.unet_config["cross_attention_dim"] == base.unet_config["cross_attention_dim"]
    assert set(vocabulary.tags) == {word for words in WORDS for word in words}
    assert control.defaults["solver"] == "ddim"


def test_the_last_part_changes_the_decoder_and_not_the_encoder(run: Path):
    before, after = (load_base(path).vae.state_dict() for path in (run / "base.safetensors", run / "model" / BASE))
    same = {name for name in before if torch.equal(before[name].half(), after[name].half())}
    assert {name for name in before if name.startswith("encoder.")} <= same
    assert any(name.startswith("decoder.") and name.endswith("weight") for name in before.keys() - same)


def test_a_build_goes_on_from_a_model(run: Path, tmp_path: Path):
    """With `--init` autoencoder, U-Net and ControlNet start where that model was, not afresh."""
    given = ["--recipe", "debug", "--photos", str(run.parent / "photos.jsonl"), "--out", str(tmp_path)]
    assert main([*given, "--init", str(run / "model"), *_still("prior.stage2", "few-steps", "decoder", "texture")]) == 0
    old, new = (load_base(folder / "model" / BASE).unet_state for folder in (run, tmp_path))
    for name, tensor in old.items():
        torch.testing.assert_close(new[name].float(), tensor.float(), atol=1e-3, rtol=1e-3)


def test_the_decoder_goes_part_of_the_way_to_the_texture(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builder = Builder(NANO_RECIPES["debug"](), run.parent / "photos.jsonl", tmp_path)
    before, after = (
        {"decoder.a": torch.tensor(a), "unet.b": torch.tensor(b)} for a, b in (([1.0, 2.0], 1.0), ([2.0, 0.0], 9.0))
    )
    save_file(before, tmp_path / "decoder.safetensors")
    monkeypatch.setattr(builder, "_tuned", lambda part, config: after)
    builder.texture()
    wanted = {"decoder.a": torch.tensor([1.2, 1.6]), "unet.b": torch.tensor(9.0)}
    torch.testing.assert_close(load_file(tmp_path / "texture.safetensors"), wanted)


def _still(*parts: str) -> list[str]:
    """Flags by which parts learn next to nothing."""
    return [word for part in parts for word in (f"--{part}.loop.learning-rate", "1e-9")]


def test_parts_that_are_done_are_left_alone(run: Path):
    results = [run / "model" / name for name in (BASE, DAPE_FILE, CONTROL)]
    before = [path.stat().st_mtime_ns for path in results]
    assert main(["--recipe", "debug", "--photos", str(run.parent / "photos.jsonl"), "--out", str(run)]) == 0
    assert [path.stat().st_mtime_ns for path in results] == before


def _stage2(run: Path, out: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "trainer.stage2",
        "--recipe",
        "debug",
        "--loop.steps",
        "14",
        "--loop.save-every",
        "3",
    ]
    files = {"data": run / "tags.jsonl", "base": run / "base.safetensors", "dape": run / "dape" / "dape.safetensors"}
    return [*command, *(part for name, path in files.items() for part in (f"--{name}", str(path))), "--out", str(out)]


def _losses(out: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_killed_stage_2_goes_on_as_if_nothing_had_happened(run: Path, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(_stage2(run, tmp_path / "whole"), cwd=ROOT, env=environment, check=True, capture_output=True)
    killed = subprocess.Popen(
        _stage2(run, tmp_path / "killed"),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or len(log.read_text("utf-8").splitlines()) < 5:
        assert killed.poll() is None, "stage 2 ended before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "seesr-control.safetensors").exists()
    subprocess.run(_stage2(run, tmp_path / "killed"), cwd=ROOT, env=environment, check=True, capture_output=True)
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


def test_another_recipe_in_the_same_folder_is_refused(run: Path, tmp_path: Path):
    first = subprocess.run(_stage2(run, tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    other = subprocess.run([*_stage2(run, tmp_path), "--null-text", "0.25"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1
    assert "null_text" in other.stderr
    assert "Traceback" not in other.stderr

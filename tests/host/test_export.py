"""What stage 2 writes is what the nodes load: the picture of the trainer's own last validation, with the same noise.

The training runs in an interpreter that has the trainer's requirements: `$SEESR_TRAINER_PYTHON`, else this one.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..parity.compare import Comparison
from ..parity.groups.pipeline import LATENT_TOLERANCE, Trace
from ..parity.host.pipeline import recorded_ddpm
from .locate import PLUGIN, plugin
from .nets import NANO
from .small_nodes import ADDED, NEGATIVE, applied, load_checkpoint

EXPORTED, SHIPPED = "trained.safetensors", "seesr-nano-control.safetensors"
STEPS, CFG, MIN_SIZE = 4, 5.5, 64
"""As in `tests.trained_nano`; the rest are the published settings."""


@functools.cache
def trainer_python() -> str:
    """An interpreter that can train; skips the calling test without one."""
    python = os.environ.get("SEESR_TRAINER_PYTHON", sys.executable)
    tried = subprocess.run([python, "-c", "import accelerate, diffusers"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{python} lacks the trainer's requirements; set SEESR_TRAINER_PYTHON to one that has them")
    return python


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2 with its validation."""
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "PYTHONPATH": str(PLUGIN), "OMP_NUM_THREADS": "1"}
    command = [trainer_python(), "-m", "tests.trained_nano", str(folder)]
    done = subprocess.run(command, cwd=PLUGIN, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def validation(trained: Path) -> dict[str, Tensor]:
    """What the trainer saw: noise (1 + steps, 4, h, w), latent, pictures uint8."""
    return load_file(trained / "validation.safetensors")


@pytest.fixture
def models(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folder of models, with the export in it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"checkpoints": ([], {".safetensors"})})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    plugin("nodes.folders").register()
    (tmp_path / "seesr").mkdir(exist_ok=True)
    shutil.copy(trained / "run" / "seesr-control.safetensors", tmp_path / "seesr" / EXPORTED)
    return tmp_path


def in_the_host(name: str, photo: Path, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled latent (1, 4, h, w) and finished picture uint8 (3, H, W), by the nodes in the order of the workflow."""
    image_nodes, prompts, latents = plugin("nodes.image"), plugin("nodes.prompts"), plugin("nodes.latent")
    loaders, encode = plugin("nodes.loaders"), plugin("nodes.upscale").encode_text
    base = load_checkpoint(plugin("nodes.host.nano").EMBEDDED)
    (seesr_model,) = loaders.SeeSRLoadModel.execute(name).result
    (dape,) = loaders.SeeSRLoadDAPE.execute("dape-nano.safetensors").result
    image = torch.from_numpy(np.array(Image.open(photo).convert("RGB")))[None].float() / 255
    (prepared,) = image_nodes.SeeSRPrepareImage.execute(image, 4.0, MIN_SIZE).result
    (tags,) = prompts.SeeSRExtractTags.execute(dape, image, 1.0, "", "en").result
    (soft_prompt,) = prompts.SeeSRSoftPrompt.execute(dape, image).result
    (text,) = prompts.SeeSRPrompt.execute(tags[0], "", ADDED).result
    model, positive, negative = applied(
        base["model"],
        [encode(base["clip"], text)],
        encode(base["clip"], NEGATIVE),
        seesr_model,
        soft_prompt,
        prepared,
    )
    (sigmas,) = latents.SeeSRScheduler.execute(base["model"], STEPS).result
    _, latent = latents.SeeSRLatentInit.execute(base["model"], base["vae"], prepared, sigmas, 0).result
    start = plugin("nodes.host.noise").LRENoise.for_model(
        base["model"], sigmas, seed=0, draw=lambda *_: noise[:1].clone()
    )
    sampler = recorded_ddpm(Trace(timesteps=[]), noise[1:])
    node = plugin("nodes.tiled").SeeSRTiledSampler
    sampled, _ = node.execute(model, positive, negative, start, sampler, sigmas, latent, CFG).result
    decoded = plugin("nodes.host.vae").decode_latent(base["vae"], sampled["samples"])
    (finished,) = image_nodes.SeeSRFinishImage.execute(decoded, prepared, image, 4.0, "adain").result
    scaled = base["model"].get_model_object("latent_format").process_in(sampled["samples"])
    return scaled, (finished[0] * 255).round().to(torch.uint8).movedim(-1, 0)


def compared(name: str, trained: Path, validation: dict[str, Tensor]) -> list[Any]:
    """The host's numbers beside the trainer's."""
    latent, picture = in_the_host(name, trained / "pairs" / "LR" / "0.png", validation["noise"])
    return [
        Comparison.of("export", name, "latent", latent.float(), validation["latent"], LATENT_TOLERANCE),
        Comparison.u8("export", name, "picture", picture, validation["picture"]),
    ]


def test_the_host_gives_the_picture_of_the_last_validation(
    models: Path, trained: Path, validation: dict[str, Tensor]
) -> None:
    assert [line.line() for line in compared(EXPORTED, trained, validation) if not line.ok] == []


def test_weights_from_before_the_training_give_another(
    models: Path, trained: Path, validation: dict[str, Tensor]
) -> None:
    assert (NANO / "seesr" / SHIPPED).is_file()
    assert [line.quantity for line in compared(SHIPPED, trained, validation) if not line.ok] == ["latent", "picture"]

"""The small model's autoencoder: a decoder that grows, on the exact code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.nano.autoencoder import AutoencoderConfig, AutoencoderTask, build_autoencoder, exported


@pytest.fixture
def crops(tmp_path: Path) -> Crops:
    for number in range(3):
        small = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(number))
        picture = torch.nn.functional.interpolate(small, (48, 64), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / f"{number}.png")
    return Crops(read_photos(tmp_path), size=32)


def config(**changes: object) -> AutoencoderConfig:
    loop = LoopConfig(steps=3, batch_size=2, learning_rate=1e-3, device="cpu", log_every=1, save_every=1)
    return AutoencoderConfig(loop=loop, crop=32, grow=(1, 2), **changes)  # type: ignore[arg-type]


def test_every_part_of_the_decoder_gives_a_whole_picture(crops: Crops) -> None:
    task = AutoencoderTask(config(), crops)
    code = torch.zeros(1, 16, 4, 5)
    assert [[tuple(y.shape) for y in task.trained(code, level)] for level in (1, 2, 3)] == [
        [(1, 3, 32, 40)] * count for count in (1, 2, 3)
    ]


def test_the_last_picture_is_that_of_the_plain_decoder(crops: Crops) -> None:
    task, vae = AutoencoderTask(config(), crops), build_autoencoder()
    code = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(task.trained(code)[-1], vae.decode(code).sample)


def test_it_grows_learns_and_exports_what_the_layout_has(crops: Crops, tmp_path: Path) -> None:
    task = AutoencoderTask(config(), crops)
    assert [task.level(step) for step in range(4)] == [1, 2, 3, 3]
    weights = train(task, task.config.loop, tmp_path)
    names = exported(weights, task.encoder).keys()
    assert names == build_autoencoder().state_dict().keys()


def test_flat_crops_are_flat_and_others_stay(crops: Crops) -> None:
    photo = crops.crop(0, torch.Generator().manual_seed(0))
    always, never = AutoencoderTask(config(flat=1.0), crops), AutoencoderTask(config(flat=0.0), crops)
    assert torch.equal(never._flattened(photo, 5), photo)
    steps = [always._flattened(photo, n).int().diff(dim=2).abs().max() for n in range(8)]
    assert max(steps) <= 5
    assert min(steps) == 0

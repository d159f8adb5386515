"""The small model's cosine code and its encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.nano import dct
from trainer.nano.dct import analysis, preview_factors, write_encoder

diffusers = pytest.importorskip("diffusers")


def pictures() -> Tensor:
    """(2, 3, 24, 32) in [−1, 1]."""
    return torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def written() -> Any:
    model = diffusers.AutoencoderTiny(latent_channels=dct.CHANNELS)
    write_encoder(model.encoder)
    return model.encoder


def test_patterns_are_orthogonal() -> None:
    patterns = analysis()[: len(dct.LUMA)].flatten(1)
    unit = patterns / patterns.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(len(unit), dtype=torch.float64))


def test_encoder_of_taesd_computes_the_code_exactly() -> None:
    x = pictures()
    expected = F.conv2d(x, analysis(), stride=dct.CELL)
    torch.testing.assert_close(written().double()(x), expected, atol=1e-6, rtol=0)


def test_in_half_precision_it_loses_less_than_a_hundredth_of_a_deviation() -> None:
    encoder = written()
    for parameter in encoder.parameters():
        parameter.data = parameter.data.half().float()
    x = pictures()
    assert (encoder(x.float()) - F.conv2d(x, analysis(), stride=dct.CELL)).abs().max() < 4e-3


@pytest.mark.parametrize("color", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (0.8, -0.4, 0.1)])
def test_preview_shows_the_mean_colour(color: tuple[float, float, float]) -> None:
    flat = torch.tensor(color, dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    code = F.conv2d(flat, analysis(), stride=dct.CELL)[0, :, 0, 0] * dct.SCALING
    torch.testing.assert_close(code @ preview_factors(), flat[0, :, 0, 0])

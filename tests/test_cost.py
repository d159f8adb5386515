"""What an upscaling takes, predicted: more work takes longer, and the figures fit those that were published."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from seesr_core.model_files import NANO_FOLDER
from seesr_core.runtime import cost
from seesr_core.settings import UpscaleSettings


def device(**changes: Any) -> cost.Device:
    return replace(cost.card("RTX 3060"), **changes)


def test_more_work_takes_longer_and_tiles_bound_memory() -> None:
    settings = UpscaleSettings()
    small, large = (cost.predict(cost.FULL, (side, side), settings, device()) for side in (128, 512))
    assert (small.tiles, large.tiles, large.sizes.final) == (1, 9, (2048, 2048))
    assert large.seconds > 9 * small.seconds
    assert large.bytes < 1.6 * small.bytes
    unguided = cost.predict(cost.FULL, (128, 128), UpscaleSettings(cfg=1.0), device())
    assert unguided.seconds == pytest.approx(small.seconds / 2, rel=0.1)


def test_published_figures_are_met_within_the_stated_factor() -> None:
    """128² to 512² in 50 guided steps: 1.6 TFLOP a call, 164 TFLOP in all."""
    found = cost.predict(cost.FULL, (128, 128), UpscaleSettings(), device(speed=1e12))
    assert found.seconds == pytest.approx(164 + 4, abs=5)
    assert 6e9 < found.bytes < 10e9


def test_what_does_not_fit() -> None:
    assert not cost.predict(cost.FULL, (512, 512), UpscaleSettings(), device(memory=4_000_000_000)).fits
    assert cost.predict(cost.FULL, (512, 512), UpscaleSettings(), device(memory=None)).fits
    assert cost.predict(cost.NANO, (128, 128), UpscaleSettings(), device(memory=4_000_000_000)).fits


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("NVIDIA GeForce RTX 3060 Ti", 8), ("NVIDIA GeForce RTX 3060", 12), ("NVIDIA H200", 141)]
)
def test_cards_by_their_own_names(name: str, gigabytes: int) -> None:
    assert cost.card(name).memory == gigabytes * 10**9


def test_reuse_spares_the_controlnet_between_its_calls() -> None:
    """Ten guided steps, five of them without it: 27 % of half of the arithmetic."""
    plain, reused = (
        cost.predict(cost.FULL, (128, 128), UpscaleSettings(steps=10, control_reuse=reuse), device(speed=1e12))
        for reuse in (1, 2)
    )
    calls, embedding = 20 * 1.64, 10 * 1.64 * 0.009  # which is asked once, and not in ten calls more
    assert plain.seconds - reused.seconds == pytest.approx(calls * 0.27 / 2 - embedding, rel=0.02)
    assert reused.bytes > plain.bytes


def operations(
    width: int, unet_config: Any, controlnet_config: Any, tokens: int, side: int
) -> tuple[int, float, float]:
    """Counted on networks without numbers: of a call, and the shares of the ControlNet and of its image encoder."""
    from torch.utils.flop_counter import FlopCounterMode

    from seesr_core.method.controlnet import build_controlnet
    from seesr_core.method.unet import build_unet

    with torch.device("meta"):
        unet = build_unet(unet_config, context_dim=width).eval()
        controlnet = build_controlnet(controlnet_config, context_dim=width).eval()
        x, text = (
            torch.empty(1, unet_config.get("in_channels", 4), side, side),
            torch.empty(1, 77, unet_config["cross_attention_dim"]),
        )
        soft, image = torch.empty(1, tokens, width), torch.empty(1, 3, 8 * side, 8 * side)
        t = torch.empty(1)
    extra = {"soft_prompt": soft, "rca_scale": 1.0}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        down, mid = controlnet(x, t, text, image, 1.0, cross_attention_kwargs=extra, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        unet(x, t, text, **residuals, cross_attention_kwargs=extra, return_dict=False)
    total, counts = counter.get_total_flops(), counter.get_flop_counts()
    parts = ("ControlNetModel", "ControlNetModel.controlnet_cond_embedding")
    control, hint = (sum(counts[name].values()) / total for name in parts)
    return total, control, hint


@pytest.mark.parametrize("side", [32, 48])
def test_the_small_models_operations_are_counted_right(side: int) -> None:
    from seesr_core.formats.control import read_control

    parts = read_control(NANO_FOLDER / "seesr" / "seesr-nano-control.safetensors")
    found, share, hint = operations(parts.context_dim, parts.unet_config, parts.controlnet_config, 17, side)
    assert share == pytest.approx(cost.NANO.control_share, abs=0.015)
    assert hint == pytest.approx(cost.NANO.hint_share, abs=0.015)
    a, b, c = cost.NANO.call
    assert found == pytest.approx(a + b * side**2 + c * side**4, rel=1e-6)


@pytest.mark.slow
def test_the_published_models_operations_are_counted_right() -> None:
    from .golden import golden_dir

    keys = golden_dir() / "unet_controlnet"
    unet, controlnet = (json.loads((keys / f"full_{name}_config.json").read_text()) for name in ("unet", "controlnet"))
    a, b, c = cost.FULL.call
    found, share, hint = operations(512, unet, controlnet, 145, 40)
    assert share == pytest.approx(cost.FULL.control_share, abs=0.01)
    assert hint == pytest.approx(cost.FULL.hint_share, abs=0.002)
    assert found == pytest.approx(a + b * 40**2 + c * 40**4, rel=1e-6)

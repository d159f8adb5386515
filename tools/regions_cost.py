"""`python -m tools.regions_cost`: what regions add to a pass of the full-size networks, in processor time.

U-Net and ControlNet of the published sizes with drawn weights, in bf16 on one thread, positive and negative prompt in
one call. Each pair is a pass without regions and one with, every second pair the other way round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.method.controlnet import controlnet_from_unet
from seesr_core.method.denoiser import predict_noise
from seesr_core.method.rca import SOFT_PROMPT_DIM
from seesr_core.method.regions import Regions
from seesr_core.method.unet import build_unet
from tests.checkpoint_files import SD2_UNET

_TOKENS, _BATCH = 77, 2


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.regions_cost", description=(__doc__ or "").split(":", 1)[1])
    parser.add_argument("--cells", type=int, default=64, help="side of the latent (64)")
    parser.add_argument("--tags", type=int, default=8, help="tags with a mask (8)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of passes (5)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    networks, given = _networks(), _inputs(options.cells)
    regions = _regions(options.cells, options.tags)
    _seconds(networks, given, None)  # warms up
    shares = []
    for pair in range(options.pairs):
        order = (None, regions) if pair % 2 == 0 else (regions, None)
        found = {placed is not None: _seconds(networks, given, placed) for placed in order}
        shares.append(100 * (found[True] / found[False] - 1))
        _say(f"pair {pair + 1}: {found[False]:.2f} s without, {found[True]:.2f} s with regions, {shares[-1]:+.1f} %")
    _say(
        f"{options.tags} tags on {options.cells}×{options.cells}: {statistics.median(shares):+.1f} % of a pass, median "
        f"of {options.pairs} pairs, {min(shares):+.1f} to {max(shares):+.1f}"
    )


def _networks() -> tuple[Any, Any]:
    with torch.device("meta"):
        unet = build_unet(SD2_UNET)
        controlnet = controlnet_from_unet(unet)
    draw = torch.Generator().manual_seed(0)
    for network in (unet, controlnet):
        nn.Module.to(network, torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.uniform_(-0.03, 0.03, generator=draw)
    return unet, controlnet


def _inputs(cells: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {
        "x": (_BATCH, 4, cells, cells),
        "text": (_BATCH, _TOKENS, 1024),
        "image": (_BATCH, 3, 8 * cells, 8 * cells),
        "soft_prompt": (_BATCH, 145, SOFT_PROMPT_DIM),
    }
    return {name: torch.rand(shape, generator=draw).bfloat16() for name, shape in shapes.items()}


def _regions(cells: int, tags: int) -> Regions:
    """Masks in the positive half alone, three tokens to a tag."""
    masks = torch.rand(_BATCH, tags, cells, cells, generator=torch.Generator().manual_seed(2))
    numbers = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    numbers[1, 1 : 1 + 3 * tags] = torch.arange(3 * tags) // 3 + 1
    return Regions(masks=masks, numbers=numbers, strength=1.0)


@torch.inference_mode()
def _seconds(networks: tuple[Any, Any], given: dict[str, Tensor], regions: Regions | None) -> float:
    start = time.process_time()
    x, text, image, soft_prompt = (given[name] for name in ("x", "text", "image", "soft_prompt"))
    predict_noise(*networks, x, 500, text, image=image, soft_prompt=soft_prompt, regions=regions)
    return time.process_time() - start


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

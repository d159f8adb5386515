"""VAE encoding and decoding in tiles, so that memory is bounded by the tile instead of the picture.

Every tile is given as much surrounding picture as its convolutions can see, which is cut off afterwards. A purely
convolutional autoencoder (diffusers' `AutoencoderTiny`, TAESD) is therefore exact. `AutoencoderKL` also looks at the
whole picture, in its group norms and in its middle attention, so tiling it is an approximation: the norms share their
statistics, measured tile by tile beforehand (deeper ones are estimates, since each tile then still normalises itself);
attention stays within a tile and its surrounding; and neighbouring tiles are crossfaded to soften what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SettingsError

_PROBE_CELLS = 8
_CROSSFADE_CELLS = 4
_Net = Callable[[Tensor], Tensor]


@torch.no_grad()
def encode_tiled(vae: Any, image_B3HW: Tensor, *, tile_px: int = 1024) -> Tensor:
    """Scaled latents (B, 4, H/8, W/8) of pictures in [−1, 1] with sides that are multiples of 8.

    `vae` is diffusers' AutoencoderKL (the mode of its posterior is taken) or AutoencoderTiny, on the picture's device,
    or any module with their `encode`, `decode` and `config.scaling_factor` that tells its `pixels_per_cell`.
    `tile_px`: side of a tile in pixels, without its surrounding; a picture no larger is encoded whole.

    Raises:
        SettingsError: `tile_px` is below one latent cell, or the picture's sides are not multiples of a cell.
    """

    def encode(x: Tensor) -> Tensor:
        return encoded_latents(vae.encode(x))

    cell = _pixels_per_cell(vae)
    height, width = image_B3HW.shape[-2:]
    if height % cell or width % cell:
        raise SettingsError(f"The picture's sides must be multiples of {cell} to be encoded, found {width}×{height}.")
    latents = _run_tiled(vae, encode, image_B3HW, tile=_cells(tile_px, cell), unit_in=cell, unit_out=1)
    return latents * vae.config.scaling_factor


def encoded_latents(encoded: Any) -> Tensor:
    """The unscaled latents of what a diffusers autoencoder's `encode` returned: the mode where it is a posterior."""
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents


@torch.no_grad()
def decode_tiled(vae: Any, latents_B4hw: Tensor, *, tile_px: int = 1024) -> Tensor:
    """Pictures (B, 3, 8h, 8w), about [−1, 1], of scaled latents; `vae` and `tile_px` as in `encode_tiled`.

    Raises:
        SettingsError: `tile_px` is below one latent cell.
    """

    def decode(z: Tensor) -> Tensor:
        image: Tensor = vae.decode(z).sample
        return image

    cell = _pixels_per_cell(vae)
    z = latents_B4hw / vae.config.scaling_factor
    return _run_tiled(vae, decode, z, tile=_cells(tile_px, cell), unit_in=1, unit_out=cell)


def _pixels_per_cell(vae: Any) -> int:
    if hasattr(vae, "pixels_per_cell"):
        return int(vae.pixels_per_cell)
    channels = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(channels) - 1))


def _cells(tile_px: int, cell: int) -> int:
    if tile_px < cell:
        raise SettingsError(f"The VAE tile must be at least {cell} pixels, not {tile_px}.")
    return tile_px // cell


def _run_tiled(vae: nn.Module, net: _Net, x: Tensor, *, tile: int, unit_in: int, unit_out: int) -> Tensor:
    """`net(x)` tile by tile; lengths in latent cells of `unit_in` elements of `x` and `unit_out` of the output."""
    rows, columns = (_spans(side // unit_in, tile) for side in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return net(x)
    boxes = [_Box(row, column) for row in rows for column in columns]
    layout = _Layout(
        height=x.shape[-2] // unit_in,
        width=x.shape[-1] // unit_in,
        unit_in=unit_in,
        unit_out=unit_out,
        margin=_context(vae, net, x, unit_in),
        fade=min(_CROSSFADE_CELLS, *(side.length // 2 for box in boxes for side in box)) if _has_norms(vae) else 0,
    )

    def measure() -> None:
        for box in boxes:
            net(box.crop(x, unit_in))

    with _shared_norms(vae, measure):
        return _assemble(net, x, boxes, layout)


def _has_norms(vae: nn.Module) -> bool:
    return any(isinstance(module, nn.GroupNorm) for module in vae.modules())


class _Span(NamedTuple):
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def grown(self, margin: int, size: int) -> _Span:
        return _Span(max(self.start - margin, 0), min(self.stop + margin, size))


class _Box(NamedTuple):
    rows: _Span
    columns: _Span

    def crop(self, x: Tensor, unit: int) -> Tensor:
        (top, bottom), (left, right) = self.rows, self.columns
        return x[..., top * unit : bottom * unit, left * unit : right * unit]

    def grown(self, margin: int, height: int, width: int) -> _Box:
        return _Box(self.rows.grown(margin, height), self.columns.grown(margin, width))

    def relative_to(self, other: _Box) -> _Box:
        dy, dx = other.rows.start, other.columns.start
        return _Box(
            _Span(self.rows.start - dy, self.rows.stop - dy), _Span(self.columns.start - dx, self.columns.stop - dx)
        )


def _spans(size: int, tile: int) -> list[_Span]:
    """`size` cut into as few parts as fit into `tile`, of nearly equal length."""
    parts = -(-size // tile)
    edges = [size * i // parts for i in range(parts + 1)]
    return [_Span(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """How tiles make up the output; lengths in latent cells, units in elements per cell."""

    height: int
    width: int
    unit_in: int
    unit_out: int
    margin: int
    """Surrounding that is computed and cut off."""
    fade: int
    """Tiles are crossfaded over this much on either side of their common edge."""

    def grow(self, box: _Box, margin: int) -> _Box:
        return box.grown(margin, self.height, self.width)

    def weights(self, box: _Box, like: Tensor) -> Tensor:
        """Crossfade weights of `box` grown by `fade`; those of all boxes add up to 1 everywhere."""
        down = self._ramps(box.rows, self.height, like)
        return down[:, None] * self._ramps(box.columns, self.width, like)

    def _ramps(self, span: _Span, size: int, like: Tensor) -> Tensor:
        cells = torch.ones(span.grown(self.fade, size).length * self.unit_out, device=like.device, dtype=like.dtype)
        length = 2 * self.fade * self.unit_out
        rising = ((torch.arange(length) + 0.5) / max(length, 1)).to(cells)
        if span.start > 0:
            cells[:length] = rising
        if span.stop < size:
            cells[len(cells) - length :] = 1 - rising
        return cells


def _assemble(net: _Net, x: Tensor, boxes: list[_Box], layout: _Layout) -> Tensor:
    result: Tensor | None = None
    for box in boxes:
        kept = layout.grow(box, layout.fade)
        seen = layout.grow(kept, layout.margin)
        part = kept.relative_to(seen).crop(net(seen.crop(x, layout.unit_in)), layout.unit_out)
        if result is None:
            size = (layout.height * layout.unit_out, layout.width * layout.unit_out)
            result = part.new_zeros(*part.shape[:2], *size)
        kept.crop(result, layout.unit_out).add_(part * layout.weights(box, part))
    assert result is not None  # there is at least one box
    return result


def _context(vae: nn.Module, net: _Net, x: Tensor, unit_in: int) -> int:
    """How far, in latent cells, the convolutions of `net` see to one side: measured on a small probe.

    A convolution of kernel k working at 1/s of the probe's resolution sees s·(k // 2) elements further.
    """
    probe = x.new_zeros(1, x.shape[1], _PROBE_CELLS * unit_in, _PROBE_CELLS * unit_in)
    reach = 0.0

    def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal reach
        assert isinstance(module, nn.Conv2d)
        reach += module.kernel_size[0] // 2 * module.dilation[0] * probe.shape[-1] / args[0].shape[-1]

    with _hooks(vae, nn.Conv2d, lambda conv: conv.register_forward_pre_hook(measure)):
        net(probe)
    return int(-(-reach // unit_in))


@dataclass(slots=True)
class _Moments:
    """Running mean and mean square of each group of a group norm, (B, groups, 1).

    In float64, and therefore on the CPU: not every device has it (Apple's MPS).
    """

    count: int = 0
    total: Tensor | float = 0.0
    total_square: Tensor | float = 0.0

    def add(self, groups_BGN: Tensor) -> None:
        size = groups_BGN.shape[-1]
        variance, mean = (m.cpu().double() for m in torch.var_mean(groups_BGN, dim=-1, keepdim=True, correction=0))
        self.count += size
        self.total = self.total + size * mean
        self.total_square = self.total_square + size * (variance + mean**2)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.total) / self.count
        return mean, torch.as_tensor(self.total_square) / self.count - mean**2


@contextmanager
def _shared_norms(vae: nn.Module, run_all_tiles: Callable[[], None]) -> Iterator[None]:
    """Inside, every group norm uses its statistics over all tiles, measured by `run_all_tiles`."""
    moments: dict[nn.Module, _Moments] = {}

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        moments.setdefault(norm, _Moments()).add(_groups(norm, args[0]))

    def normalise(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _normalise(norm, args[0], moments[norm]).to(output.dtype)

    if _has_norms(vae):
        with _hooks(vae, nn.GroupNorm, lambda norm: norm.register_forward_pre_hook(measure)):
            run_all_tiles()
    with _hooks(vae, nn.GroupNorm, lambda norm: norm.register_forward_hook(normalise)):
        yield


def _groups(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    return x.float().reshape(len(x), norm.num_groups, -1)


def _normalise(norm: nn.Module, x: Tensor, moments: _Moments) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    mean, variance = moments.mean_and_variance()
    mean, scale = (value.float().to(x.device) for value in (mean, (variance + norm.eps).rsqrt()))
    normal = (_groups(norm, x) - mean) * scale
    per_channel = (1, -1, *([1] * (x.ndim - 2)))
    weight, bias = (parameter.to(x.device).float().view(per_channel) for parameter in (norm.weight, norm.bias))
    return normal.reshape(x.shape) * weight + bias


@contextmanager
def _hooks(vae: nn.Module, kind: type[nn.Module], register: Callable[[Any], Any]) -> Iterator[None]:
    handles = [register(module) for module in vae.modules() if isinstance(module, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

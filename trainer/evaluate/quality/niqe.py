"""NIQE, how far a picture's statistics are from those of natural pictures (Mittal et al. 2013); lower is better.

Every step follows the authors' published code: locally normalised luma at two scales, 18 parameters of generalised
Gaussians per scale and block, then the distance of the blocks' mean and covariance to those of pristine photos.
Shape letters: N blocks, P pixels of a block. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 96
FEATURES = 36
MIN_BLOCKS = 2
_SCALES = (1, 2)
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
_RESIZE_MARGIN = 8
_STRIP_PIXELS = 1 << 20
_ROUNDING_NOISE = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NiqeModel:
    """The statistics of pristine photos."""

    mean: Tensor
    """Mean of the features, (36,) float64."""
    covariance: Tensor
    """Covariance of the features, (36, 36) float64."""
    window: Tensor
    """(7, 7) float64, sum 1: the weights of the local mean and deviation."""


Rows = Callable[[int, int], Tensor]
"""Gives rows [start, stop) of a luma in levels 0 … 255, as wide as the picture."""


def niqe(luma_HW: Tensor, model: NiqeModel) -> float | None:
    """NIQE of a luma in levels 0 … 255, rounded to whole levels first.

    The picture is cut to whole blocks of 96² from its top left corner. None where fewer than two blocks with any
    texture remain: their covariance does not exist.
    """
    return niqe_of_rows(lambda start, stop: luma_HW[start:stop], luma_HW.shape, model)


def niqe_of_rows(rows: Rows, shape: Sequence[int], model: NiqeModel) -> float | None:
    """`niqe` of a picture of `shape` (H, W) that is asked for strip by strip, so that memory does not grow with it."""
    height, width = (side // BLOCK * BLOCK for side in shape)
    if height * width < MIN_BLOCKS * BLOCK**2:
        return None

    def luma(start: int, stop: int) -> Tensor:
        return rows(start, stop)[:, :width].double().round()

    step = max(_STRIP_PIXELS // (BLOCK * width), 1) * BLOCK
    tops = range(0, height, step)
    features = torch.cat([_strip(luma, height, top, min(top + step, height), model.window) for top in tops])
    complete = features[~features.isnan().any(1)]
    if len(complete) < MIN_BLOCKS:
        return None
    difference = model.mean - features.nanmean(0)
    spread = torch.linalg.pinv((model.covariance + complete.T.cov()) / 2)
    return float((difference @ spread @ difference).sqrt())


def _strip(luma: Rows, height: int, top: int, bottom: int, window: Tensor) -> Tensor:
    """The 36 parameters of the blocks in rows [top, bottom), (N, 36)."""
    reach = window.shape[0] // 2
    scales = []
    for scale in _SCALES:
        inner = range(top // scale, bottom // scale)
        first, last = max(inner.start - reach, 0), min(inner.stop + reach, height // scale)
        normalized = _normalized(_at_scale(luma, height, first, last, scale), window)
        scales.append(_features(normalized[inner.start - first : inner.stop - first], BLOCK // scale))
    return torch.cat(scales, dim=1)


def _at_scale(luma: Rows, height: int, first: int, last: int, scale: int) -> Tensor:
    """Rows [first, last) of the luma shrunk by `scale` as the authors' environment does: antialiased bicubic over
    mirrored borders."""
    if scale == 1:
        return luma(first, last)
    margin = _RESIZE_MARGIN * scale
    tall = _mirrored_rows(luma, height, first * scale - margin, last * scale + margin)
    wide = torch.cat([tall[:, :margin].flip(1), tall, tall[:, -margin:].flip(1)], dim=1)
    shrunk = F.interpolate(wide[None, None], scale_factor=1 / scale, mode="bicubic", antialias=True)
    return shrunk[0, 0, _RESIZE_MARGIN:-_RESIZE_MARGIN, _RESIZE_MARGIN:-_RESIZE_MARGIN]


def _mirrored_rows(luma: Rows, height: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop); beyond the picture they repeat it backwards, edge first (torch's "reflect" leaves it out)."""
    parts = [luma(max(start, 0), min(stop, height))]
    if start < 0:
        parts.insert(0, luma(0, -start).flip(0))
    if stop > height:
        parts.append(luma(2 * height - stop, height).flip(0))
    return torch.cat(parts)


def _features(normalized_HW: Tensor, side: int) -> Tensor:
    """The 18 parameters of every block, (N, 18)."""
    blocks = normalized_HW.unfold(0, side, side).unfold(1, side, side).reshape(-1, side, side)
    columns = list(_own_shape(blocks.flatten(1)))
    for shift in _SHIFTS:
        columns += _product_shape((blocks * blocks.roll(shift, dims=(1, 2))).flatten(1))
    return torch.stack(columns, dim=1)


def _normalized(luma_HW: Tensor, window: Tensor) -> Tensor:
    """(luma − local mean) / (local deviation + 1), borders repeated.

    Where the picture is perfectly flat, rounding noise would decide on which side of zero a pixel counts, so that
    implementations and processors disagree by some hundredths; here such a pixel is zero.
    """
    reach = window.shape[0] // 2
    maps = torch.stack([luma_HW, luma_HW.square()])[:, None]
    mean, square = F.conv2d(F.pad(maps, (reach,) * 4, mode="replicate"), window[None, None])[:, 0]
    deviation = (square - mean.square()).abs().sqrt()
    normalized = (luma_HW - mean) / (deviation + 1)
    return torch.where(normalized.abs() < _ROUNDING_NOISE, 0.0, normalized)


def _own_shape(x_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and mean scale of the blocks' values."""
    shape, left, right = _fit(x_NP)
    return shape, (left + right) / 2


def _product_shape(x_NP: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean and both scales of the products of neighbours."""
    shape, left, right = _fit(x_NP)
    mean = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
    return shape, mean, left, right


def _fit(x_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian by moments: shape, left and right scale, each (N,).

    A block with an empty side has NaN as that scale and the smallest shape, as in the published code.
    """
    left, right = _one_sided_deviation(x_NP, x_NP < 0), _one_sided_deviation(x_NP, x_NP > 0)
    balance = left / right
    ratio = x_NP.abs().mean(1).square() / x_NP.square().mean(1)
    ratio = ratio * (balance**3 + 1) * (balance + 1) / (balance**2 + 1).square()
    shape = _nearest_shape(ratio)
    spread = torch.exp(0.5 * (torch.lgamma(1 / shape) - torch.lgamma(3 / shape)))
    return shape, left * spread, right * spread


def _nearest_shape(ratio_N: Tensor) -> Tensor:
    """The shape whose ratio is nearest; the ratios grow with the shape, so two neighbours are all that can be."""
    shapes, ratios = _shape_table()
    above = torch.searchsorted(ratios, ratio_N.nan_to_num()).clamp(1, len(ratios) - 1)
    lower_is_nearer = (ratio_N - ratios[above - 1]) <= (ratios[above] - ratio_N)
    return torch.where(ratio_N.isnan(), shapes[0], torch.where(lower_is_nearer, shapes[above - 1], shapes[above]))


def _one_sided_deviation(x_NP: Tensor, side_NP: Tensor) -> Tensor:
    return ((x_NP.square() * side_NP).sum(1) / side_NP.sum(1)).sqrt()


@lru_cache(maxsize=1)
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shapes 0.2 … 10 and their ratio Γ(2/α)² / (Γ(1/α) Γ(3/α))."""
    shapes = torch.arange(200, 10001, dtype=torch.float64) / 1000
    log_ratio = 2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)
    return shapes, log_ratio.exp()

"""Words that act where they belong: masks per tag, and the attention bias that they become.

Shape letters: B pictures, N masks, H W pixels of a mask, h w latent cells (or cells of a feature map), L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dape.vocabulary import SEPARATOR
from ..errors import SettingsError
from ..tiling.grid import Tile

FLOOR = 1e-6
"""Attention of a word where its mask is 0, in shares of what it has where the mask is 1; log of it is finite in half
precision."""
EVERYWHERE = 0
"""Number of a token that belongs to no mask; mask n has the number n + 1."""

_BRACKETS = {")": "(", "]": "[", "}": "{", "）": "（"}
_COMMAS = ",，"
_RANGE = 1e-3


def check_masks(masks: Tensor, name: str = "masks") -> Tensor:
    """Masks as (N, H, W) float32 in [0, 1]; a single one may come as (H, W).

    Raises:
        SettingsError: another layout (such as a colour picture), no cells, NaN, or values outside 0 … 1.
    """
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or 0 in masks.shape:
        raise SettingsError(
            f"Expected {name} of shape (number, height, width), found {tuple(masks.shape)}; turn a picture into a mask "
            "first (Convert Image to Mask)."
        )
    values = masks.float()
    low, high = (float(value) for value in values.aminmax())
    if not (low >= -_RANGE and high <= 1 + _RANGE):  # NaN compares false
        found = "values that are no numbers (NaN)" if low != low or high != high else f"{low:g} to {high:g}"
        raise SettingsError(
            f"Expected {name} with values from 0 to 1, found {found}; look for the node that made them."
        )
    return values.clamp(0, 1)


def fit_masks(masks_NHW: Tensor, height: int, width: int) -> Tensor:
    """Masks for `height` × `width` cells, (N, h, w): averaged over each cell, or interpolated where they are smaller.

    A mask is stretched over the whole of the picture whatever its own size; one of ones stays one exactly.
    """
    if masks_NHW.shape[-2:] == (height, width):
        return masks_NHW
    larger = masks_NHW.shape[-2] >= height and masks_NHW.shape[-1] >= width
    way: dict[str, Any] = {"mode": "area"} if larger else {"mode": "bilinear", "align_corners": False}
    fitted = F.interpolate(masks_NHW[None], (height, width), **way)[0]
    # Weights that sum to 1 do so up to rounding only.
    return torch.where(fitted > 1 - 1e-6, 1.0, fitted.clamp(0, 1))


def guidance_share(masks_NHW: Tensor, height: int, width: int, *, outside: float, feather: float) -> Tensor:
    """How much of the guidance each latent cell gets, (1, 1, h, w) in [0, 1]: 1 in any of the masks.

    Args:
        masks_NHW: values in [0, 1]; the largest counts.
        height: rows of the latent.
        width: columns of the latent.
        outside: share of the guidance where no mask is.
        feather: width of the soft edge in latent cells: the deviation of the Gaussian is half of it.
    """
    share = fit_masks(masks_NHW.amax(0, keepdim=True), height, width)[None]
    if feather > 0 and share.min() < share.max():
        from kornia.filters import gaussian_blur2d

        deviation = feather / 2
        side = 2 * min(max(1, round(3 * deviation)), min(height, width) - 1) + 1
        share = gaussian_blur2d(share, (side, side), (deviation, deviation)) if side > 1 else share
    return outside + (1 - outside) * share.clamp(0, 1)


def tag_spans(text: str) -> list[tuple[int, int]]:
    """Where the tags of a comma-separated text stand: first and last + 1 sign of each.

    A comma inside brackets, as in "cat (small, grey)", is part of its tag; empty tags are passed over.
    """
    edges, waiting = [-1], list[str]()
    for place, sign in enumerate(text):
        if sign in _BRACKETS.values():
            waiting.append(sign)
        elif waiting and _BRACKETS.get(sign) == waiting[-1]:
            waiting.pop()
        elif sign in _COMMAS and not waiting:
            edges.append(place)
    spans = []
    for before, after in pairwise([*edges, len(text)]):
        part = text[before + 1 : after]
        start = before + 1 + len(part) - len(part.lstrip())
        if part.strip():
            spans.append((start, start + len(part.strip())))
    return spans


def joined_spans(tags: Sequence[str]) -> list[tuple[int, int]]:
    """The same for a text that begins with `tags` as they are joined in a prompt, whatever signs they hold."""
    spans, start = list[tuple[int, int]](), 0
    for tag in tags:
        spans.append((start, start + len(tag)))
        start += len(tag) + len(SEPARATOR)
    return spans


def number_tokens(text: str, spans: Sequence[tuple[int, int]], count_tokens: Callable[[str], int]) -> list[int]:
    """For each token of a text the number of the tag it belongs to, from 1 on, or `EVERYWHERE`.

    Args:
        text: the whole prompt.
        spans: where the tags stand in it, see `tag_spans`.
        count_tokens: how many tokens a text has, start and end not counted; the beginning of a text, up to the end of
            a word, has the first of its tokens.
    """
    numbers = [EVERYWHERE] * count_tokens(text)
    for number, (start, end) in enumerate(spans, EVERYWHERE + 1):
        first, last = count_tokens(text[:start]), count_tokens(text[:end])
        numbers[first:last] = [number] * (last - first)
    return numbers


def attention_bias(masks_BNhw: Tensor, numbers_BL: Tensor, strength: float | Tensor) -> Tensor:
    """What is added to the text attention's logits, (B, h · w, L): strength · log(mask), 0 for words without a mask.

    So the attention that a cell pays to a word is multiplied by mask^strength before all are normalised.

    Args:
        masks_BNhw: in [0, 1], taken as at least `FLOOR`.
        numbers_BL: for each token `EVERYWHERE` or the number of its mask, from 1 on.
        strength: one for all or one for each picture (B,); 0 changes nothing.
    """
    factor = strength.view(-1, 1, 1) if isinstance(strength, Tensor) else strength
    logs = masks_BNhw.float().clamp_min(FLOOR).log().flatten(2) * factor
    logs = torch.cat([torch.zeros_like(logs[:, :1]), logs], dim=1)
    numbers = numbers_BL.to(logs.device)[..., None].expand(-1, -1, logs.shape[-1])
    return logs.gather(1, numbers).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Which words act where, of B pictures."""

    masks: Tensor
    """(B, N, h, w) in [0, 1], of latent cells; a picture with fewer masks has ones in the rest."""
    numbers: Tensor
    """(B, L) int64: for each text token `EVERYWHERE` or the number of its mask, from 1 on."""
    strength: float | Tensor = 1.0
    """One for all or one for each picture (B,); 0 gives the plain prompt."""

    @cached_property
    def acts(self) -> bool:
        """Whether anything is changed: some bound word has a mask below 1."""
        bound = (self.numbers != EVERYWHERE).any()
        strong = torch.as_tensor(self.strength != 0).any()
        return bool(strong) and bool(bound) and bool((self.masks < 1).any())

    @cached_property
    def _biases(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def bias(self, height: int, width: int) -> Tensor:
        """The bias (B, height · width, L) for a feature map of this size, computed once."""
        if (height, width) not in self._biases:
            batch, count = self.masks.shape[:2]
            fitted = fit_masks(self.masks.flatten(0, 1).float(), height, width).unflatten(0, (batch, count))
            self._biases[height, width] = attention_bias(fitted, self.numbers, self.strength)
        return self._biases[height, width]

    def crop(self, tiles: Sequence[Tile]) -> Regions:
        """The same for tiles of the latents, stacked tile-major: (T · B) pictures."""
        masks = torch.cat([tile.crop(self.masks) for tile in tiles])
        return replace(self, masks=masks, numbers=self.numbers.repeat(len(tiles), 1))

    def beside(self, others: int) -> Regions:
        """The same after `others` pictures whose words act everywhere (the negative half of a guided batch)."""
        masks = torch.cat([self.masks.new_ones(others, *self.masks.shape[1:]), self.masks])
        numbers = torch.cat([self.numbers.new_zeros(others, self.numbers.shape[1]), self.numbers])
        return replace(self, masks=masks, numbers=numbers)

    def to(self, device: torch.device) -> Regions:
        """On another device."""
        return replace(self, masks=self.masks.to(device), numbers=self.numbers.to(device))

"""Where in a photo the tagger sees a tag: its head, asked about one part of the photo after the other.

Shape letters: N tags, G side of the grid of image tokens, W tokens of a window, L = 1 + G² image tokens, D their width,
H W rows and columns of the photo.

The head weighs the image tokens by attention before it decides. Here it decides from the tokens of one window alone:
a window's own mean stands in for the photo's, as the head was trained with. What a tag's logit rises by where the
window lies tells where the tag is; no second pass of the encoder, and nothing is computed unless maps are asked for.
The head's attention itself is a poorer guide (`trainer.evaluate.grounding` measures both): it falls on whatever tells
tags apart, and the mean token takes most of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import ImageError, SettingsError
from .model import DAPE
from .preprocess import tagger_input
from .vocabulary import Tag

Method = Literal["windows", "attention", "gradient"]
METHODS: tuple[Method, ...] = ("windows", "attention", "gradient")

WINDOWS = (3, 5)
"""Sides of the windows in tokens; their logits are averaged. Chosen on the small tagger's training photos."""
_LEAST = 1e-6


@torch.no_grad()
def ground(dape: DAPE, photo: Tensor, tags: Iterable[Tag | int], *, method: Method = "windows") -> Tensor:
    """Maps (N, H, W) of where `tags` are in a photo, float32 on the CPU, each from 0 to 1.

    Args:
        dape: the tagger.
        photo: (3, H, W) or (1, 3, H, W), RGB in [0, 1], at its own size.
        tags: as the vocabulary selects them, or their places in it.
        method: "windows"; "attention" and "gradient" are the head's own attention, for comparison.

    Raises:
        ImageError: not one picture. SettingsError: an unknown tag or method.
    """
    picture = photo[None] if photo.ndim == 3 else photo
    if picture.ndim != 4 or len(picture) != 1:
        raise ImageError(f"Tags are grounded in one photo (3, height, width) at a time; found {tuple(photo.shape)}.")
    weight = dape.label_embed
    inputs = tagger_input(picture.float(), dape.config.image_size).to(weight)
    maps = ground_tokens(dape, dape.encode_image(inputs), [_place(tag) for tag in tags], method=method)
    return enlarge(maps, *picture.shape[-2:])


def _place(tag: Tag | int) -> int:
    return tag.index if isinstance(tag, Tag) else tag


@torch.no_grad()
def ground_tokens(dape: DAPE, tokens_1LD: Tensor, tags: Sequence[int], *, method: Method = "windows") -> Tensor:
    """Coarse maps (N, G, G), float32, each from 0 to 1, of a photo whose soft prompt is known already.

    Raises:
        SettingsError: an unknown tag or method, or tokens of several photos or another tagger.
    """
    if tokens_1LD.shape != (1, dape.config.tokens, dape.config.token_width):
        raise SettingsError(
            f"Expected one photo's soft prompt of shape (1, {dape.config.tokens}, {dape.config.token_width}), found "
            f"{tuple(tokens_1LD.shape)}; ground with the tagger that read the photo."
        )
    if method not in METHODS:
        raise SettingsError(f"Unknown method of grounding {method!r}: choose one of {', '.join(METHODS)}.")
    if unknown := [tag for tag in tags if not 0 <= tag < dape.config.num_tags]:
        raise SettingsError(f"The tagger knows the tags 0 to {dape.config.num_tags - 1}; found {unknown}.")
    side = dape.config.grid
    if not tags:
        return torch.zeros(0, side, side)
    evidence = {"windows": _by_windows, "attention": _by_attention, "gradient": _by_gradient}[method]
    return _from_0_to_1(rearrange(evidence(dape, tokens_1LD, tags).float().cpu(), "n (h w) -> n h w", h=side))


def _from_0_to_1(maps_NGG: Tensor) -> Tensor:
    """What lies above a map's own mean, its highest place 1; a map without any difference is 1 everywhere."""
    risen = (maps_NGG - maps_NGG.mean((1, 2), keepdim=True)).clamp_min(0)
    highest = risen.amax((1, 2), keepdim=True)
    return torch.where(highest > _LEAST, risen / highest.clamp_min(_LEAST), torch.ones_like(risen))


def enlarge(maps_NGG: Tensor, height: int, width: int) -> Tensor:
    """Coarse maps at a photo's size, (N, height, width): bicubic, within 0 … 1."""
    if not len(maps_NGG):
        return maps_NGG.new_zeros(0, height, width)
    return F.interpolate(maps_NGG[None], (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)


def _by_windows(dape: DAPE, tokens_1LD: Tensor, tags: Sequence[int]) -> Tensor:
    """(N, G²): a tag's logit from the window around each place alone, mean over the sizes of windows."""
    logits = [dape.tag_logits(windows(tokens_1LD[0, 1:], size), tags) for size in WINDOWS]
    return torch.stack(logits).mean(0).T


def windows(tokens_ND: Tensor, size: int) -> Tensor:
    """Image tokens without their mean, (G², D), as one picture for each place: (G², 1 + W, D), the window's mean first.

    Windows of `size`² tokens reach over the border by repeating it.
    """
    side = round(len(tokens_ND) ** 0.5)
    grid_1DGG = rearrange(tokens_ND, "(h w) d -> 1 d h w", h=side)
    padded = F.pad(grid_1DGG, (size // 2,) * 4, mode="replicate")
    parts = rearrange(F.unfold(padded, size), "1 (d w) n -> n w d", w=size * size)
    return torch.cat([parts.mean(1, keepdim=True), parts], 1)


def _by_attention(dape: DAPE, tokens_1LD: Tensor, tags: Sequence[int]) -> Tensor:
    """(N, G²): the last layer's attention, mean over heads, over its mean for these tags."""
    shares = dape.tag_attention(tokens_1LD, tags)[-1, 0].mean(0)[:, 1:]
    return shares / shares.mean(0, keepdim=True).clamp_min(_LEAST)


def _by_gradient(dape: DAPE, tokens_1LD: Tensor, tags: Sequence[int]) -> Tensor:
    """(N, G²): the image tokens by the rising gradient of the tag's logit, as Grad-CAM weighs features."""
    with torch.enable_grad():
        tokens = tokens_1LD.detach().requires_grad_(True)
        logits = dape.tag_logits(tokens, tags)[0]
        grads = [torch.autograd.grad(logit, tokens, retain_graph=True)[0] for logit in logits]
    return torch.stack([(grad * tokens_1LD)[0, 1:].sum(-1) for grad in grads])

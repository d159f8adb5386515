"""CONDITIONINGs of several photos joined to one, so that the host samples them as one batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...seesr_core.errors import SettingsError
from .local import TEXT, join_tile_texts
from .regions import KEY as REGIONS
from .regions import join_regions

Conditioning = list[list[Any]]
"""The host's: entries `[tokens (B, L, D), extras]`."""


def join_conditioning(given: list[Conditioning], *, photos: int, width: int, name: str) -> Conditioning:
    """One conditioning from one for all photos (given back as it is) or one per photo.

    Args:
        given: the conditionings.
        photos: how many photos there are.
        width: the U-Net's text width.
        name: `positive` or `negative`, for messages.

    Raises:
        SettingsError: another number than one or `photos`, another text width, or prompts too different to join.
    """
    for tokens, _ in (entry for conditioning in given for entry in conditioning):
        if tokens.shape[-1] != width:
            raise SettingsError(
                f"{name} comes from a text encoder of width {tokens.shape[-1]}, but the SeeSR model's base has width "
                f"{width}; encode it with the CLIP of the same checkpoint as MODEL."
            )
    if len(given) == 1:
        return given[0]
    if len(given) != photos:
        raise SettingsError(
            f"SeeSR Apply got {len(given)} {name} prompts for {photos} prepared images; expected one for all, or one "
            "each."
        )
    if len({len(conditioning) for conditioning in given}) > 1:
        raise SettingsError(
            f"The {name} prompts of the photos have different numbers of parts, so they make no batch; expected the "
            "same parts (areas, combined prompts) for every photo."
        )
    return [_join_entries(list(entries), name) for entries in zip(*given, strict=True)]


def _join_entries(entries: list[list[Any]], name: str) -> list[Any]:
    """One batched entry; what cannot be batched must be the same for all."""
    extras = [entry[1] for entry in entries]
    joined = {**extras[0]}
    for key in {key for extra in extras for key in extra}:
        values = [extra.get(key) for extra in extras]
        if key in (REGIONS, TEXT):
            continue
        if key == "pooled_output" and all(isinstance(value, Tensor) for value in values):
            joined[key] = torch.cat(values)
        elif not all(_same(value, values[0]) for value in values):
            raise SettingsError(
                f"The {name} prompts of the photos differ in {key!r}, so they make no batch; set it once, after SeeSR "
                "Apply, or run the photos one at a time."
            )
    tokens = join_tokens([entry[0] for entry in entries])
    if regions := join_regions(entries, tokens.shape[1]):
        joined[REGIONS] = regions
    if texts := join_tile_texts(entries, tokens.shape[1], name):
        joined[TEXT] = texts
    return [tokens, joined]


def join_tokens(tokens: list[Tensor]) -> Tensor:
    """Texts (1, L, D) of different lengths as a batch, each repeated to a common length as the host itself does:
    attention over repeated tokens is the same attention."""
    length = math.lcm(*(text.shape[1] for text in tokens))
    return torch.cat([text.repeat(1, length // text.shape[1], 1) for text in tokens])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    # A ControlNet or hook is the same only if it is the same object, which is what equality means for it.
    return type(a) is type(b) and bool(a == b)

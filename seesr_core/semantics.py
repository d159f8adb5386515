"""Semantics in their places: what of a photo's prompts acts where in its latent.

Grounded tags become regions of the prompt and the share of the guidance; every tile of a large result can read its own
part of the photo. Everything here is made once for a run, before sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image
from torch import Tensor

from .dape import Tag, tagger_input
from .dape.grounding import ground
from .method.regions import Regions, fit_masks, guidance_share, joined_spans, number_tokens
from .method.text import compose_prompt, count_tokens, encode_prompts, text_length
from .models import Models
from .pictures.sizes import to_tensor
from .settings import UpscaleSettings
from .tiling.grid import PIXELS_PER_CELL, Tile, lay_out
from .tiling.prompts import TilePrompts, photo_part, with_global

log = logging.getLogger(__name__)

FEATHER = 2.0
"""Width of the soft edge of the guided part in latent cells: 16 pixels."""
_TILES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Semantics:
    """What acts where; nothing of it is the plain run."""

    regions: Regions | None = None
    """Where the words of the tags act."""
    share: Tensor | None = None
    """Share of the guidance of each latent cell, (B, 1, h, w)."""
    text: TilePrompts | None = None
    """Text states for each tile."""
    soft: TilePrompts | None = None
    """Soft prompts for each tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticsReader:
    """Reads the semantics of a batch of photos of one size."""

    models: Models
    """Tagger, tokenizer and text encoder are used."""
    settings: UpscaleSettings
    """What is asked for."""
    photos: Sequence[Image.Image]
    """At their own size."""
    tags: Sequence[Sequence[Tag]]
    """Of each photo, as far as they go into its prompt."""
    texts: Sequence[str]
    """The prompt of each photo."""
    soft_prompt: Tensor | None
    """Soft prompts (B, L, D)."""
    size: tuple[int, int]
    """Rows and columns of the latent."""

    @torch.no_grad()
    def read(self) -> Semantics:
        """All that the settings ask for and that changes anything."""
        masks = self._masks() if self._grounds() else []
        text, soft = self._local()
        return Semantics(regions=self._regions(masks), share=self._share(masks), text=text, soft=soft)

    def _grounds(self) -> bool:
        guides = self.settings.spatial_cfg == "auto"
        if guides and self.settings.cfg <= 1:
            log.warning("spatial guidance does nothing at cfg %g: there is no guidance to place", self.settings.cfg)
        return self.settings.region_strength > 0 or (guides and self.settings.cfg > 1)

    def _masks(self) -> list[Tensor]:
        """For each photo where its tags are, (N, H, W)."""
        return [
            ground(self.models.dape, to_tensor(photo).to(self.models.device), tags)
            for photo, tags in zip(self.photos, self.tags, strict=True)
        ]

    def _share(self, masks: Sequence[Tensor]) -> Tensor | None:
        """Guidance where any tag is; a photo without tags is guided everywhere."""
        if not masks or self.settings.spatial_cfg == "off":
            return None
        return torch.cat(
            [
                guidance_share(own, *self.size, outside=0.0, feather=FEATHER)
                if len(own)
                else torch.ones(1, 1, *self.size)
                for own in masks
            ]
        )

    def _regions(self, masks: Sequence[Tensor]) -> Regions | None:
        if not masks or self.settings.region_strength == 0:
            return None
        fitted = torch.ones(len(masks), max(map(len, masks)), *self.size)
        for row, own in zip(fitted, masks, strict=True):
            if len(own):
                row[: len(own)] = fit_masks(own, *self.size)
        numbers = torch.stack([self._numbers(*pair) for pair in zip(self.texts, self.tags, strict=True)])
        regions = Regions(masks=fitted, numbers=numbers, strength=self.settings.region_strength)
        return regions if regions.acts else None

    def _numbers(self, text: str, tags: Sequence[Tag]) -> Tensor:
        """Which tag each text token belongs to, (L,); what the encoder cuts off is left out."""
        length = text_length(self.models.tokenizer, self.models.text_encoder)
        spans = joined_spans([tag.name for tag in tags])
        inner = number_tokens(text, spans, lambda part: count_tokens(part, self.models.tokenizer))[: length - 2]
        return torch.tensor([0, *inner, *[0] * (length - 1 - len(inner))])

    def _local(self) -> tuple[TilePrompts | None, TilePrompts | None]:
        """Text states and soft prompts for each tile; None where the whole photo's are to be used."""
        use, (height, width) = self.settings.local_prompts, self.size
        tile, overlap = self.settings.tile // PIXELS_PER_CELL, self.settings.overlap // PIXELS_PER_CELL
        tiles = lay_out(height, width, tile, overlap, self.settings.layout)
        if use == "off" or not tiles:
            return None, None
        tokens, tags = self._read_tiles(tiles)
        text = soft = None
        if use in ("tags", "both") and self.settings.use_tags:
            text = TilePrompts(tiles=tuple(tiles), values=self._text_states(tags))
        if use in ("soft", "both") and self.soft_prompt is not None:
            whole = self.soft_prompt.expand(len(tiles), *self.soft_prompt.shape)
            soft = TilePrompts(tiles=tuple(tiles), values=torch.cat([tokens, whole], 2))
        return text, soft

    def _read_tiles(self, tiles: Sequence[Tile]) -> tuple[Tensor, list[list[Tag]]]:
        """Soft prompts (P, B, L, D) of all tiles, and the tags, tile by tile and photo by photo within."""
        dape, side = self.models.dape, self.models.dape.config.image_size
        photos = [to_tensor(photo) for photo in self.photos]
        inputs = [tagger_input(photo_part(photo, tile, *self.size), side) for tile, photo in product(tiles, photos)]
        read = [
            dape(torch.cat(inputs[i : i + _TILES_AT_ONCE]).to(self.models.device))
            for i in range(0, len(inputs), _TILES_AT_ONCE)
        ]
        tokens, logits = (torch.cat([part[which].float().cpu() for part in read]) for which in (0, 1))
        tags = self.models.vocabulary.select(logits, threshold=self.settings.threshold)
        return tokens.unflatten(0, (len(tiles), len(photos))), tags

    def _text_states(self, tags: Sequence[Sequence[Tag]]) -> Tensor:
        """Text states (P, B, L, D) of the tiles' own tags and the whole photo's; each distinct text is encoded once."""
        whole = [[tag.name for tag in own] for own in self.tags]
        names = [with_global([tag.name for tag in own], whole[i % len(whole)]) for i, own in enumerate(tags)]
        texts = [compose_prompt(own, self.settings.prompt, self.settings.added_prompt) for own in names]
        distinct = list(dict.fromkeys(texts))
        states = encode_prompts(distinct, self.models.tokenizer, self.models.text_encoder).cpu()
        return states[[distinct.index(text) for text in texts]].unflatten(0, (-1, len(whole)))

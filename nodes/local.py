"""Prompts per tile: every tile of a large result reads its own part of the photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.dape.vocabulary import SEPARATOR, split_words
from ..seesr_core.errors import SettingsError
from ..seesr_core.pictures.overlay import draw_tiles
from ..seesr_core.tiling.grid import PIXELS_PER_CELL, Tile
from ..seesr_core.tiling.prompts import TilePrompts, photo_part, with_global
from .host.conds import join_tokens
from .host.local import TEXT, TileSoftPrompt
from .host.text import encode_text
from .host.tiling.tiles import TileSettings
from .prompts import added_prompt_input, compose_text, exclude_input, photo_input, threshold_input, words_input
from .regions import as_image, as_picture
from .schema import DAPEType, SoftPromptType, channels_first, make_schema, unit_range
from .tiled import overlap_input, tile_size_input

if TYPE_CHECKING:
    from .host.dape import HostDAPE

USES = ("tags + soft prompt", "tags", "soft prompt")
"""What a tile reads for itself."""


class SeeSRTilePrompts(io.ComfyNode):
    """Both prompts, for each tile its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRTilePrompts",
            display_name="SeeSR Tile Prompts",
            description="Lets every tile of a large result read its own part of the photo: its tags, its soft prompt, "
            "or both. Connect both outputs to SeeSR Apply and sample with SeeSR Tiled Sampler or SeeSR Tile Model of "
            "the same tile size. A picture of one tile gets exactly the ordinary prompts.",
            search_aliases=["prompt per tile", "tile captions", "local prompt", "tiled tags", "seesr tile prompts"],
            inputs=[
                DAPEType.Input("dape", tooltip="The tagger, from SeeSR Load DAPE."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                photo_input(),
                io.Image.Input("prepared", tooltip="The upscaled photo, from SeeSR Prepare Image."),
                tile_size_input(
                    "Side of a tile in pixels of the result, a multiple of 8. A picture no larger than one tile is "
                    "sampled whole."
                ),
                overlap_input("Pixels that neighbouring tiles share at least, a multiple of 8, less than the tile."),
                io.Combo.Input(
                    "use",
                    options=list(USES),
                    default=USES[0],
                    tooltip="What a tile reads in its own part.",
                ),
                io.Boolean.Input(
                    "keep_global",
                    default=True,
                    tooltip="Whether every tile is also told what the whole photo shows, after its own.",
                ),
                threshold_input(),
                exclude_input(),
                words_input(),
                added_prompt_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompts, for SeeSR Apply."),
                SoftPromptType.Output(display_name="soft_prompt", tooltip="The soft prompts, for SeeSR Apply."),
                io.String.Output(
                    display_name="tags",
                    is_output_list=True,
                    tooltip="The tags of each tile, row by row, picture after picture.",
                ),
                io.Image.Output(display_name="preview", tooltip="The prepared picture with its tiles and their tags."),
            ],
        )

    @classmethod
    def execute(
        cls,
        dape: HostDAPE,
        clip: Any,
        image: Tensor,
        prepared: Tensor,
        tile_size: int,
        overlap: int,
        use: str,
        keep_global: bool,
        threshold: float,
        exclude: str,
        prompt: str,
        added_prompt: str,
    ) -> io.NodeOutput:
        """Prompts, tags and preview."""
        read = read_tiles(
            dape,
            clip,
            image,
            prepared,
            TileSettings.from_pixels(tile_size, overlap),
            use=use,
            keep_global=keep_global,
            threshold=threshold,
            exclude=exclude,
            words=(prompt, added_prompt),
        )
        return io.NodeOutput(read.positive, read.soft_prompt, read.lines, read.preview(prepared))


@dataclass(frozen=True, kw_only=True)
class TileReading:
    """What the tiles of B pictures read."""

    positive: Any
    """CONDITIONING of the batch."""
    soft_prompt: Any
    """SEESR_SOFT_PROMPT of the batch."""
    tiles: tuple[Tile, ...]
    """Row by row; a picture of one tile is one tile."""
    tags: list[list[list[str]]]
    """For each picture and tile its own tags."""

    @property
    def lines(self) -> list[str]:
        """The tags of each tile, joined, picture after picture."""
        return [SEPARATOR.join(tags) for picture in self.tags for tags in picture]

    def preview(self, prepared: Tensor) -> Tensor:
        """The pictures with frames and tags of their tiles."""
        p = PIXELS_PER_CELL
        boxes = [(p * t.x, p * t.y, p * (t.x + t.width), p * (t.y + t.height)) for t in self.tiles]
        texts = ([SEPARATOR.join(tags) for tags in picture] for picture in self.tags)
        pictures = zip(prepared, texts, strict=True)
        return torch.stack([as_image(draw_tiles(as_picture(picture), boxes, own)) for picture, own in pictures])


def read_tiles(
    dape: HostDAPE,
    clip: Any,
    image_BHWC: Tensor,
    prepared_BHWC: Tensor,
    settings: TileSettings,
    *,
    use: str = USES[0],
    keep_global: bool = True,
    threshold: float = 1.0,
    exclude: str = "",
    words: tuple[str, str] = ("", ""),
) -> TileReading:
    """The prompts of every tile that `settings` cut the prepared pictures into.

    Args:
        dape: the tagger.
        clip: the text encoder.
        image_BHWC: photos at their own size.
        prepared_BHWC: the same photos, upscaled; sides multiples of 8.
        settings: tiles of the sampler.
        use: one of `USES`.
        keep_global: whether a tile also gets what the whole photo shows.
        threshold: factor on every tag's own threshold.
        exclude: tags never to use.
        words: the user's, and those that always follow.

    Raises:
        SettingsError: photos and prepared pictures of different numbers.
    """
    if len(image_BHWC) != len(prepared_BHWC):
        raise SettingsError(
            f"SeeSR Tile Prompts got {len(image_BHWC)} photos and {len(prepared_BHWC)} prepared images; expected the "
            "same batch at both inputs."
        )
    height, width = (side // PIXELS_PER_CELL for side in prepared_BHWC.shape[1:3])
    grid = settings.grid((1, 1, height, width))
    tiles = tuple(sorted(grid)) or (Tile(0, 0, height, width),)
    photos = unit_range(channels_first(image_BHWC))
    whole = dape.read(image_BHWC)
    parts = [whole]
    if grid:
        parts = dape.read_parts([photo_part(photos, tile, height, width).movedim(1, -1) for tile in tiles])

    def names(logits_BN: Tensor) -> list[list[str]]:
        chosen = dape.vocabulary.select(logits_BN, threshold=threshold, exclude=split_words(exclude))
        return [[tag.name for tag in tags] for tags in chosen]

    own = [names(part.logits_BN) for part in parts]
    everywhere = names(whole.logits_BN)
    positive = _encode(clip, [SEPARATOR.join(tags) for tags in everywhere], words)
    soft: Any = whole.tokens_BLD
    if grid and use != "soft prompt":
        texts = [
            [SEPARATOR.join(with_global(tags, everywhere[i] if keep_global else [])) for i, tags in enumerate(tile)]
            for tile in own
        ]
        positive = _with_tiles(clip, positive, tiles, texts, words)
    if grid and use != "tags":
        values = torch.stack([part.tokens_BLD for part in parts])
        if keep_global:
            values = torch.cat([values, whole.tokens_BLD.expand(len(parts), -1, -1, -1)], 2)
        soft = TileSoftPrompt(
            tokens=whole.tokens_BLD, tiles=TilePrompts(tiles=tiles, values=values), size=(height, width)
        )
    tags = [list(picture) for picture in zip(*own, strict=True)]
    return TileReading(positive=positive, soft_prompt=soft, tiles=tiles, tags=tags)


def _encode(clip: Any, lines: Sequence[str], words: tuple[str, str]) -> Any:
    """One CONDITIONING of a batch with a text for each picture; each distinct text is encoded once."""
    encoded = {line: encode_text(clip, compose_text(line, *words)) for line in dict.fromkeys(lines)}
    entries = [encoded[line][0] for line in lines]
    if len(entries) == 1:
        return encoded[lines[0]]
    extras = {**entries[0][1]}
    if all(isinstance(own.get("pooled_output"), Tensor) for _, own in entries):
        extras["pooled_output"] = torch.cat([own["pooled_output"] for _, own in entries])
    return [[join_tokens([tokens for tokens, _ in entries]), extras]]


def _with_tiles(
    clip: Any, positive: Any, tiles: tuple[Tile, ...], lines: Sequence[Sequence[str]], words: tuple[str, str]
) -> Any:
    """`positive` with the texts of each tile, given tile by tile and picture by picture within."""
    flat = [line for tile in lines for line in tile]
    encoded = {line: encode_text(clip, compose_text(line, *words))[0][0] for line in dict.fromkeys(flat)}
    values = join_tokens([encoded[line] for line in flat]).unflatten(0, (len(tiles), -1))
    return [[tokens, {**extras, TEXT: TilePrompts(tiles=tiles, values=values)}] for tokens, extras in positive]

"""Sampling of large latents tile by tile: a sampler of our own, and a patch that makes any host sampler tiled."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.settings import UpscaleSettings
from ..seesr_core.tiling.grid import LAYOUTS, PIXELS_PER_CELL, WINDOWS, Layout, Window
from .host.sampler import sample
from .host.tiling.tiles import TileSettings, tile_model
from .schema import make_schema

MIN_TILE, MAX_TILE = 64, 65536
_PUBLISHED = UpscaleSettings()


def cfg_input(tooltip: str) -> io.Float.Input:
    """How strongly the prompt guides."""
    return io.Float.Input("cfg", default=_PUBLISHED.cfg, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


def tile_size_input(tooltip: str) -> io.Int.Input:
    """Side of a tile."""
    return _pixels_input("tile_size", _PUBLISHED.tile, MIN_TILE, MAX_TILE, tooltip)


def overlap_input(tooltip: str) -> io.Int.Input:
    """What neighbouring tiles share."""
    return _pixels_input("overlap", _PUBLISHED.overlap, 0, MAX_TILE - PIXELS_PER_CELL, tooltip)


def _pixels_input(name: str, default: int, least: int, most: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=least, max=most, step=PIXELS_PER_CELL, tooltip=tooltip)


def tile_inputs() -> list[Any]:
    """Size, overlap and number at once of the tiles."""
    return [
        tile_size_input(
            "Side of a tile in pixels of the result, a multiple of 8. A picture no larger than one tile is sampled "
            "whole."
        ),
        overlap_input("Pixels that neighbouring tiles share at least, a multiple of 8, less than the tile."),
        io.Int.Input(
            "tile_batch",
            default=0,
            min=0,
            max=64,
            tooltip="Tiles that go through the model together; 0 chooses by free memory. Halved when memory runs out.",
        ),
    ]


def window_input() -> io.Combo.Input:
    """How tiles are weighted where they overlap."""
    return io.Combo.Input(
        "window",
        options=list(WINDOWS),
        default=WINDOWS[0],
        optional=True,
        tooltip="How overlapping tiles are blended. reference: the published weights, half a cell off centre. "
        "symmetric: the same, centred both ways.",
    )


def layout_input() -> io.Combo.Input:
    """How tiles lie."""
    return io.Combo.Input(
        "layout",
        options=list(LAYOUTS),
        default=LAYOUTS[0],
        optional=True,
        tooltip="How tiles lie. published: all of tile_size, the last ones flush with the border. balanced: as many, "
        "but no larger than they must be, which is faster.",
    )


class SeeSRTiledSampler(io.ComfyNode):
    """SamplerCustomAdvanced for latents of any size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRTiledSampler",
            display_name="SeeSR Tiled Sampler",
            description="Samples large latents in overlapping tiles that are blended at every step, so that memory is "
            "bounded by the tile. Takes any SAMPLER and SIGMAS; hints of ControlNets, masks and areas follow the "
            "tiles. Picture i of a batch draws all its noise from seed + i.",
            search_aliases=["tiled sampler", "tiled diffusion", "multidiffusion", "large image", "seesr sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model, from SeeSR Apply or any other."),
                io.Conditioning.Input("positive", tooltip="What the picture shows, from SeeSR Apply."),
                io.Conditioning.Input("negative", tooltip="What guidance leads away from, from SeeSR Apply."),
                io.Noise.Input("noise", tooltip="From SeeSR Latent Init (LRE), or RandomNoise to start from noise."),
                io.Sampler.Input("sampler", tooltip="Any sampler; KSamplerSelect with ddpm is the published one."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels, from SeeSR Scheduler or another one."),
                io.Latent.Input("latent_image", tooltip="From SeeSR Latent Init. A noise mask is respected."),
                cfg_input(
                    "How strongly the prompt guides. At 1 the negative prompt is left out, which halves a step's cost."
                ),
                *tile_inputs(),
                window_input(),
                layout_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled latent."),
                io.Latent.Output(
                    display_name="denoised",
                    tooltip="The model's last estimate of the clean latent, if sigmas end early.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        noise: Any,
        sampler: Any,
        sigmas: Tensor,
        latent_image: dict[str, Any],
        cfg: float = 5.5,
        tile_size: int = 768,
        overlap: int = 32,
        tile_batch: int = 0,
        window: Window = "reference",
        layout: Layout = "published",
    ) -> io.NodeOutput:
        """Both latents."""
        tiles = TileSettings.from_pixels(tile_size, overlap, tile_batch=tile_batch, window=window, layout=layout)
        tiled = tile_model(model, tiles)
        return io.NodeOutput(*sample(tiled, positive, negative, noise, sampler, sigmas, latent_image, cfg=cfg))


class SeeSRTileModel(io.ComfyNode):
    """Tiles as a patch of the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRTileModel",
            display_name="SeeSR Tile Model",
            description="Makes any sampler work tile by tile: KSampler, SamplerCustomAdvanced and others then bound "
            "their memory by the tile. Hints of ControlNets, masks and areas follow the tiles.",
            search_aliases=["tiled model patch", "tiled diffusion", "multidiffusion", "large image", "ksampler tiled"],
            inputs=[
                io.Model.Input("model", tooltip="The model, from SeeSR Apply or any other."),
                *tile_inputs(),
                window_input(),
                layout_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, sampled in tiles.")],
        )

    @classmethod
    def execute(cls, model: Any, tile_size: int = 768, overlap: int = 32, **layout: Any) -> io.NodeOutput:
        """A patched clone of the model; older graphs lack some of the inputs of `TileSettings.from_pixels`."""
        return io.NodeOutput(tile_model(model, TileSettings.from_pixels(tile_size, overlap, **layout)))

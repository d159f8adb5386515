"""A case outside ComfyUI: the pipeline of `seesr_core`, its steps watched from outside, so that any release will do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image

from . import nets
from .case import PHASES, SAMPLE, SCALE, Case, Row
from .watch import Watch

_STEPS = {"read_prompts": "prompts", "encode_text": "prompts", **{name: name for name in PHASES[1:]}}
"""Methods of the pipeline, and the phase that each belongs to."""
_WHOLE = 65536
"""A tile that no picture exceeds."""


def measure(case: Case, watch: Watch, models: Any = None) -> Row:
    """One photo's way; `models` may be loaded already."""
    from seesr_core.pipeline import SeeSRPipeline

    pipeline = SeeSRPipeline(models=models or nets.core_models(case.net, case.dtype))
    watch.row.device = str(pipeline.models.device)
    settings = pipeline.settings(**given(case))
    pipeline.run([photo(8 if case.net == "small" else 16)], settings)  # warms up
    networks = {name: getattr(pipeline.models, name) for name in ("unet", "controlnet")}
    with watch.counting(**networks):
        if case.alone:
            _sample_alone(pipeline, case, settings, watch)
        else:
            with _watched(pipeline, watch):
                pipeline.run([photo(case.side // SCALE)], settings)
    watch.row.done = True
    watch.say()
    return watch.row


def given(case: Case) -> dict[str, Any]:
    """Settings of a case: the published sampling, whatever the model's file says."""
    given = {"steps": case.steps, "cfg": case.cfg, "start_timestep": 999, "spacing": "leading", "solver": "ddpm"}
    tile = _WHOLE if case.kind == "untiled" else case.tile
    layout = {"layout": "balanced"} if case.kind == "balanced" else {}  # which earlier releases lack
    return {**given, "color_fix": "adain", "min_size": 0, "tile": tile, "tile_batch": 1, **layout}


def photo(side: int) -> Image.Image:
    """A square of noise."""
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


def _sample_alone(pipeline: Any, case: Case, settings: Any, watch: Watch) -> None:
    z_lr, prepared, states, soft = drawn(pipeline, case)
    with watch.phase(SAMPLE):
        pipeline.sample(prepared, z_lr, states, soft, settings)


def drawn(pipeline: Any, case: Case) -> tuple[Any, Any, Any, Any]:
    """LR latents, prepared picture, text states and soft prompt that no photo is behind."""
    models, cells = pipeline.models, case.side // 8
    generator = torch.Generator().manual_seed(0)
    z_lr = torch.randn(1, models.unet.config.in_channels, cells, cells, generator=generator)
    prepared = torch.zeros(1, 3, case.side, case.side, dtype=torch.uint8)
    states = pipeline.encode_text(["dotted, noise", "clean"])
    soft = torch.randn(1, models.dape.config.tokens, models.dape.config.token_width, generator=generator)
    return z_lr, prepared, states, soft


@contextmanager
def _watched(pipeline: Any, watch: Watch) -> Iterator[None]:
    """The pipeline's steps as phases of the watch."""
    kind = type(pipeline)
    originals = {name: getattr(kind, name) for name in _STEPS}

    def wrapped(name: str, phase: str) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            with watch.phase(phase):
                return originals[name](*args, **kwargs)

        return step

    with ExitStack() as stack:
        for name, phase in _STEPS.items():
            setattr(kind, name, wrapped(name, phase))
            stack.callback(setattr, kind, name, originals[name])
        yield

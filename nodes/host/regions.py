"""Words that act where they belong, in the host: from a CONDITIONING to the text attention of U-Net and ControlNet.

A CONDITIONING carries its regions in an entry of its own. A wrapper around the run hands them to the host as inputs of
the model, so that batches, tiles and areas are the host's work; around each call of the U-Net another one puts them
into the attention's place in the host's options, unless another node has taken that place. Nothing is kept between
calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.conds
import comfy.ldm.modules.attention
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...seesr_core.method.regions import EVERYWHERE, Regions, fit_masks
from .keys import Block
from .rca import text_transformers
from .report import warn_on_node

KEY = "seesr_regions"
"""Under which a CONDITIONING carries its regions, a MODEL our wrappers and a run its notes."""
MASKS, NUMBERS, STRENGTH = "seesr_region_masks", "seesr_region_numbers", "seesr_region_strength"
INPUTS = (MASKS, NUMBERS, STRENGTH)
"""Inputs of a model under which regions travel with the conditioning that they belong to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionPrompt:
    """Where the words of one photo's prompt act."""

    masks: Tensor
    """(N, H, W) in [0, 1], of any size."""
    numbers: Tensor
    """(L,) int64: for each text token 0 or the number of its mask, from 1 on."""
    strength: float
    """0 gives the plain prompt."""

    @property
    def acts(self) -> bool:
        """Whether anything is changed: some bound word has a mask below 1."""
        return Regions(masks=self.masks[None], numbers=self.numbers[None], strength=self.strength).acts

    @classmethod
    def everywhere(cls, length: int) -> RegionPrompt:
        """For a prompt of `length` tokens whose words act everywhere."""
        return cls(masks=torch.ones(0, 1, 1), numbers=torch.zeros(length, dtype=torch.int64), strength=0.0)

    def of_length(self, length: int) -> RegionPrompt:
        """For a prompt to which other tokens were added; those act everywhere."""
        numbers = torch.full((length,), EVERYWHERE, dtype=torch.int64)
        numbers[: len(self.numbers)] = self.numbers[:length]
        return RegionPrompt(masks=self.masks, numbers=numbers, strength=self.strength)

    def repeated(self, times: int) -> RegionPrompt:
        """For the same prompt written several times in a row."""
        return RegionPrompt(masks=self.masks, numbers=self.numbers.repeat(times), strength=self.strength)


def regions_of(extras: Mapping[str, Any]) -> tuple[RegionPrompt, ...]:
    """The regions of an entry of a CONDITIONING, one for all photos or one for each; none if it has none."""
    found: tuple[RegionPrompt, ...] = extras.get(KEY, ())
    return found


def join_regions(entries: Sequence[Sequence[Any]], length: int) -> tuple[RegionPrompt, ...]:
    """Regions of one batched entry from those of single photos, whose texts are repeated to `length` tokens."""
    if not any(regions_of(extras) for _, extras in entries):
        return ()
    joined: list[RegionPrompt] = []
    for tokens, extras in entries:
        own = regions_of(extras) or (RegionPrompt.everywhere(tokens.shape[1]),)
        joined += [region.of_length(tokens.shape[1]).repeated(length // tokens.shape[1]) for region in own]
    return tuple(joined)


def attach_regions(model: Any, prompts: Sequence[Any]) -> None:
    """Let `model` (already a clone) heed the regions of CONDITIONINGs, as far as any act."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, around_run), (WrappersMP.DIFFUSION_MODEL, around_unet)):
        model.remove_wrappers_with_key(kind, KEY)
        if any(region.acts for prompt in prompts for _, extras in prompt for region in regions_of(extras)):
            model.add_wrapper_with_key(kind, KEY, wrapper)


@dataclass(slots=True)
class _Run:
    """What became of the regions in one run."""

    reached: bool = False
    replaced: bool = False


def around_run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A sampling run (`WrappersMP.OUTER_SAMPLE`): gives every conditioning its regions; says if they could not act."""
    guider = executor.class_obj
    entries = [entry for group in guider.conds.values() for entry in group]
    if not any(region.acts for entry in entries for region in regions_of(entry)):
        return executor(noise, *args, **kwargs)
    run = _Run()
    guider.model_options.setdefault("transformer_options", {})[KEY] = run
    _place(entries, *noise.shape[-2:])
    result = executor(noise, *args, **kwargs)
    if run.replaced or not run.reached:
        warn_on_node(
            "SeeSR Region Prompt did not act in all of the U-Net: another node has replaced its text attention "
            "(IP-Adapter and the like do). Remove that node, or bypass SeeSR Region Prompt."
        )
    return result


def _place(entries: Sequence[dict[str, Any]], height: int, width: int) -> None:
    """Inputs of one shape for all conditionings of a run on latents of height × width: only those share a call."""
    lengths = [entry["cross_attn"].shape[1] for entry in entries]
    length = math.lcm(*lengths)
    regions = [
        [region.of_length(own) for region in regions_of(entry)] or [RegionPrompt.everywhere(own)]
        for entry, own in zip(entries, lengths, strict=True)
    ]
    count = max(len(region.masks) for rows in regions for region in rows)
    for entry, rows in zip(entries, regions, strict=True):
        masks = torch.ones(len(rows), count, height, width)
        for row, region in zip(masks, rows, strict=True):
            if len(region.masks):
                row[: len(region.masks)] = fit_masks(region.masks, height, width)
        numbers = torch.stack([region.repeated(length // len(region.numbers)).numbers for region in rows])
        strength = torch.tensor([[region.strength] for region in rows])
        entry["model_conds"] = {
            **entry.get("model_conds", {}),
            MASKS: comfy.conds.CONDNoiseShape(masks),
            NUMBERS: comfy.conds.CONDRegular(numbers),
            STRENGTH: comfy.conds.CONDRegular(strength),
        }


def take_regions(inputs: dict[str, Any], context: Tensor) -> Regions | None:
    """The regions among a model's inputs, taken out of them, for a batch whose text is `context` (B, L, D)."""
    masks, numbers, strength = (inputs.pop(name, None) for name in INPUTS)
    if masks is None:
        return None
    # The host repeats shorter texts to the longest of a call, which is never longer than these numbers.
    return Regions(masks=masks, numbers=numbers[:, : context.shape[1]], strength=strength[:, 0].float())


def around_unet(
    executor: Any,
    x: Tensor,
    timesteps: Any = None,
    context: Any = None,
    y: Any = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A call of the U-Net (`WrappersMP.DIFFUSION_MODEL`) with regions in its text attention.

    Its parameters are those of the host's U-Net, by whose names other plugins call it; RCA's wrapper has the same.
    """
    options = dict(transformer_options or {})
    regions = take_regions(kwargs, context)
    if regions is not None and regions.acts:
        run = options.get(KEY) or _Run()
        blocks = [block for block, _ in text_transformers(executor.class_obj)]
        options = with_regions(options, regions, blocks, run)
    result: Tensor = executor(x, timesteps, context, y, control, options, **kwargs)
    return result


def with_regions(
    options: Mapping[str, Any], regions: Regions, blocks: Sequence[Block], run: _Run | None = None
) -> dict[str, Any]:
    """A model's options with regions in the text attention of these blocks, where no other node has replaced it."""
    run = run or _Run()
    replaced = dict(options.get("patches_replace", {}))
    others = dict(replaced.get("attn2", {}))
    free = [block for block in blocks if not any(place[: len(block)] == block for place in others)]
    run.replaced = run.replaced or len(free) < len(blocks)
    replaced["attn2"] = others | {block: partial(_attend, regions, run) for block in free}
    return {**options, "patches_replace": replaced}


def _attend(regions: Regions, run: _Run, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The host's text attention with the regions' bias, in the place that replaces it (`attn2`)."""
    run.reached = True
    bias = regions.bias(*options["activations_shape"][-2:]).to(q)
    # Looked up late: the host chooses its attention at start.
    attention = comfy.ldm.modules.attention.optimized_attention_masked
    result: Tensor = attention(q, k, v, options["n_heads"], bias, attn_precision=options.get("attn_precision"))
    return result

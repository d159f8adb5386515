"""The node that puts SeeSR into a host's MODEL and CONDITIONING."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.errors import SettingsError
from ..seesr_core.settings import MAX_CONTROL_REUSE
from .host import checks, presets
from .host.areas import cut_areas
from .host.conds import Conditioning, join_conditioning
from .host.control import KEY as CONTROL_KEY
from .host.control import attach_control, check_run
from .host.local import TileSoftPrompt, attach_tile_soft_prompts, check_tile_texts, split_soft_prompts
from .host.rca import attach_rca
from .host.regions import attach_regions
from .schema import ModelType, SoftPromptType, folded, make_schema, view_channels_first

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .host.seesr_model import SeeSRModel


class SeeSRApply(io.ComfyNode):
    """ControlNet on both conditionings, RCA in the U-Net."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRApply",
            display_name="SeeSR Apply",
            description="Puts SeeSR into a Stable Diffusion 2 model: its ControlNet on both prompts, its attention to "
            "the soft prompt (RCA) in the U-Net. Prompts of a batch of photos become one batch; a list of photos, of "
            "any sizes, gives a list.",
            search_aliases=["seesr apply", "apply controlnet", "super resolution", "rca", "image attention"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model that the SeeSR model was made for, e.g. SD 2-base."),
                io.Conditioning.Input("positive", tooltip="What the photo shows: one prompt for all or one per photo."),
                io.Conditioning.Input("negative", tooltip="What the result should not look like."),
                ModelType.Input("seesr_model", tooltip="From SeeSR Load Model."),
                SoftPromptType.Input("soft_prompt", tooltip="From SeeSR Soft Prompt, of the same photos."),
                io.Image.Input("image", tooltip="The upscaled photo, from SeeSR Prepare Image."),
                _amount("strength", 1.0, 10.0, "How much the ControlNet steers towards the photo; 0 leaves it out."),
                _amount("rca_strength", 1.0, 10.0, "How much both networks heed the soft prompt; 0: not at all."),
                folded(_amount("start_percent", 0.0, 1.0, "Share of the sampling after which both begin.")),
                folded(_amount("end_percent", 1.0, 1.0, "Share of the sampling after which both end.")),
                folded(
                    io.Int.Input(
                        "control_reuse",
                        default=1,
                        min=1,
                        max=MAX_CONTROL_REUSE,
                        optional=True,
                        tooltip="How many steps one output of the ControlNet serves. 1: computed in every step. 2 is "
                        "faster and takes memory for the outputs of all tiles.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", is_output_list=True, tooltip="The model with RCA."),
                io.Conditioning.Output(
                    display_name="positive", is_output_list=True, tooltip="The prompts with the ControlNet."
                ),
                io.Conditioning.Output(
                    display_name="negative", is_output_list=True, tooltip="The negative prompt with the ControlNet."
                ),
            ],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        """Every input arrives as a list: of one, or of one entry per photo where a node before gave a list."""
        images = [image[..., :3] for image in inputs.pop("image")]
        counts = [len(image) for image in images]
        prompts = {name: _share(inputs.pop(name), counts, name) for name in ("positive", "negative")}
        soft_prompts = _share_soft(inputs.pop("soft_prompt"), counts)
        runs = []
        for i, image in enumerate(images):
            # As the host does it: a list that is too short goes on with its last entry.
            single = {name: values[min(i, len(values) - 1)] for name, values in inputs.items()}
            given = (prompts["positive"][i], prompts["negative"][i], single.pop("seesr_model"), soft_prompts[i], image)
            runs.append(apply_seesr(single.pop("model"), *given, **single))
        return io.NodeOutput(*map(list, zip(*runs, strict=True)))


def apply_seesr(
    model: ModelPatcher,
    positive: list[Conditioning],
    negative: list[Conditioning],
    seesr_model: SeeSRModel,
    soft_prompt: Tensor | TileSoftPrompt,
    image_BHWC: Tensor,
    *,
    strength: float = 1.0,
    rca_strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    control_reuse: int = 1,
) -> tuple[ModelPatcher, Conditioning, Conditioning]:
    """A clone of `model` with RCA, and both conditionings with the ControlNet; an older SeeSR on them is replaced.

    Args:
        model: the base model.
        positive: one conditioning for all photos, or one per photo.
        negative: likewise.
        seesr_model: ControlNet and RCA.
        soft_prompt: soft prompts of the photos (B, L, D), or also of their tiles.
        image_BHWC: prepared photos, sides multiples of 8; may be uint8. Not copied.
        strength: factor on the ControlNet's residuals; at 0 it is not attached.
        rca_strength: share of RCA, in the U-Net and in the ControlNet; at 0 the MODEL is not patched.
        start_percent: where both begin, as a share of the noise schedule.
        end_percent: where both end.
        control_reuse: how many steps one output of the ControlNet serves.

    Raises:
        SettingsError: anything that does not fit the rest, said in one sentence.
        ImageError: not a batch of colour pictures.
    """
    hint_B3HW = view_channels_first(image_BHWC)
    (soft_prompt_BLD,), tile_soft_prompt = split_soft_prompts([soft_prompt])
    checks.check_image(hint_B3HW)
    checks.check_model(model, seesr_model)
    checks.check_soft_prompt(soft_prompt_BLD, seesr_model, photos=len(hint_B3HW))
    checks.check_window(start_percent, end_percent)
    window = (start_percent, end_percent)
    prompts = [
        join_conditioning(given, photos=len(hint_B3HW), width=seesr_model.text_dim, name=name)
        for given, name in ((positive, "positive"), (negative, "negative"))
    ]
    check_tile_texts(prompts, hint_B3HW.shape[-2:])
    patched = model.clone()
    patched.set_attachments(presets.ATTACHMENT, seesr_model.defaults)
    patched = attach_rca(patched, seesr_model.rca, soft_prompt_BLD, strength=rca_strength, window=window)
    attach_tile_soft_prompts(patched, tile_soft_prompt, hint_B3HW.shape[-2:])
    attach_regions(patched, prompts)
    _guard_control(patched, attached=strength != 0)
    control = None
    if strength != 0:
        control = seesr_model.control.prepared(
            hint_B3HW,
            soft_prompt_BLD,
            strength=strength,
            rca_strength=rca_strength,
            window=window,
            reuse=control_reuse,
        )
    return patched, *attach_control(prompts, control)


def _guard_control(model: ModelPatcher, *, attached: bool) -> None:
    """Let `model` (already a clone) check photos against latents, and cut photos to the areas of prompts."""
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, check_run), (WrappersMP.CALC_COND_BATCH, cut_areas)):
        model.remove_wrappers_with_key(kind, CONTROL_KEY)
        if attached:
            model.add_wrapper_with_key(kind, CONTROL_KEY, wrapper)


def _amount(name: str, default: float, most: float, tooltip: str) -> io.Float.Input:
    step = 0.001 if most == 1.0 else 0.01
    return io.Float.Input(name, default=default, min=0.0, max=most, step=step, tooltip=tooltip)


def _share(values: list[Any], counts: list[int], name: str) -> list[list[Any]]:
    """What of a list belongs to each IMAGE of `counts` photos: all of one, one entry, or one entry per photo."""
    if len(counts) == 1 or len(values) == 1:
        return [values] * len(counts)
    if len(values) == len(counts):
        return [[value] for value in values]
    if len(values) == sum(counts):
        entries = iter(values)
        return [list(islice(entries, count)) for count in counts]
    raise SettingsError(
        f"SeeSR Apply got {len(values)} entries of {name} for a list of {len(counts)} prepared images; expected one "
        "for all, or one each. Make them from the same list of photos."
    )


def _share_soft(given: list[Tensor | TileSoftPrompt], counts: list[int]) -> list[Tensor | TileSoftPrompt]:
    """The soft prompts (B, L, D) of each IMAGE, or those of its tiles as well."""
    first = given[0]
    if len(given) == 1 and isinstance(first, Tensor) and len(counts) > 1 and len(first) == sum(counts):
        return list(first.split(counts))
    return [_join_soft(own) for own in _share(given, counts, "soft_prompt")]


def _join_soft(given: list[Tensor | TileSoftPrompt]) -> Tensor | TileSoftPrompt:
    whole, local = split_soft_prompts(given)
    return local or _join(whole)


def _join(tensors: list[Tensor]) -> Tensor:
    """One batch of soft prompts; several come from a node that gives one output per photo."""
    sizes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(sizes) > 1:
        raise SettingsError(
            f"Expected soft prompts of one size for a batch of photos, found {sorted(sizes)}; make them all with one "
            "DAPE."
        )
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

"""The ControlNet with RCA, of the host's own classes: budgeting, chaining, strength and window are the host's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...seesr_core.errors import SettingsError
from ...seesr_core.method.reuse import Embeddings, StepReuse
from ...seesr_core.tiling.grid import PIXELS_PER_CELL, Tile
from ..schema import unit_range
from .conds import Conditioning
from .keys import Site
from .local import SOFT
from .rca import RCA, fit_tokens
from .regions import INPUTS, take_regions, with_regions

KEY = "seesr_control"
"""Under which a MODEL carries what the ControlNet needs of a run."""
SEGMENTATION = "seesr_segmentation"
"""Input of a model under which C_t of SegSR travels, what is added to the embedding of the hint."""


class SeeSRControlNet(comfy.cldm.cldm.ControlNet):
    """The host's ControlNet with RCA after each text transformer, and an image encoder of any widths.

    Args:
        sites: where RCA sits.
        soft_dim: width of the soft prompt.
        hint_widths: channels of the image encoder.
        config: arguments of the host's class.
    """

    def __init__(self, *, sites: list[Site], soft_dim: int, hint_widths: list[int], **config: Any) -> None:
        super().__init__(hint_channels=3, **config)
        build = {"dtype": self.dtype, "device": config.get("device"), "operations": config["operations"]}
        self.input_hint_block = _image_encoder(hint_widths, self.model_channels, **build)
        linear = config["use_linear_in_transformer"]
        self.rca = RCA(sites, soft_dim, use_linear=linear, **build)
        self._text_blocks = [site.block for site in sites]

    def forward(
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        soft_prompt: Tensor | None = None,
        rca_strength: float = 1.0,
        embed: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor | None] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """Residuals of the input blocks (`output`) and of the middle block.

        Args:
            x: latents (B, 4, h, w).
            hint: LR image (B, 3, 8h, 8w) in [0, 1].
            timesteps: timesteps (B).
            context: text states.
            y: of models with further embeddings; this one has none.
            soft_prompt: tokens of the photos, unless `kwargs` hold those of this call's tiles.
            rca_strength: share of RCA.
            embed: told the hint and the image encoder, returns what that found in the hint before, or None.
            kwargs: regions of the text, SegSR's condition, and anything else that the host hands to its ControlNets.
        """
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        soft_prompt = kwargs.pop(SOFT, soft_prompt)
        tokens = None if soft_prompt is None else fit_tokens(soft_prompt, x)
        told = kwargs.pop(SEGMENTATION, None)
        regions = take_regions(kwargs, context)
        bound = None if regions is None or not regions.acts else with_regions({}, regions, self._text_blocks)

        def with_rca(kind: str, index: int, h: Tensor) -> Tensor:
            return h if tokens is None else self.rca((kind, index), h, tokens, rca_strength)

        def options(kind: str, index: int) -> list[dict[str, Any]]:
            return [] if bound is None else [{**bound, "block": (kind, index)}]

        def encode(image: Tensor) -> Tensor:
            found: Tensor = self.input_hint_block(image, emb, context)
            return found

        h, residuals = x, []
        for index, (block, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = block(h, emb, context, *options("input", index))
            if index == 0:
                embedded = None if embed is None else embed(hint, encode)
                embedded = encode(hint) if embedded is None else embedded
                h = h + (embedded if told is None else embedded + told)
            h = with_rca("input", index, h)
            residuals.append(zero_conv(h, emb, context))
        before, text, after = self.middle_block
        h = after(with_rca("middle", 0, text(before(h, emb), context, *options("middle", 0))), emb)
        return {"middle": [self.middle_block_out(h, emb, context)], "output": residuals}


Residuals = dict[str, list[Tensor]]
"""What a ControlNet gives, by the U-Net's part."""


class SeeSRControl(comfy.controlnet.ControlNet):
    """The host's object around a `SeeSRControlNet`; soft prompt and RCA's share travel in its extra arguments."""

    control_model: Any
    """The network; during a call, what stands in for it."""
    reuse = 1
    """How many steps one output serves."""
    kept: StepReuse[Residuals] | None = None
    """The outputs of the run that goes on; copies for tiles and areas share them."""
    embeddings: Embeddings | None = None
    """What its image encoder found in the run that goes on; copies share it, too."""
    parts: tuple[Tile, ...] = ()
    """The parts of the latents that a copy is for; none: the whole."""
    diffusers_config: Mapping[str, Any] = MappingProxyType({})
    """What its network was built from."""

    def copy(self) -> SeeSRControl:
        """Another one on the same weights; the host's own `copy` would give the base class."""
        twin = type(self)(None, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        twin.control_model = self.control_model
        twin.control_model_wrapped = self.control_model_wrapped
        twin.reuse = self.reuse
        twin.diffusers_config = self.diffusers_config
        self.copy_to(twin)
        return twin

    def prepared(
        self,
        hint_B3HW: Tensor,
        soft_prompt_BLD: Tensor,
        *,
        strength: float,
        rca_strength: float,
        window: tuple[float, float],
        reuse: int = 1,
    ) -> SeeSRControl:
        """A copy for these photos.

        Args:
            hint_B3HW: prepared photos as the host has them or as uint8 levels; the network gets [0, 1].
            soft_prompt_BLD: their soft prompts.
            strength: factor on all residuals.
            rca_strength: share of RCA.
            window: shares of the noise schedule at which it begins and ends.
            reuse: how many steps one output serves.
        """
        control = self.copy().set_cond_hint(hint_B3HW, strength, window)
        control.set_extra_arg("soft_prompt", soft_prompt_BLD)
        control.set_extra_arg("rca_strength", rca_strength)
        control.reuse = reuse
        control.extra_conds = [*control.extra_conds, SOFT, *INPUTS]
        return control

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Before a run of the host's inner `model`.

        Raises:
            SettingsError: its MODEL does not come from SeeSR Apply.
        """
        patcher = getattr(model, "current_patcher", None)
        if patcher is not None and not patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            raise SettingsError(
                "The conditioning comes from SeeSR Apply, but the MODEL being sampled does not: without the soft "
                "prompt's attention in it the result would be blurred. Connect the model output of the same SeeSR "
                "Apply to the sampler."
            )
        super().pre_run(model, percent_to_timestep_function)

    def get_control(
        self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int, transformer_options: dict[str, Any]
    ) -> Any:
        """The residuals for a batch of latents, after the chain before this one.

        Raises:
            SettingsError: a part of the latents for which the hint is not cut out.
        """
        pixels = tuple(PIXELS_PER_CELL * side for side in x_noisy.shape[-2:])
        if tuple(self.cond_hint_original.shape[-2:]) != pixels:
            # The host would squeeze the whole photo into the part.
            raise SettingsError(
                f"SeeSR Apply got a prepared image of {_size(self.cond_hint_original.shape[-2:])} pixels, but the "
                f"latent, or the area of a prompt, is of {_size(pixels)}; prepare the image that the latent was made "
                "from, and connect the model output of SeeSR Apply to the sampler."
            )
        if self.kept is None and self.embeddings is None:
            return super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        network = self.control_model
        key = (self.parts, tuple(transformer_options.get("uuids", ())), tuple(x_noisy.shape))
        self.control_model = _Kept(network, self.kept, self.embeddings, float(t[0]), key)
        try:
            return super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        finally:
            self.control_model = network

    def check_size(self, latent: Tensor) -> None:
        """Refuse latents (B, 4, h, w) of a whole run that are not of this photo.

        Raises:
            SettingsError: another size, or a batch that is no multiple of the photos.
        """
        count, _, height, width = self.cond_hint_original.shape
        pixels = tuple(PIXELS_PER_CELL * side for side in latent.shape[-2:])
        if (height, width) != pixels:
            raise SettingsError(
                f"SeeSR Apply got a prepared image of {_size((height, width))} pixels, but the latent being sampled is "
                f"of {_size(pixels)}; connect the same SeeSR Prepare Image to SeeSR Apply and to SeeSR Latent Init or "
                "VAE Encode."
            )
        if len(latent) % count:
            raise SettingsError(
                f"SeeSR Apply got {count} prepared images, but {len(latent)} latents are being sampled; expected as "
                "many latents as images, or a multiple. Encode the same batch."
            )


class _Kept:
    """A `SeeSRControlNet` for one call of the host's: residuals and embedding may be those of an earlier step."""

    def __init__(
        self,
        network: Any,
        kept: StepReuse[Residuals] | None,
        embeddings: Embeddings | None,
        sigma: float,
        key: Hashable,
    ) -> None:
        self._network, self._kept, self._sigma, self._key = network, kept, sigma, key
        self._embed = None if embeddings is None else partial(embeddings, key)
        self.dtype = network.dtype

    def __call__(self, **given: Any) -> Residuals:
        compute = partial(self._network, **given, embed=self._embed)
        if self._kept is None:
            residuals: Residuals = compute()
            return residuals
        found = self._kept(self._sigma, self._key, compute)
        # The host multiplies what it gets by the strength, in place.
        return {name: [residual.clone() for residual in residuals] for name, residuals in found.items()}


def network_hint(hint_B3HW: Tensor) -> Tensor:
    """The part of a photo that the network is shown next, for the host to call: photos stay as they were given."""
    return unit_range(hint_B3HW).contiguous()


def attach_control(prompts: list[Conditioning], control: SeeSRControl | None) -> list[Conditioning]:
    """Conditionings with `control` after the ControlNets they have, less any older one of ours.

    Entries that share a ControlNet share the new one, too: the host batches positive and negative only then.
    """
    links: dict[Any, Any] = {}

    def linked(previous: Any) -> Any:
        if previous not in links:
            others = _without_ours(previous)
            links[previous] = others if control is None else control.copy().set_previous_controlnet(others)
        return links[previous]

    return [[_entry(tokens, extras, linked(extras.get("control"))) for tokens, extras in prompt] for prompt in prompts]


def chain(control: Any) -> Iterator[Any]:
    """`control` and the ControlNets before it."""
    while control is not None:
        yield control
        control = control.previous_controlnet


def check_run(
    executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Around a sampling run (`WrappersMP.OUTER_SAMPLE`): compares photos and latents before it begins; what our
    ControlNets keep during it is dropped when it ends, however that is.

    Raises:
        SettingsError: a ControlNet of ours got other photos than the latents are of, or a prompt has none.
    """
    guider = executor.class_obj
    without_negative = getattr(guider, "cfg", None) == 1.0  # which the host then leaves out
    for name in ("positive",) if without_negative else ("positive", "negative"):
        _require_ours(name, guider.conds.get(name))
    ours = [
        link
        for entries in guider.conds.values()
        for entry in entries
        for link in chain(entry.get("control"))
        if isinstance(link, SeeSRControl)
    ]
    for link in ours:
        link.check_size(noise)
        link.kept = StepReuse(steps=link.reuse) if link.reuse > 1 else None
        link.embeddings = Embeddings() if len(sigmas) > 2 else None
    try:
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)
    finally:
        for link in ours:
            link.kept = link.embeddings = None


def _require_ours(name: str, entries: Sequence[Any] | None) -> None:
    """Refuse a prompt of a run, if there is one, that did not come through SeeSR Apply."""
    links = [link for entry in entries or () for link in chain(entry.get("control"))]
    if entries and not any(isinstance(link, SeeSRControl) for link in links):
        raise SettingsError(
            f"The MODEL comes from SeeSR Apply, but the {name} conditioning being sampled does not: without its "
            f"ControlNet the result would be blurred. Connect the {name} output of the same SeeSR Apply to the sampler."
        )


def _without_ours(control: Any) -> Any:
    """A chain without ControlNets of ours; links behind one are copied, since others may hold the original."""
    if control is None:
        return None
    before = _without_ours(control.previous_controlnet)
    if isinstance(control, SeeSRControl):
        return before
    return control if before is control.previous_controlnet else control.copy().set_previous_controlnet(before)


def _entry(tokens: Tensor, extras: dict[str, Any], control: Any) -> list[Any]:
    if control is None:
        return [tokens, {name: value for name, value in extras.items() if name != "control"}]
    return [tokens, {**extras, "control": control, "control_apply_to_uncond": False}]


def _size(sides: Sequence[int]) -> str:
    return f"{sides[1]} × {sides[0]}"


def _image_encoder(widths: list[int], out: int, *, operations: Any, **build: Any) -> nn.Module:
    """Convolutions from pixels to latents' size, three of them halving it."""
    sides = [(3, widths[0], 1)]
    for narrow, wide in itertools.pairwise(widths):
        sides += [(narrow, narrow, 1), (narrow, wide, 2)]
    sides += [(widths[-1], out, 1)]
    layers: list[nn.Module] = []
    for inner, outer, stride in sides:
        layers += [operations.conv_nd(2, inner, outer, 3, padding=1, stride=stride, **build), nn.SiLU()]
    return comfy.cldm.cldm.TimestepEmbedSequential(*layers[:-1])

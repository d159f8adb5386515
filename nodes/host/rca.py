"""RCA in the host's U-Net: weights in their own patcher, run after the text transformers of a MODEL.

One wrapper around the U-Net's call decides whether RCA runs in it (the window) and brings the soft prompt to the
call's batch, device and type. RCA itself then runs at each site by the host's patch point where the host asks it
about transformers, and by forward hooks that live only during the call where it does not. Nothing here keeps state
between calls; what a run has to remember lies in that run's own options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...seesr_core.errors import WeightsError
from . import probes
from .keys import NORM_GROUPS, Block, Site
from .local import SOFT
from .report import warn_on_node

KEY = "seesr"
"""Under which a MODEL carries our wrappers, additional models and, during a call, its options."""

_PATCH = "forward_timestep_embed_patch"
_ALWAYS = (math.inf, 0.0)


class RCA(nn.Module):
    """One transformer per site, built of the host's own blocks.

    Args:
        sites: where they sit.
        context_dim: width of the soft prompt.
        use_linear: linear (Stable Diffusion 2) or convolutional projections.
        build: `dtype`, `device` and `operations` of the layers.
    """

    def __init__(self, sites: list[Site], context_dim: int, *, use_linear: bool, **build: Any) -> None:
        super().__init__()
        self.transformers = nn.ModuleDict(
            {
                site.name: SpatialTransformer(
                    site.channels,
                    site.heads,
                    site.channels // site.heads,
                    context_dim=context_dim,
                    use_linear=use_linear,
                    attn_precision=torch.float32,
                    **build,
                )
                for site in sites
            }
        )

    def forward(self, block: Block, x: Tensor, tokens_BLD: Tensor, strength: float = 1.0) -> Tensor:
        """`x` (B, C, h, w) after the text transformer of `block`, `strength` of the way to what RCA makes of it.

        Blocks without RCA give `x` back.
        """
        name = f"{block[0]}_{block[1]}"
        if strength == 0 or name not in self.transformers:
            return x
        # An own dictionary: other nodes' attention patches for this block are meant for the text transformer.
        y = self.transformers[name](x, tokens_BLD, {})
        return y if strength == 1 else x + strength * (y - x)


@dataclass(kw_only=True, slots=True)
class RCAWeights:
    """The U-Net's RCA as the host manages it."""

    patcher: ModelPatcher
    """Loaded beside the U-Net, as its additional model."""
    sites: list[Site]
    """Where it sits; what a U-Net must have to fit."""
    copies: WeakSet[nn.Module] = field(default_factory=WeakSet)
    """Further copies that the host asked for, one per extra GPU."""

    def on(self, device: torch.device) -> nn.Module:
        """The copy on `device`; with one GPU there is only one."""
        return next((copy for copy in self.copies if copy.device == device), self.patcher.model)


def norm_operations(operations: Any, groups: int) -> Any:
    """`operations` whose norms have `groups` groups, where the host's classes ask for 32."""
    if groups == NORM_GROUPS:
        return operations

    class GroupNorm(operations.GroupNorm):
        def __init__(self, num_groups: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(groups, *args, **kwargs)

    return type(f"{operations.__name__}{groups}", (operations,), {"GroupNorm": GroupNorm})


def managed(module: nn.Module, state: Mapping[str, Tensor]) -> ModelPatcher:
    """`module` in the host's patcher with the tensors of `state`, which lie on the device for offloading, as weights.

    Raises:
        WeightsError: weights that are missing, unknown or of other sizes.
    """
    _check_fit(module, state)
    # Looked up late: the host may replace the class at start, and old hosts have only the plain one.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    patcher = patcher_class(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # The tensors themselves, not copies: no second set of weights in memory, and the host's dynamic patchers can page
    # them in from the file.
    module.load_state_dict(state, assign=True)
    return patcher


def _check_fit(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise WeightsError(
            f"The weights do not fit their configuration at {len(wrong)} places, first {wrong[0]}: expected size "
            f"{expected.get(wrong[0], 'none')}, found {found.get(wrong[0], 'none')}."
        )


def fit_tokens(tokens_BLD: Tensor, x: Tensor) -> Tensor:
    """Soft prompts of B photos for a batch of pictures `x`, with its device and type.

    The host's batches are conditioning by conditioning, then tile by tile, then photo by photo: repeating the photos'
    tokens over and over is right for all of them.
    """
    tokens = tokens_BLD.to(device=x.device, dtype=x.dtype)
    if len(tokens) == len(x):
        return tokens
    return tokens.repeat(-(-len(x) // len(tokens)), 1, 1)[: len(x)]


@dataclass(kw_only=True, slots=True)
class Run:
    """What one sampling run found out about RCA."""

    window: tuple[float, float]
    """Sigmas between which it runs, both included."""
    called: bool = False
    """The U-Net's call came past our wrapper."""
    inside: bool = False
    """A call lay in the window."""
    reached: bool = False
    """RCA ran at some site."""


@dataclass(kw_only=True, slots=True)
class Call:
    """One call of the U-Net with RCA in it."""

    rca: Callable[..., Tensor]
    tokens: Tensor
    strength: float
    run: Run

    def __call__(self, block: Block, x: Tensor) -> Tensor:
        """`x` after the text transformer of `block`, with RCA."""
        self.run.reached = True
        return self.rca(block, x, self.tokens, self.strength)


@dataclass(frozen=True, kw_only=True)
class RCAPatch:
    """Wrappers of a MODEL: `around_unet` runs RCA in each call, `around_run` watches a whole run."""

    weights: RCAWeights
    tokens_BLD: Tensor
    strength: float
    percent: tuple[float, float]
    by_hooks: bool

    def around_unet(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A call of the U-Net (`WrappersMP.DIFFUSION_MODEL`)."""
        options = dict(transformer_options or {})
        run = options.get(KEY) or Run(window=_ALWAYS)
        run.called = True
        if not _inside(options.get("sigmas"), run.window):
            return executor(x, timesteps, context, y, control, options, **kwargs)
        run.inside = True
        tokens = kwargs.pop(SOFT, self.tokens_BLD)
        call = Call(rca=self.weights.on(x.device), tokens=fit_tokens(tokens, x), strength=self.strength, run=run)
        if self.by_hooks:
            with hooked(executor.class_obj, call):
                return executor(x, timesteps, context, y, control, options, **kwargs)
        return executor(x, timesteps, context, y, control, patched_options(options, call), **kwargs)

    def around_run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A sampling run (`WrappersMP.OUTER_SAMPLE`): says so if RCA never ran in it."""
        guider = executor.class_obj
        run = Run(window=_sigmas(self.percent, guider.model_patcher))
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        result = executor(*args, **kwargs)
        if not run.reached and (run.inside or not run.called):
            warn_on_node(
                "SeeSR: the soft prompt never reached the U-Net in this run, so the picture was made without RCA. "
                "Another node probably replaced the U-Net's blocks; connect SeeSR Apply directly to the sampler."
            )
        return result


def attach_rca(
    model: ModelPatcher,
    weights: RCAWeights,
    tokens_BLD: Tensor,
    *,
    strength: float,
    window: tuple[float, float],
) -> ModelPatcher:
    """Give `model` (already a clone) RCA in place of any it had; at strength 0 it has none. Returns `model`.

    Args:
        model: a patcher of a U-Net that has the sites of `weights`.
        weights: RCA.
        tokens_BLD: soft prompts of B photos.
        strength: how much of the way from without to with RCA.
        window: shares of the noise schedule at which RCA begins and ends.
    """
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.OUTER_SAMPLE):
        model.remove_wrappers_with_key(kind, KEY)
    model.remove_additional_models(KEY)
    if strength != 0:
        patch = RCAPatch(
            weights=weights,
            tokens_BLD=tokens_BLD,
            strength=strength,
            percent=window,
            by_hooks=not probes.patch_reaches_transformers(),
        )
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, patch.around_unet)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, patch.around_run)
        model.set_additional_models(KEY, [weights.patcher])
    return model


def patched_options(options: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """`options` of a call whose transformers go through our handler, before anyone else's."""
    patches = dict(options.get("patches", {}))
    patches[_PATCH] = [(SpatialTransformer, partial(_handle, call)), *patches.get(_PATCH, [])]
    return {**options, "patches": patches}


@contextmanager
def hooked(unet: nn.Module, call: Call) -> Iterator[None]:
    """RCA after every text transformer of `unet` by forward hooks, gone again at the end."""
    handles = [layer.register_forward_hook(partial(_hook, call, block)) for block, layer in text_transformers(unet)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def text_transformers(unet: Any) -> Iterator[tuple[Block, SpatialTransformer]]:
    """The text transformers of a host's U-Net with their blocks."""
    for kind, blocks in (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    ):
        for index, layers in enumerate(blocks):
            for layer in layers or ():
                if isinstance(layer, SpatialTransformer):
                    yield (kind, index), layer


def _handle(
    call: Call, layer: nn.Module, x: Tensor, emb: Tensor, context: Any, options: dict[str, Any], *rest: Any
) -> Tensor:
    """A transformer at the host's patch point: another node's handler for it first, then RCA."""
    others = [handler for kind, handler in options["patches"][_PATCH][1:] if isinstance(layer, kind)]
    if others:
        x = others[0](layer, x, emb, context, options, *rest)
    else:
        x = layer(x, context, options)
        # The host counts the transformers that it runs itself; attention patches go by that number.
        if "transformer_index" in options:
            options["transformer_index"] += 1
    return call(options["block"], x)


def _hook(call: Call, block: Block, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return call(block, output)


def _sigmas(percent: tuple[float, float], model: ModelPatcher) -> tuple[float, float]:
    if percent == (0.0, 1.0):
        return _ALWAYS
    sampling = model.get_model_object("model_sampling")
    return sampling.percent_to_sigma(percent[0]), sampling.percent_to_sigma(percent[1])


def _inside(sigmas: Tensor | None, window: tuple[float, float]) -> bool:
    """Whether a call lies in the window; by the same comparison as the host's ControlNets."""
    if sigmas is None or window == _ALWAYS:
        return True
    sigma = float(sigmas[0])
    return window[1] <= sigma <= window[0]

"""SEESR_MODEL: SeeSR's trained part read from its file and built of the host's classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...seesr_core.errors import WeightsError
from ...seesr_core.formats.control import ControlParts, read_control, read_published
from . import keys
from .control import SeeSRControl, SeeSRControlNet, network_hint
from .rca import RCA, RCAWeights, managed, norm_operations

_HINT_WIDTHS = (16, 32, 96, 256)
_HALVINGS = 3


@dataclass(kw_only=True, slots=True)
class SeeSRModel:
    """ControlNet and RCA behind the host's memory management, and what is known about them."""

    name: str
    """Name for messages: the file's."""
    unet_config: dict[str, Any]
    """diffusers config of the U-Net that it was made for."""
    controlnet_config: dict[str, Any]
    """diffusers config of the ControlNet."""
    context_dim: int
    """Width of the soft prompt."""
    base: str
    """The base model it was trained on; may be empty."""
    recipe: str
    """The training recipe; may be empty."""
    step: int
    """Training steps done."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults that it was tuned for."""
    rca: RCAWeights
    """RCA of the U-Net."""
    control: SeeSRControl
    """The ControlNet; to be copied for each use (`prepared`)."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that it was trained on."""
        return int(self.unet_config["in_channels"])

    @property
    def text_dim(self) -> int:
        """Width of the text states."""
        return int(self.unet_config["cross_attention_dim"])

    @property
    def model_channels(self) -> int:
        """First width of the U-Net."""
        return int(self.unet_config["block_out_channels"][0])

    def get_models(self) -> list[ModelPatcher]:
        """The patchers that hold its weights, for the host's bookkeeping of a prompt."""
        return [self.rca.patcher, *self.control.get_models()]


def load_seesr_model(path: Path) -> SeeSRModel:
    """Read a `seesr*.safetensors` file, or a published folder with `unet` and `controlnet` inside.

    Raises:
        WeightsError: another kind of file, a damaged one, or a network that the host's classes cannot be.
    """
    read = partial(read_published if path.is_dir() else read_control, path)
    try:
        model = build_seesr_model(read(), name=path.name)
    except WeightsError as error:
        raise error if str(path) in str(error) else WeightsError(f"{path}: {error}") from error
    # For the host's copies on further GPUs, which must not be made of weights that are already patched or moved.
    model.rca.patcher.cached_patcher_init = (partial(_another_rca, model.rca, read), ())
    return model


def build_seesr_model(parts: ControlParts, *, name: str) -> SeeSRModel:
    """Build both networks of the host's classes.

    Args:
        parts: weights and configs under diffusers' names.
        name: name for messages.

    Raises:
        WeightsError: a network that the host's classes cannot be, or weights that do not fit the configuration.
    """
    return SeeSRModel(
        name=name,
        unet_config=parts.unet_config,
        controlnet_config=parts.controlnet_config,
        context_dim=parts.context_dim,
        base=parts.base,
        recipe=parts.recipe,
        step=parts.step,
        defaults=parts.defaults,
        rca=RCAWeights(patcher=build_rca(parts), sites=list(keys.sites(parts.unet_config).values())),
        control=build_control(parts),
    )


def build_rca(parts: ControlParts) -> ModelPatcher:
    """The U-Net's RCA in a patcher; its weights are cast to the U-Net's type as they are used."""
    config, places = parts.unet_config, keys.sites(parts.unet_config)
    dtype = _dtype(parts.rca_state)
    operations = norm_operations(comfy.ops.manual_cast, config.get("norm_num_groups", keys.NORM_GROUPS))
    rca = RCA(
        list(places.values()),
        parts.context_dim,
        use_linear=keys.host_config(config)["use_linear_in_transformer"],
        dtype=dtype,
        device=comfy.model_management.unet_offload_device(),
        operations=operations,
    )
    return managed(_frozen(rca), _cast(keys.rca_to_host(parts.rca_state, places), dtype))


def build_control(parts: ControlParts) -> SeeSRControl:
    """The ControlNet as the host's own loader would set it up."""
    device = comfy.model_management.get_torch_device()
    # Some configurations are the whole U-Net's; a ControlNet has no upper half.
    config = {name: value for name, value in parts.controlnet_config.items() if name != "up_block_types"}
    dtype = _dtype(parts.controlnet_state)
    cast = comfy.model_management.unet_manual_cast(dtype, device)
    net = SeeSRControlNet(
        sites=list(keys.sites(config).values()),
        soft_dim=parts.context_dim,
        hint_widths=_hint_widths(config),
        dtype=dtype,
        device=comfy.model_management.unet_offload_device(),
        operations=norm_operations(
            comfy.ops.pick_operations(dtype, cast, disable_fast_fp8=True),
            config.get("norm_num_groups", keys.NORM_GROUPS),
        ),
        **keys.host_config(config),
    )
    control = SeeSRControl(None, load_device=device, manual_cast_dtype=cast, preprocess_image=network_hint)
    control.diffusers_config = config
    control.control_model = _frozen(net)
    control.control_model_wrapped = managed(net, _cast(keys.controlnet_to_host(parts.controlnet_state, config), dtype))
    return control


def _another_rca(weights: RCAWeights, read: Any, *, disable_dynamic: bool = False) -> ModelPatcher:
    """A fresh patcher of the same RCA, which `weights` will find by its device."""
    patcher = build_rca(read())
    weights.copies.add(patcher.model)
    return patcher


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The type that the host would choose for a U-Net with these weights."""
    return comfy.model_management.unet_dtype(
        model_params=-1,
        supported_dtypes=[torch.float16, torch.bfloat16, torch.float32],
        weight_dtype=next(iter(state.values())).dtype,
    )


def _hint_widths(config: Mapping[str, Any]) -> list[int]:
    widths = list(config.get("conditioning_embedding_out_channels") or _HINT_WIDTHS)
    if len(widths) != _HALVINGS + 1:
        raise WeightsError(
            f"The ControlNet's image encoder needs {_HALVINGS + 1} widths, since it must halve the image {_HALVINGS} "
            f"times; its configuration has {widths}."
        )
    return widths


def _frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False).eval()


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    device = comfy.model_management.unet_offload_device()
    return {key: tensor.to(device, dtype) for key, tensor in state.items()}

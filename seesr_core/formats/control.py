"""SeeSR's trained part (ControlNet and RCA): our single file, and the two published diffusers folders.

Our file holds the ControlNet under `controlnet.` and of the U-Net only its RCA under `unet.`, since the rest of the
U-Net is the public base model, untouched by training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from . import configs, metadata, sources
from .detect import Kind, require
from .schema import MalformedError, Whole, read_json
from .sd import plain_config
from .tensorfile import load_tensors

CONTROLNET = "controlnet."
UNET = "unet."
RCA = ".image_attentions."
_WEIGHTS_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)


class _Configs(TypedDict):
    """The metadata field `config`."""

    unet: configs.UNet
    controlnet: configs.ControlNet


SOFT_WIDTH = "soft prompts of width"
_MUST_AGREE = ("block_out_channels", "cross_attention_dim")
"""What the U-Net of a base model shares with the one that ControlNet and RCA were trained on."""


@dataclass(kw_only=True, slots=True)
class ControlParts:
    """ControlNet and RCA as plain data, under diffusers' (the published) names."""

    unet_config: dict[str, Any]
    """diffusers config of the U-Net that the RCA belongs to."""
    controlnet_config: dict[str, Any]
    """diffusers config of the ControlNet."""
    controlnet_state: dict[str, Tensor]
    """All weights of the ControlNet, its RCA included."""
    rca_state: dict[str, Tensor]
    """The U-Net's `…image_attentions…` weights."""
    context_dim: int
    """Width of the soft prompt."""
    base: str = ""
    """The base model it was trained on."""
    recipe: str = ""
    """The training recipe, or the published source."""
    step: int = 0
    """Training steps done."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults: steps, start_timestep, cfg and whatever else the model was tuned for."""
    unet_state: dict[str, Tensor] | None = None
    """The rest of the U-Net, only from the published folder and only if asked for."""

    @classmethod
    def from_modules(cls, unet: nn.Module, controlnet: nn.Module, **about: Any) -> ControlParts:
        """Collect the trained parts of a U-Net and a ControlNet with RCA; `about` sets base, recipe, step, defaults."""
        rca = {key: tensor for key, tensor in unet.state_dict().items() if RCA in key}
        return cls(
            unet_config=plain_config(unet),
            controlnet_config=plain_config(controlnet),
            controlnet_state=dict(controlnet.state_dict()),
            rca_state=rca,
            context_dim=_context_dim(rca, "the U-Net", sources.CONTROL),
            **about,
        )

    def misfit(self, unet_config: Mapping[str, Any], token_width: int) -> tuple[str, Any, Any] | None:
        """What a base model or tagger lacks to go with these weights: its name, what they were trained on, what it has.

        Args:
            unet_config: diffusers config of the base model's U-Net.
            token_width: width of the tagger's soft prompt.
        """
        pairs = {name: (self.unet_config.get(name), unet_config.get(name)) for name in _MUST_AGREE}
        pairs[SOFT_WIDTH] = (self.context_dim, token_width)
        listed = ((name, *map(_plain, pair)) for name, pair in pairs.items())
        return next(((name, wanted, found) for name, wanted, found in listed if wanted != found), None)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def write_control(path: str | os.PathLike[str], parts: ControlParts, *, dtype: torch.dtype = torch.float16) -> None:
    """Write `seesr*.safetensors`.

    Raises:
        SettingsError: weights that are not finite in `dtype`, or another suffix.
        ResourceError: the disk is full or cannot be written to.
    """
    tensors = {f"{CONTROLNET}{key}": t for key, t in parts.controlnet_state.items()}
    tensors |= {f"{UNET}{key}": t for key, t in parts.rca_state.items()}
    metadata.save_safetensors(path, metadata.cast(tensors, dtype), control_metadata(parts))


def control_metadata(parts: ControlParts, **more: Any) -> dict[str, str]:
    """The metadata of a `seesr*.safetensors`; `more` are further entries."""
    config = {"unet": parts.unet_config, "controlnet": parts.controlnet_config, "context_dim": parts.context_dim}
    fields = {
        "config": config,
        "base": parts.base,
        "recipe": parts.recipe,
        "step": parts.step,
        "defaults": parts.defaults,
        **more,
    }
    return metadata.encode(metadata.CONTROL, fields)


def read_control(path: str | os.PathLike[str]) -> ControlParts:
    """Read `seesr*.safetensors`.

    Raises:
        WeightsError: another kind of file, a damaged or newer one, or weights that contradict its own configuration.
    """
    header = require(path, sources.CONTROL, Kind.CONTROL).header
    metadata.check_version(path, header.metadata, metadata.CONTROL)
    config = metadata.field(path, header.metadata, "config", _Configs)
    tensors = load_tensors(path)
    rca = {key.removeprefix(UNET): t for key, t in tensors.items() if key.startswith(UNET)}
    parts = ControlParts(
        unet_config=dict(config["unet"]),
        controlnet_config=dict(config["controlnet"]),
        controlnet_state={key.removeprefix(CONTROLNET): t for key, t in tensors.items() if key.startswith(CONTROLNET)},
        rca_state=rca,
        context_dim=_context_dim(rca, path, sources.CONTROL),
        base=header.metadata.get("base", ""),
        recipe=header.metadata.get("recipe", ""),
        step=metadata.field(path, header.metadata, "step", Whole, 0),
        defaults=metadata.field(path, header.metadata, "defaults", dict[str, str | bool | int | float], {}),
    )
    _check_sizes(parts, path, sources.CONTROL)
    return parts


def read_published(folder: str | os.PathLike[str], *, with_unet: bool = False) -> ControlParts:
    """Read the published folder `seesr` (`unet` and `controlnet` inside, each a config and a weights file).

    Args:
        folder: the folder.
        with_unet: also give the U-Net's other weights (they equal SD-2-base's) in `unet_state`.

    Raises:
        WeightsError: a file is missing, of another kind, damaged or unsafe.
    """
    root = Path(folder)
    unet_config, unet_file = _config(root / "unet", configs.UNet), _weights(root / "unet", Kind.SEESR_UNET)
    controlnet_config = _config(root / "controlnet", configs.ControlNet)
    controlnet_file = _weights(root / "controlnet", Kind.SEESR_CONTROLNET)
    rca = load_tensors(unet_file, lambda key: RCA in key)
    parts = ControlParts(
        unet_config=unet_config,
        controlnet_config=controlnet_config,
        controlnet_state=load_tensors(controlnet_file),
        rca_state=rca,
        context_dim=_context_dim(rca, unet_file, sources.PUBLISHED),
        base="stable-diffusion-2-base",
        recipe="published",
        unet_state=load_tensors(unet_file, lambda key: RCA not in key) if with_unet else None,
    )
    _check_sizes(parts, root, sources.PUBLISHED)
    return parts


def _config(folder: Path, kind: Any) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return configs.taken(kind, read_json(path))
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}); expected {sources.PUBLISHED.name}."
        raise WeightsError(f"{message} Get it from {sources.PUBLISHED.where}.") from error
    except MalformedError as error:
        raise sources.unfit(path, str(error), sources.PUBLISHED) from error


def _weights(folder: Path, kind: Kind) -> Path:
    """The weights file of a published folder, safetensors before pickle, checked by content."""
    path = next((folder / name for name in _WEIGHTS_NAMES if (folder / name).is_file()), None)
    if path is None:
        raise WeightsError(
            f"{folder} has no {_WEIGHTS_NAMES[0]}. Get {sources.PUBLISHED.name} from {sources.PUBLISHED.where}."
        )
    require(path, sources.PUBLISHED, kind)
    return path


def _context_dim(rca: Mapping[str, Tensor], where: str | os.PathLike[str], expected: sources.Source) -> int:
    widths = {t.shape[1] for key, t in rca.items() if key.endswith("attn2.to_k.weight") and t.ndim == 2}
    if len(widths) != 1:
        raise sources.unfit(
            where, f"its RCA should attend to soft prompts of one width, found {sorted(widths)}", expected
        )
    return widths.pop()


def _check_sizes(parts: ControlParts, path: str | os.PathLike[str], expected: sources.Source) -> None:
    """Weights and configs must speak of the same network: first channels and text width."""
    state = parts.controlnet_state
    widths = (t.shape[-1] for key, t in state.items() if key.endswith("attn2.to_k.weight") and RCA not in key)
    found = (len(state.get("conv_in.weight", ())), next(widths, None))
    for name, config in (("unet", parts.unet_config), ("controlnet", parts.controlnet_config)):
        stated = ((config.get("block_out_channels") or [None])[0], config.get("cross_attention_dim"))
        if stated != found:
            raise sources.unfit(
                path,
                f"its {name} config states first channels and text width {stated}, its weights have {found}",
                expected,
            )

"""A student as a whole model: base with the adapters in its U-Net, ControlNet and RCA with theirs, and the tagger."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.dape import DAPE, Vocabulary
from seesr_core.formats.base import Base
from seesr_core.formats.control import ControlParts, write_control
from seesr_core.formats.ram import write_dape
from seesr_core.formats.sd import BaseParts, write_base
from seesr_core.method.unet import build_unet
from seesr_core.runtime.files import write_text

from ..engine.adapters import lora_deltas
from .task import DistillTask

log = logging.getLogger(__name__)

FOLDER = "model"
"""Where a finished model lies in a run folder."""


def export(
    task: DistillTask,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    base: Base,
    control: ControlParts,
    tagger: tuple[DAPE, Vocabulary],
    **about: Any,
) -> Path:
    """Write `out/model`, which the nodes and the command line load as any model; returns it.

    Args:
        task: what was trained.
        weights: the trained tensors.
        out: run folder.
        base: the teacher's base model, as it was read.
        control: the teacher's ControlNet and RCA.
        tagger: the teacher's tagger with its vocabulary.
        about: `recipe`, and `defaults` for the student's settings of sampling.
    """
    task.trained.load_state_dict(weights, strict=False)
    unet, controlnet = (lora_deltas(network) for network in (task.networks.unet, task.networks.controlnet))
    folder, name, info = out / FOLDER, out.resolve().name, {**about, "step": task.config.loop.steps}
    defaults = info.pop("defaults")
    _write_base(folder, name, base, _added(base.unet_state, unet), info)
    parts = ControlParts(
        unet_config=control.unet_config,
        controlnet_config=control.controlnet_config,
        controlnet_state=_added(control.controlnet_state, controlnet),
        rca_state=_added(control.rca_state, unet),
        context_dim=control.context_dim,
        base=name,
        defaults=defaults,
        **info,
    )
    write_control(folder / "seesr" / f"{name}-control.safetensors", parts)
    write_dape(folder / "dape" / f"{name}-dape.safetensors", *tagger, source=control.base)
    log.info("wrote %s", folder)
    return folder


def _added(state: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in fp32 with what adapters add to them."""
    return {
        key: tensor.float() + deltas[key].cpu().float() if key in deltas else tensor.float()
        for key, tensor in state.items()
    }


def _write_base(folder: Path, name: str, base: Base, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """The base model with another U-Net: a single file, or for an autoencoder of SD-2's kind a diffusers folder."""
    unet = build_unet(base.unet_config)
    unet.load_state_dict(state, strict=False)
    if type(base.vae).__name__ == "AutoencoderTiny":
        parts = BaseParts.from_modules(
            unet=unet,
            vae=base.vae,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            scheduler=base.scheduler,
            info=info,
        )
        write_base(folder / "checkpoints" / f"{name}.safetensors", parts)
        return
    for block in unet.modules():
        if hasattr(block, "image_attentions"):
            del block.image_attentions
    _write_folder(folder / "base", base, unet)


def _write_folder(target: Path, base: Base, unet: nn.Module) -> None:
    """A diffusers folder in half precision, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".base~") as place:
        made = Path(place) / "made"
        parts: dict[str, Any] = {"unet": unet, "vae": base.vae, "text_encoder": base.text_encoder}
        for part, network in parts.items():
            nn.Module.to(network, torch.float16).save_pretrained(made / part)
        base.tokenizer.save_pretrained(made / "tokenizer")
        write_text(made / "scheduler" / "scheduler_config.json", json.dumps(base.scheduler, indent=2))
        if target.exists():
            shutil.rmtree(target)
        os.replace(made, target)

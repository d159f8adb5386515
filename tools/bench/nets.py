"""Models to measure: the embedded one, and networks by the rule, of the published sizes or tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import DTYPES

TORCH_DTYPES = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def core_models(net: str, dtype: str, device: str = "auto") -> Any:
    """`seesr_core.models.Models`."""
    from seesr_core.models import load_models
    from seesr_core.runtime.devices import choose_device

    if net == "nano":
        return load_models("nano", device=device, dtype=dtype)
    return _rule_made(net == "full", choose_device(device), TORCH_DTYPES[dtype])


def _rule_made(full: bool, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from seesr_core.dape import DAPE, DAPEConfig, Vocabulary
    from seesr_core.formats.base import build_tokenizer
    from seesr_core.method.controlnet import build_controlnet
    from seesr_core.method.unet import build_unet
    from seesr_core.models import Models
    from tests.dape_nets import CONFIG

    from ..newcomer_files import published_sizes, small_sizes, vae_arguments

    sizes = published_sizes() if full else small_sizes()
    with torch.device("meta"):
        unet = build_unet(sizes.unet, context_dim=sizes.soft_width)
        controlnet = build_controlnet(sizes.unet, context_dim=sizes.soft_width)
        vae = AutoencoderKL(**vae_arguments(sizes))
    text, dape = CLIPTextModel(CLIPTextConfig(**sizes.text)), DAPE(DAPEConfig() if full else CONFIG)
    words = tuple(f"tag {i}" for i in range(dape.config.num_tags))
    halves = {"unet": unet, "controlnet": controlnet, "vae": vae}
    whole = {"text_encoder": text, "dape": dape}
    return Models(
        name=f"{'full' if full else 'small'}, by the rule",
        **{name: filled(module, device, dtype) for name, module in halves.items()},
        **{name: filled(module, device, torch.float32) for name, module in whole.items()},
        tokenizer=build_tokenizer(sizes.tokenizer),
        vocabulary=Vocabulary(tags=words, tags_zh=words, thresholds=torch.full((len(words),), 0.7)),
        device=device,
        dtype=dtype,
    )


def filled(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A module, which may be on torch's "meta" device, with weights by the rule; its buffers stay what they are."""
    from ..newcomer_files import weight

    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = weight(f"{prefix}.{name}", tuple(parameter.shape)).to(device=device, dtype=dtype)
                part._parameters[name] = nn.Parameter(made, requires_grad=False)
    return module.to(device).eval()

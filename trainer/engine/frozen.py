"""Weights of frozen networks kept in half precision or in 8 bits.

A layer whose weight is kept so computes in the precision of its input, or in autocast's: with bf16 kept and bf16
computed the products are those of fp32 weights, bit for bit, since autocast rounds them the same way. Norms, biases
and everything that learns stay in fp32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr_core.errors import SettingsError

from .needs import require_package
from .processes import is_sharded, is_zero

FrozenDtype = Literal["fp32", "bf16", "fp16", "8bit"]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "8bit": torch.bfloat16}
"""What a weight is kept in; of 8 bits what embeddings are, whose rows are looked up and not multiplied."""


def check_frozen(dtype: FrozenDtype) -> None:
    """Refuse what cannot be kept, before anything is read.

    Raises:
        SettingsError: 8 bits without bitsandbytes, or fewer bits under a launcher that divides all weights alike.
    """
    if dtype == "8bit":
        require_package("bitsandbytes", "Frozen weights in 8 bits (--frozen-dtype 8bit)", "choose bf16")
    if dtype != "fp32" and (is_sharded() or is_zero()):
        raise SettingsError(
            f"The launcher divides the networks (FSDP or DeepSpeed), which takes weights of one type; with "
            f"--frozen-dtype {dtype} launch with trainer/accelerate/ddp.yaml."
        )


def keep_frozen(network: nn.Module, dtype: FrozenDtype, *, but: str = "") -> None:
    """Keep the frozen weights of a network's linear layers, convolutions and embeddings in fewer bits, in place.

    Args:
        network: the network; layers whose weight requires gradients stay as they are.
        dtype: `fp32` changes nothing; `8bit` keeps a row of a weight (an output channel) as whole numbers and one scale
            (bitsandbytes), and embeddings in bf16.
        but: what the names of layers have in them that stay as they are, since they are exported.
    """
    if dtype == "fp32":
        return
    for name, module in network.named_modules():
        kept = _KEPT.get(type(module))
        if kept is not None and not (but and but in name) and not module.weight.requires_grad:
            module.__class__ = kept
            module.keep(dtype)


class _Kept:
    """What the three kinds of layers share."""

    weight: Any
    weight_scale: Tensor

    def keep(self, dtype: FrozenDtype) -> None:
        """Replace the weight by what is kept of it."""
        weight = self.weight.detach()
        if dtype == "8bit" and not isinstance(self, nn.Embedding):
            from bitsandbytes.functional import int8_vectorwise_quant

            # It takes halves, and rows: those of a convolution's output channels.
            rows, scale, _ = int8_vectorwise_quant(weight.flatten(1).to(torch.float16))
            weight = rows.view_as(weight)
            self.register_buffer("weight_scale", scale, persistent=False)  # type: ignore[attr-defined] # a module's
        else:
            weight = weight.to(_HALF[dtype])
        self.weight = nn.Parameter(weight, requires_grad=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Any]:
        """Weight and bias to compute with on an input."""
        weight: Tensor = self.weight
        if weight.dtype == torch.int8:
            from bitsandbytes.functional import int8_vectorwise_dequant

            weight = int8_vectorwise_dequant(weight.flatten(1), self.weight_scale).view_as(weight)
        return (weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)), self.bias  # type: ignore[attr-defined] # a layer's


class _KeptLinear(_Kept, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.parts(x))


class _KeptConv2d(_Kept, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.parts(x))


class _KeptEmbedding(_Kept, nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


_KEPT: dict[type, Any] = {nn.Linear: _KeptLinear, nn.Conv2d: _KeptConv2d, nn.Embedding: _KeptEmbedding}

"""Low-rank adapters (LoRA, Hu et al. 2021) on a diffusers network, their merging, and networks that share weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def add_lora(network: nn.Module, rank: int, *, everywhere: bool = False) -> None:
    """Wrap every linear layer of the network's transformers; nothing but the adapters requires gradients then.

    Outputs are unchanged at first: A is drawn from torch's own generator as LoRA's authors do, B is zero. Adapters are
    in fp32 whatever their layers are kept in.

    Args:
        network: `ControlNetModel` or `UNet2DConditionModel`, changed in place.
        rank: of the adapters; their product B·A is added as it is.
        everywhere: whether all convolutions and linear layers get one.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wrapped = (nn.Linear, nn.Conv2d) if everywhere else nn.Linear
    names = [name for name, module in network.named_modules() if isinstance(module, wrapped)]
    targets = [name for name in names if everywhere or "attentions." in name]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
    for parameter in network.parameters():
        if parameter.requires_grad:  # peft gives adapters the type of their layer
            parameter.data = parameter.data.float()


def merge_lora(network: nn.Module) -> None:
    """Add the adapters to the layers they are on and remove them; without adapters nothing changes."""
    for name, layer in list(_adapted(network)):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())


def lora_deltas(network: nn.Module) -> dict[str, Tensor]:
    """What the adapters add to the weights of a network, by the names that the weights have without adapters."""
    return {
        f"{name}.weight": layer.get_delta_weight(adapter).detach()
        for name, layer in _adapted(network)
        for adapter in layer.active_adapters
    }


def sharing(network: Any) -> Any:
    """Another network of the same weights, which are not copied: what is added to one is not in the other."""
    return copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})


def _adapted(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))

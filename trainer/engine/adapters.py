"""Low-rank adapters (LoRA, Hu et al. 2021) on the transformers of a diffusers network, and their merging."""

from __future__ import annotations

from torch import nn


def add_lora(network: nn.Module, rank: int) -> None:
    """Wrap every linear layer of the network's transformers; nothing but the adapters requires gradients then.

    Outputs are unchanged at first: A is drawn from torch's own generator as LoRA's authors do, B is zero.

    Args:
        network: `ControlNetModel` or `UNet2DConditionModel`, changed in place.
        rank: of the adapters; their product B·A is added as it is.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if "attentions." in name]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)


def merge_lora(network: nn.Module) -> None:
    """Add the adapters to the layers they are on and remove them; without adapters nothing changes."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())

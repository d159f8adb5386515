"""Tensors and networks that may be divided over processes (FSDP2), and their whole values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, complete; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within the block, parts of a sharded model can be called by themselves; every process has to ask."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a complete `value` into a tensor that may be sharded."""
    tensor.copy_(like(value, tensor))


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A complete `value` placed, and sharded if need be, as `tensor` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value

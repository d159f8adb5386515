"""How much memory the tensors of a computation take while they live, on any device and also on none (fake tensors)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_FLOAT = 4


def scratch(func: Callable[..., Any], args: Sequence[Any]) -> int:
    """Bytes that a convolution takes for itself beside what it returns, as torch's CPU kernels do: a copy of the weight
    in another layout, and its gradient in float32 in that layout. Kernels of one place need neither."""
    if func is torch.ops.aten.convolution.default:
        weight, gradient = args[1], False
    elif func is torch.ops.aten.convolution_backward.default:
        weight, gradient = args[2], args[-1][1]
    else:
        return 0
    spatial = weight.shape[2:].numel() > 1
    return spatial * int(weight.numel()) * (_FLOAT if gradient else int(weight.element_size()))


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of all tensors that operations make, as long as they live, and what
    convolutions take meanwhile (`scratch`).

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        self.peak = max(self.peak, self.now + scratch(func, args))
        return result

    def elsewhere(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which what the backward pass needs waits in another memory, as `save_on_cpu` lets it wait on the
        host: copies there do not count, those that come back do."""

        def away(tensor: Tensor) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                return tensor.clone()

        return torch.autograd.graph.saved_tensors_hooks(away, torch.clone)

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.known:
            self.alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        if self.alive.pop(key, None) is not None:
            self.now -= size

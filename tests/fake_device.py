"""A device that is not there: tensors with shapes, dtypes and a place on "cuda:0", "mps:0" or "xpu:0", but no contents.

torch's FakeTensorMode refuses operations whose tensors lie on several devices, as a real device would. What of torch
asks for the device's own library is replaced here by operations that do not: indexing, `contiguous` and attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seesr_core.method.schedule import acp_at

ATEN = torch.ops.aten
MISSING_DTYPES = (torch.float64, torch.complex32, torch.complex64, torch.complex128)
"""Not every accelerator has them; MPS has none of them."""


class FakeDevice:
    """Puts modules and tensors onto a device that is not there, and watches what is done with them.

    Args:
        name: the device, e.g. "cuda:0".
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def module(self, module: Any, dtype: torch.dtype | None = None) -> Any:
        """The module with all its parameters and buffers on the device, floats among them in `dtype`; in place."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = self.tensor(parameter.detach(), dtype)
                    part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.tensor(buffer, dtype)
        return module

    def tensor(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the device."""
        dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        with self.mode:
            return self.mode.from_tensor(tensor).to(device=self.device, dtype=dtype)

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Inside, tensors have no contents; the value tells what was done on the device and between it and the host."""
        acp_at(0)  # the table of the schedule needs contents, once
        with _Replaced(), self.mode, Watch() as watch:
            yield watch


class Watch(TorchDispatchMode):
    """What operations did with tensors that are not on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        """Operations on the device."""
        self.missing: Counter[str] = Counter()
        """Those with a tensor of `MISSING_DTYPES` there, by operation and dtype."""
        self.copies: Counter[str] = Counter()
        """Copies between the host and the device, by direction."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        on_device = [tensor for tensor in (*given, *made) if tensor.device.type != "cpu"]
        self.calls += bool(on_device)
        self.missing.update(f"{func}: {tensor.dtype}" for tensor in on_device if tensor.dtype in MISSING_DTYPES)
        if given and made and (given[0].device.type == "cpu") != (made[0].device.type == "cpu"):
            self.copies["to the device" if given[0].device.type == "cpu" else "to the host"] += 1
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Replaced(TorchFunctionMode):
    """torch's functions that would ask for the device's own library, by others that give the same shapes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return _item(*args)
        if func is Tensor.__setitem__:
            target, (_, index, value) = args[0], args
            return _item(target, index).copy_(torch.as_tensor(value))
        if func is Tensor.contiguous:
            return ATEN.clone.default(args[0], memory_format=kwargs.get("memory_format", torch.contiguous_format))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _item(x: Tensor, index: Any) -> Tensor:
    """x[index]."""
    index = index if isinstance(index, tuple) else (index,)
    at = next((i for i, entry in enumerate(index) if entry is Ellipsis), None)
    if at is not None:
        taken = sum(entry is not None for entry in index) - 1
        index = (*index[:at], *[slice(None)] * (x.ndim - taken), *index[at + 1 :])
    dim, tensors = 0, list[Tensor | None]()
    for entry in index:
        if isinstance(entry, int):
            x = ATEN.select.int(x, dim, entry)
            continue
        if entry is None:
            x = ATEN.unsqueeze.default(x, dim)
        elif isinstance(entry, Tensor):
            tensors += [None] * (dim - len(tensors)) + [entry]
        elif entry != slice(None):
            x = ATEN.slice.Tensor(x, dim, entry.start, entry.stop, entry.step or 1)
        dim += 1
    return ATEN.index.Tensor(x, tensors) if tensors else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    weights = query @ key.transpose(-2, -1)
    if attn_mask is not None:
        weights = weights + attn_mask
    return weights.softmax(-1) @ value

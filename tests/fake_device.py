"""A device that is not there: tensors with shapes, dtypes and a place on "cuda:0", "mps:0" or "xpu:0", but no contents.

torch's FakeTensorMode refuses operations whose tensors lie on several devices, and reading a value, which on a real
device waits for it. Tensors on the CPU have contents as ever, so that what is drawn there can be decided by. What of
torch asks for the device's own library is replaced here by what does not: indexing, `contiguous`, attention, and what
autograd asks of a device.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
META = torch.device("meta")
MISSING_DTYPES = (torch.float64, torch.complex32, torch.complex64, torch.complex128)
"""Not every accelerator has them; MPS has none of them."""
RECOMPUTATION: Any = torch.utils.checkpoint._recomputation_hook
_DEVICE = Tensor.device.__get__


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
                if parameter is not None and not isinstance(parameter, FakeTensor):
                    moved = self.tensor(parameter.detach(), dtype)
                    part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, FakeTensor):
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
        watch = Watch(self.device)
        with ExitStack() as stack:
            stack.enter_context(_guarded(self.device.type))
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
            no_float64 = SimpleNamespace(has_fp64=False)
            stack.enter_context(mock.patch("torch.xpu.get_device_properties", return_value=no_float64))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # no thread waits for such a device
            stack.enter_context(mock.patch("torch.utils.checkpoint._recomputation_hook", watch.recomputed))
            for mode in (_Replaced(watch), self.mode, watch):
                stack.enter_context(mode)
            yield watch


@contextmanager
def _guarded(kind: str) -> Iterator[None]:
    """Autograd asks the device's library for streams; inside, that of "meta" answers, which has none."""
    number, other = (getattr(torch._C._autograd.DeviceType, name) for name in (kind.upper(), "Meta"))
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
        registry = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError, StopIteration) as error:
        pytest.skip(f"this build of torch does not show where it keeps what it knows of devices: {error}")
    before, registry[int(number)] = registry[int(number)], registry[int(other)]
    try:
        yield
    finally:
        registry[int(number)] = before


class Watch(TorchDispatchMode):
    """What operations did with tensors that are not on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.learning = False
        """Within a backward pass."""
        self.calls = 0
        """Operations on the device."""
        self.missing: Counter[str] = Counter()
        """Those with a tensor of `MISSING_DTYPES` there, by operation and dtype."""
        self.copies: Counter[str] = Counter()
        """Copies between the host and the device, by direction."""

    @contextmanager
    def recomputed(self, *args: Any) -> Iterator[None]:
        """Inside, a part of a forward pass is run again within the backward pass: gradient checkpointing."""
        self.learning = False
        try:
            with _Replaced(self), RECOMPUTATION(*args):
                yield
        finally:
            self.learning = True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.learning and func is torch.ops.prim.device.default:
            return META  # torch's engine asks, and would look for the device's streams; Python does not ask this way
        if self.learning and kwargs.get("device") == META:
            kwargs = {**kwargs, "device": self.device}  # it makes a gradient of another layout where it was told
        if _on_host((args, kwargs), kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        on_device = [tensor for tensor in (*given, *made) if tensor.device.type != "cpu"]
        self.calls += bool(on_device)
        self.missing.update(f"{func}: {tensor.dtype}" for tensor in on_device if tensor.dtype in MISSING_DTYPES)
        if given and made and (given[0].device.type == "cpu") != (made[0].device.type == "cpu"):
            self.copies["to the device" if given[0].device.type == "cpu" else "to the host"] += 1
        return result


def _on_host(values: Any, kwargs: Any) -> bool:
    """Whether an operation has to do with the CPU only."""
    device = kwargs.get("device")
    return not any(isinstance(tensor, FakeTensor) for tensor in _tensors(values)) and (
        device is None or torch.device(device).type == "cpu"
    )


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Replaced(TorchFunctionMode):
    """torch's functions that would ask for the device's own library, by others that give the same shapes."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(tensor, FakeTensor) for tensor in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        if func == _DEVICE:
            return args[0].fake_device
        if func in (Tensor.backward, torch.autograd.grad):
            return self._learn(func, *args, **kwargs)
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

    def _learn(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._watch.learning = True
        try:
            return func(*args, **kwargs)
        finally:
            self._watch.learning = False


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

"""Where networks run and in which precision."""

from __future__ import annotations

import torch

from ..errors import SettingsError

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by their short name."""


def choose_device(name: str = AUTO) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps", "xpu"); "auto" takes an accelerator if there is one.

    Raises:
        SettingsError: no such device here.
    """
    if name == AUTO:
        return _accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    # In this order: a name torch does not know; a backend it was built without (CUDA); one without operations here (MPS
    # on another machine than a Mac); one whose package is missing (HPU).
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise SettingsError(f"There is no device {name!r} here: expected {', '.join(_devices())}.") from error
    return device


def _accelerator() -> torch.device | None:
    """What this machine computes fastest on: CUDA, Apple's MPS, Intel's XPU or another one that torch knows."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    accelerator = getattr(torch, "accelerator", None)  # from torch 2.6 on
    if accelerator is not None:
        return accelerator.current_accelerator() if accelerator.is_available() else None
    return torch.device("mps") if torch.backends.mps.is_available() else None


def _devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    other = _accelerator()
    return [AUTO, "cpu", *cuda, *([other.type] if other is not None and not cuda else [])]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision of U-Net and ControlNet: fp32, bf16 or fp16; "auto" takes the fast one that the device is good at.

    Raises:
        SettingsError: unknown, or fp16 on a CPU.
    """
    if name == AUTO:
        return _fast_dtype(device)
    if name not in DTYPES:
        raise SettingsError(f"Unknown precision {name!r}: choose one of {AUTO}, {', '.join(DTYPES)}.")
    if name == "fp16" and device.type == "cpu":
        raise SettingsError("A CPU does not compute in fp16: choose bf16 or fp32.")
    return DTYPES[name]


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16  # as the published implementation
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AMX or AVX512-BF16); elsewhere it is slower than float32."""
    # Private names; torch versions without them count as CPUs without bfloat16.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe() for probe in probes if probe is not None)

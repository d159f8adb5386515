"""Foreign `.pth`, `.pt`, `.bin` files: opened without running anything that is inside them, or refused."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError

_NESTS = ("model", "state_dict")
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    zipfile.BadZipFile,
)
_RULE = "Foreign weights are opened only as plain tensors; take a .safetensors version from a source you trust"


def open_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The flat state dict of a torch file, memory-mapped where its container allows it.

    `{"model": …}` and `{"state_dict": …}` are unwrapped; entries that are not tensors (step counters) are dropped.

    Raises:
        WeightsError: a pickle that asks for code, a truncated file, or one without tensors.
    """
    state = _unwrap(_load(path))
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no weights: expected tensors by name, found {type(state).__name__} without any."
        )
    return tensors


def _load(path: str | os.PathLike[str]) -> Any:
    """torch.load in its safe mode, its many exceptions said in one sentence each."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return _torch_load(path)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except _DAMAGED as error:
        raise _unreadable(path, error) from error


def _torch_load(path: str | os.PathLike[str]) -> Any:
    if str(path).endswith(".safetensors"):
        # By such a name torch would call another reader; handed a stream, it looks at the content.
        with open(path, "rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _refusal(path: str | os.PathLike[str], error: Exception) -> WeightsError:
    """The safe reader said no: to a global that is not on its list, or to bytes that make no sense."""
    found = _REFUSED_GLOBAL.search(str(error))
    name = found.group(1) if found else _first_global(path)
    if name is None:
        return _unreadable(path, error)
    return WeightsError(f"{path} is refused: it is a pickle that asks for the code of {name}. {_RULE}.")


def _first_global(path: str | os.PathLike[str]) -> str | None:
    """The first `module.name` that a bare pickle of protocol 4 or 5 asks for, found without running it."""
    strings: list[str] = []
    try:
        with open(path, "rb") as handle:
            for opcode, argument, _ in pickletools.genops(handle):
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, IndexError, UnicodeDecodeError, EOFError):
        return None
    return None


def _unreadable(path: str | os.PathLike[str], error: Exception) -> WeightsError:
    if "TorchScript" in str(error):
        return WeightsError(f"{path} is refused: it is a TorchScript program, not a state dict. {_RULE}.")
    size = os.path.getsize(path)
    return WeightsError(
        f"{path} is truncated or damaged: its {size:,} bytes cannot be read as a torch file. Download it again."
    )


def _unwrap(loaded: Any) -> Mapping[Any, Any]:
    for name in _NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            return loaded[name]
    return loaded if isinstance(loaded, Mapping) else {}

"""Foreign `.pth`, `.pt`, `.bin` files: opened without running anything that is inside them, or refused.

A pickle is a program. Before torch's restricted reader runs it, its instructions are looked at without being carried
out: which names it asks for, how many steps it has, and how deep it nests what has to be hashed. What it can allocate
is then bounded by the file's own size.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import SeeSRError, WeightsError
from ..runtime.memory import is_exhaustion

_NESTS = ("model", "state_dict")
_OLDEST_TORCH = (2, 6)
"""Before it the restricted reader could be got around (CVE-2025-32434)."""
_MOST_STEPS = 2_000_000
_MOST_PROGRAM = 1 << 26
"""Bytes of the program alone; the numbers lie beside it."""
_MOST_NESTED = 10_000
"""Values in one tuple, those in tuples within it included; a tensor has some twenty."""
_LEGACY_PROGRAMS = 5
"""Magic number, version, byte order, the object itself, keys of its storages."""
_STORAGE = re.compile(r"torch (?:\w+Storage|storage (?:Untyped|Typed|_?\w+)Storage)")
_KNOWN = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch Tensor",
    "torch.nn.parameter Parameter",
    "torch.serialization _get_layout",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._tensor _rebuild_from_type_v2",
    "torch.storage UntypedStorage",
    "torch.storage TypedStorage",
}
_DTYPE = re.compile(r"torch (?:bool|u?int\d+|q?u?int\d+|float\d+(?:_\w+)?|bfloat16|half|float|double|long|complex\d+)")
_RULE = "Foreign weights are opened only as plain tensors; take a .safetensors version from a source you trust"


def open_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The flat state dict of a torch file, memory-mapped where its container allows it.

    `{"model": …}` and `{"state_dict": …}` are unwrapped; entries that are not tensors (step counters) are dropped.

    Raises:
        WeightsError: a pickle that asks for code or for more memory than its file has bytes, a truncated file, one
            without tensors, or a torch that cannot read pickles safely.
    """
    state = _unwrap(_load(path))
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"{path} holds no weights: expected tensors by name, found {type(state).__name__} without any."
        )
    for key, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise WeightsError(f"{path} is damaged: {key[:60]!r} has more numbers than are stored. Download it again.")
    return tensors


def _load(path: str | os.PathLike[str]) -> Any:
    """torch.load in its safe mode, its many exceptions said in one sentence each."""
    _require_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            zipped = zipfile.is_zipfile(path)
            for program in _zip_programs(path) if zipped else _legacy_programs(path):
                _examine(path, program)
            return _torch_load(path, zipped=zipped)
    except SeeSRError:
        raise
    except Exception as error:  # damaged files make readers raise what they like
        raise _unreadable(path, error) from error


def _require_torch(path: str | os.PathLike[str]) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if numbers < _OLDEST_TORCH:
        raise WeightsError(
            f"{path} is a pickle, which torch {torch.__version__} cannot open safely: install torch "
            f"{'.'.join(map(str, _OLDEST_TORCH))} or newer, or take a .safetensors version."
        )


def _torch_load(path: str | os.PathLike[str], *, zipped: bool) -> Any:
    if str(path).endswith(".safetensors"):
        # By such a name torch would call another reader; handed a stream, it looks at the content.
        with open(path, "rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _zip_programs(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The program in a torch zip file; torch stores entries as they are, so compressed ones are somebody else's."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise WeightsError(
                f"{path} is refused: it is a compressed archive or one that unpacks to more than its own size. {_RULE}."
            )
        names = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if any(entry.filename.endswith("constants.pkl") for entry in entries):
            raise WeightsError(f"{path} is refused: it is a TorchScript program, not a state dict. {_RULE}.")
        for entry in names:
            if entry.file_size > _MOST_PROGRAM:
                raise WeightsError(f"{path} is refused: its pickle has {entry.file_size:,} bytes. {_RULE}.")
            yield io.BytesIO(archive.read(entry))


def _legacy_programs(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The programs at the beginning of a file of torch before 1.6, which follow each other."""
    with Path(path).open("rb") as handle:
        for _ in range(_LEGACY_PROGRAMS):
            yield handle
            if handle.tell() > _MOST_PROGRAM:
                raise WeightsError(f"{path} is refused: its pickle has more than {_MOST_PROGRAM:,} bytes. {_RULE}.")


def _examine(path: str | os.PathLike[str], program: IO[bytes]) -> None:
    """Look at a program without running it.

    Every instruction states what it takes from the stack and puts there, so it is enough to keep how many values are in
    each: a tuple of tuples of … grows beyond bounds when it is hashed, though it is written in a line.
    """
    stack: list[int] = []  # how many values are in each; marks are 0
    memo: dict[int, int] = {}
    names: list[str] = []
    for steps, (code, argument, _) in enumerate(pickletools.genops(program)):
        if steps > _MOST_STEPS:
            raise WeightsError(f"{path} is refused: its pickle has more than {_MOST_STEPS:,} steps. {_RULE}.")
        if isinstance(argument, str):
            names = [*names[-1:], argument]
        if code.name in ("GLOBAL", "INST"):
            _require_known(path, str(argument))
        elif code.name == "STACK_GLOBAL":  # torch writes none, and its restricted reader takes none
            raise _asks_for(path, ".".join(names))
        elif code.name.startswith(("EXT", "NEXT_BUFFER", "READONLY")):
            raise WeightsError(f"{path} is refused: it is a pickle that asks for things outside of it. {_RULE}.")
        _step(stack, memo, code, argument)
        if code.name.startswith("TUPLE") and stack[-1] > _MOST_NESTED:
            raise WeightsError(f"{path} is refused: its pickle nests more than any file of weights. {_RULE}.")


def _step(stack: list[int], memo: dict[int, int], code: pickletools.OpcodeInfo, argument: Any) -> None:
    if "PUT" in code.name:
        memo[argument] = stack[-1]
    elif code.name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif "GET" in code.name:
        stack.append(memo[argument])
    elif code.name == "MARK":
        stack.append(0)
    else:
        taken = _take(stack, code)
        stack += [1 + taken] * len(code.stack_after)


def _take(stack: list[int], code: pickletools.OpcodeInfo) -> int:
    """Remove what an instruction takes; how many values that was."""
    total = 0
    before = list(code.stack_before)
    if pickletools.markobject in before:
        while (count := stack.pop()) != 0:
            total += count
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        total += stack.pop()
    return min(total, _MOST_STEPS)


def _require_known(path: str | os.PathLike[str], name: str) -> None:
    if name in _KNOWN or _STORAGE.fullmatch(name) or _DTYPE.fullmatch(name):
        return
    raise _asks_for(path, name.replace(" ", "."))


def _asks_for(path: str | os.PathLike[str], name: str) -> WeightsError:
    return WeightsError(f"{path} is refused: it is a pickle that asks for the code of {name[:80]}. {_RULE}.")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> WeightsError:
    size = os.path.getsize(path)
    what = "ask for more memory than there is" if is_exhaustion(error) else "cannot be read as a torch file"
    return WeightsError(f"{path} is truncated or damaged: its {size:,} bytes {what}. Download it again.")


def _unwrap(loaded: Any) -> Mapping[Any, Any]:
    for name in _NESTS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            return loaded[name]
    return loaded if isinstance(loaded, Mapping) else {}

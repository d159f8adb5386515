"""Files written as a stream: whole, or not there at all."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from seesr_core.errors import ResourceError, SettingsError
from seesr_core.formats.stream import Slot, ordered, write_stream
from seesr_core.formats.tensorfile import DIGEST, is_undamaged, read_header
from seesr_core.runtime import files

from .weights_files import files_below, save


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write: as Linux can, and as other systems do."""
    if request.param == "named":
        monkeypatch.setattr(files, "_open_nameless", lambda folder: None)
    return str(request.param)


def slots() -> dict[str, Slot]:
    return ordered({f"k{i}": Slot((50,), torch.float16) for i in range(4)})


def test_a_stream_that_ends_early_leaves_the_old_file(way: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {"old": torch.ones(3)})
    before = path.read_bytes()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "k0", torch.zeros(50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(path, slots(), tensors(), {})
    assert path.read_bytes() == before
    assert files_below(tmp_path) == ["x.safetensors"]


def test_a_stream_is_a_safetensors_file(way: str, tmp_path: Path) -> None:
    mixed = ordered({"b": Slot((2, 3), torch.int8), "a": Slot((), torch.float32), "c": Slot((4,), torch.float16)})
    assert list(mixed) == ["a", "c", "b"]
    values = {"a": torch.tensor(0.1), "c": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3)}
    write_stream(tmp_path / "x.safetensors", mixed, ((key, values[key]) for key in mixed), {"note": "größer"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], values[key].to(slot.dtype)) for key, slot in mixed.items())
    header = read_header(tmp_path / "x.safetensors")
    assert (header.metadata["note"], len(header.metadata[DIGEST]), is_undamaged(header)) == ("größer", 64, True)
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "y.safetensors").write_bytes(content[:-3] + bytes([content[-3] ^ 16]) + content[-2:])
    assert is_undamaged(read_header(tmp_path / "y.safetensors")) is False
    (tmp_path / "y.safetensors").unlink()
    assert files_below(tmp_path) == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o600 == 0o600


def test_promises_are_kept(tmp_path: Path) -> None:
    for tensors in ([("k0", torch.zeros(49))], [("k1", torch.zeros(50))], [("k0", torch.zeros(50))]):
        with pytest.raises(ValueError, match="was promised"):
            write_stream(tmp_path / "x.safetensors", slots(), tensors, {})
    with pytest.raises(SettingsError, match=r"k0 is not finite as torch\.float16"):
        write_stream(tmp_path / "x.safetensors", slots(), [("k0", torch.full((50,), 1e6))], {})
    with pytest.raises(SettingsError, match=r"must end in \.safetensors"):
        write_stream(tmp_path / "x.pth", {}, [], {})
    assert files_below(tmp_path) == []


class _FullDisk(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "_open_nameless", lambda folder: _FullDisk())
    with pytest.raises(ResourceError, match=r"No space left on device\. Nothing was changed there"):
        write_stream(tmp_path / "x.safetensors", {}, [], {})

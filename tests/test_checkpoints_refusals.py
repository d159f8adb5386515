"""Files that are no weights, are damaged, or would run code: one sentence each, and nothing is run."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from seesr_core.errors import ResourceError, SettingsError, WeightsError
from seesr_core.formats.detect import detect
from seesr_core.formats.metadata import cast, save_safetensors
from seesr_core.formats.tensorfile import load_tensors

from .checkpoint_files import write_zeros
from .full_disk import files_of_at_most

MARK = "seesr-test-was-here"


class Payload:
    """Unpickled without care, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.folder / MARK),)


def refusal(path: Path) -> str:
    """The sentence with which both ways of opening a file refuse it."""
    with pytest.raises(WeightsError) as header:
        detect(path)
    with pytest.raises(WeightsError) as tensors:
        load_tensors(path)
    assert str(header.value) == str(tensors.value)
    assert "\n" not in str(header.value)
    assert str(header.value).count(str(path)) == 1
    return str(header.value)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_pickle(tmp_path: Path, name: str, legacy: bool) -> None:
    path = tmp_path / name
    state = {"weight": torch.zeros(3), "payload": Payload(tmp_path)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert f"is refused: it is a pickle that asks for the code of {os.mkdir.__module__}.mkdir" in refusal(path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_malicious_bare_pickle(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Payload(tmp_path), protocol=protocol))
    assert f"asks for the code of {os.mkdir.__module__}.mkdir" in refusal(path)
    assert not (tmp_path / MARK).exists()


def test_the_payload_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / MARK).exists()


def test_whole_module(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    assert "asks for the code of torch.nn.modules.linear.Linear" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_pickle(tmp_path: Path, legacy: bool, share: float) -> None:
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.zeros(5000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "is truncated or damaged" in refusal(path)


@pytest.mark.parametrize("kept", [8, 9, 40, -1])
def test_truncated_safetensors(tmp_path: Path, kept: int) -> None:
    path = write_zeros(tmp_path / "x.safetensors", {"weight": (100,)})
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged" in refusal(path)


def test_a_truncated_safetensors_file_states_both_sizes(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "x.safetensors", {"weight": (1000,)})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-24])
    assert f"expected {size:,} bytes, found {size - 24:,}" in refusal(path)


@pytest.mark.parametrize(
    "text", [b"{not json", b'{"weight":{"shape":[1]}}', b'{"weight":3}', b'{"__metadata__":[],"w":{"dtype":1}}']
)
def test_garbage_header(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "safetensors header cannot be read" in refusal(tmp_path / "x.safetensors")


def test_any_header_length_is_safetensors(tmp_path: Path) -> None:
    """A header length may look like the first bytes of a zip archive (PK) or of a pickle (0x80)."""
    for length, start in ((0x4B50, b"PK"), (0x80, b"\x80")):
        text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", length) + text + b"\x07")
        assert path.read_bytes()[:2].startswith(start)
        assert load_tensors(path)["w"].tolist() == [7]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.bin"])
def test_zero_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("form", "words"), [("JPEG", "a JPEG picture"), ("PNG", "a PNG picture"), ("GIF", "a GIF picture")]
)
def test_renamed_picture(tmp_path: Path, form: str, words: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.safetensors", format=form)
    assert f"is {words}: expected a weights file" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"just some text that somebody saved here", "is no weights file or is damaged"),
        (b"abc", "is no weights file or is damaged"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert words in refusal(tmp_path / "x.pth")


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "x.pth")


def test_a_folder(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"epoch": 3}}, {"state_dict": {}}])
def test_pickle_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert "holds no weights" in refusal(tmp_path / "x.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "x.safetensors", {"weight": (3,)})
    before = path.read_bytes()
    with files_of_at_most(len(before)), pytest.raises(ResourceError, match="File too large"):
        save_safetensors(path, {"weight": torch.ones(400)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_views_and_shared_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "row": whole[1], "turned": whole.t(), "same": whole}
    save_safetensors(tmp_path / "x.safetensors", tensors, {})
    found = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_other_dtypes_are_not_stored() -> None:
    with pytest.raises(SettingsError, match=r"float16 or float32, not as torch\.bfloat16"):
        cast({"weight": torch.zeros(1)}, torch.bfloat16)

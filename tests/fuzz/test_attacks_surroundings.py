"""Hostile text beside weights and pictures: the host's own files, tokenizers, the model of a metric."""

from __future__ import annotations

import errno
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from seesr_core.errors import DataError, WeightsError
from seesr_core.formats.base import folder_tokenizer
from seesr_core.formats.sd import read_base
from seesr_core.install.environment import look_at_host
from seesr_core.install.places import extra_folders
from seesr_core.model_files import NANO, find_model
from seesr_core.runtime.files import listed
from trainer.engine import command
from trainer.evaluate.quality.measure import read_niqe_model

PATHS = {
    "a user who is not": "a: {base_path: ~nobody-at-all/x, dape: models}",
    "a name too long": f"a: {{dape: {'x' * 5000}}}",
    "nested without end": "[" * 5000,
    "no text": "a: {dape: \xff}",
    "a NUL": 'a: {dape: "x\\0y"}',
    "lists for names": "a: {base_path: [1, {}], dape: [[]]}",
}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_model_paths_of_the_host_that_lead_nowhere(tmp_path: Path, text: str) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "extra_model_paths.yaml").write_bytes(text.encode("latin-1"))
    assert extra_folders(tmp_path / "models", "dape") == []


def test_a_version_of_the_host_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "comfyui_version.py").write_bytes(b'# \xff\x80\n__version__ = "0.33.0"\n')
    assert look_at_host(tmp_path / "models").version == "0.33.0"


def test_a_folder_that_cannot_be_listed_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert listed(tmp_path) == [tmp_path / "file"]
    assert not caplog.text
    assert listed(tmp_path / "file") == []
    assert f"{tmp_path / 'file'} is left out: Not a directory" in caplog.text


def test_what_the_system_refuses_a_training_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def action() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/photos")

    assert command.run(action) == 1
    assert caplog.messages == ["/photos: Permission denied. Check the name and its permissions."]


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, bytes]:
    """The files of the small model's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        read_base(find_model(NANO).base).tokenizer.write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("length", [{"x": 1}, "77", [77]])
def test_a_tokenizer_whose_length_is_no_number(tmp_path: Path, tokenizer: dict[str, bytes], length: object) -> None:
    config = json.loads(tokenizer["tokenizer_config.json"])
    for name, content in tokenizer.items():
        (tmp_path / name).write_bytes(content)
    assert folder_tokenizer(tmp_path).model_max_length == config["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": length}))
    with pytest.raises(WeightsError, match=r"model_max_length of tokenizer_config\.json should be a whole number"):
        folder_tokenizer(tmp_path)


def niqe_model(header: bytes = b"", zeros: int = 0) -> bytes:
    """A file of NIQE's form, one of its arrays with another header, or with so many bytes beside the arrays."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}.items():
            array = io.BytesIO()
            np.save(array, np.ones(shape))
            head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            archive.writestr(f"{name}.npy", head if header and name == "mu_pris_param" else array.getvalue())
        if zeros:
            archive.writestr("more.npy", bytes(zeros))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        niqe_model(b"{'descr': '<f8', 'fortran_order': False, 'shape': ("),
        niqe_model(b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }"),
        niqe_model(b"(" * 2000),
        niqe_model(zeros=1 << 25),
        niqe_model()[:300],
        b"\x93NUMPY\x01\x00",
        b"",
    ],
    ids=["open bracket", "absurd shape", "nested", "bomb", "cut", "one array", "empty"],
)
def test_a_niqe_model_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "niqe.npz"
    path.write_bytes(niqe_model())
    assert read_niqe_model(path).window.shape == (7, 7)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"niqe\.npz should hold mu_pris_param"):
        read_niqe_model(path)

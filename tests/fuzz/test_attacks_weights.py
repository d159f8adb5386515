"""Weights files made to do harm: one sentence, no code, no more memory than a file has bytes, and no folder spoiled."""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.cli.main import main
from seesr_core.errors import SeeSRError, WeightsError
from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.pickles import open_pickle
from seesr_core.formats.ram import read_dape
from seesr_core.formats.tensorfile import load_tensors
from seesr_core.install.inspection import inspect_file
from seesr_core.model_files import find_model
from seesr_core.runtime.memory import peak_memory, reset_peak

from .attacks import HEADERS, PICKLES, WRONG_RANKS, with_shapes

CPU = torch.device("cpu")


@pytest.fixture
def model(spoilable: Path) -> Path:
    return spoilable


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        inspect_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.safetensors"):
        load_tensors(path)
    if content is not HEADERS["type is unknown"]:  # a newer safetensors may know it, so that looking is allowed
        refusal(path)


@pytest.mark.parametrize("shapes", WRONG_RANKS.values(), ids=WRONG_RANKS)
@pytest.mark.parametrize("claim", ["", "seesr-dape", "seesr-control", "seesr-base", "seesr-dape-lora"])
def test_weights_of_wrong_ranks(tmp_path: Path, shapes: dict[str, list[int]], claim: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_shapes(shapes, {"format": claim, "version": "1", "config": "{}"}))
    assert inspect_file(path).label
    for reader in (load_base, read_control, read_dape):
        with pytest.raises(WeightsError, match=r"x\.safetensors"):
            reader(path)


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_a_pickle_made_to_do_harm(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    reset_peak(CPU)
    before, start = peak_memory(CPU) or 0, time.process_time()
    refusal(path)
    assert (peak_memory(CPU) or 0) - before < 200_000_000
    assert time.process_time() - start < 5


def test_every_cut_of_a_legacy_file_is_one_sentence(tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, whole, _use_new_zipfile_serialization=False)
    path = tmp_path / "x.pth"
    for length in range(1, len(whole.getvalue())):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(WeightsError, match=r"x\.pth"):
            open_pickle(path)
    path.write_bytes(whole.getvalue())
    assert set(open_pickle(path)) == {"a", "b"}


def test_a_tensor_with_more_numbers_than_are_stored(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pth")
    assert "'x' has more numbers than are stored" in refusal(tmp_path / "x.pth")


def test_an_old_torch_opens_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    assert "which torch 2.5.1+cu121 cannot open safely: install torch 2.6 or newer" in refusal(tmp_path / "x.pth")


def test_one_bad_file_is_a_line_of_the_list(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (model / "bad.safetensors").write_bytes(HEADERS["metadata is a list"])
    (model / "worse.pth").write_bytes(PICKLES["asks for 3 GB"])
    assert find_model(model).base.name == "tiny.safetensors"
    assert main(["inspect", str(model)]) == 1
    out, err = capfd.readouterr()
    assert "a DAPE file of this project" in out
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]
    assert main(["doctor", "--to", str(model), "--quick"]) == 1
    out, err = capfd.readouterr()
    assert "bad.safetensors is damaged" in out
    assert "Traceback" not in out + err


def rewritten(path: Path, changes: Mapping[str, Any]) -> Path:
    with safe_open(path, "pt") as handle:
        fields = handle.metadata()
    save_file(load_file(path), path, {**fields, **{name: json.dumps(value) for name, value in changes.items()}})
    return path


def metadata_of(path: Path, name: str) -> Any:
    with safe_open(path, "pt") as handle:
        return json.loads(handle.metadata()[name])


def test_a_config_hands_nothing_but_sizes_to_libraries(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads kernels by the name in `attn_implementation`."""
    path = model / "tiny.safetensors"
    text = {**metadata_of(path, "text_config"), "attn_implementation": "x/y", "_attn_implementation": "x/y"}
    tokenizer = {**metadata_of(path, "tokenizer_config"), "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": "e"}}
    rewritten(path, {"text_config": text, "tokenizer_config": tokenizer})
    import transformers

    seen: list[dict[str, Any]] = []
    config_class = transformers.CLIPTextConfig

    def record(**entries: Any) -> Any:
        seen.append(entries)
        return config_class(**entries)

    monkeypatch.setattr(transformers, "CLIPTextConfig", record)
    assert load_base(path).tokenizer.__class__.__name__.startswith("CLIPTokenizer")
    assert "attn_implementation" not in str(seen)


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("tiny", "text_config", {"num_attention_heads": 0}),
        ("tiny", "text_config", {"num_attention_heads": "two"}),
        ("tiny", "text_config", {"hidden_act": "x/y"}),
        ("tiny", "tokenizer_vocab", {"a": -1}),
        ("tiny", "tokenizer_config", {"model_max_length": 10**30}),
        ("tiny", "scheduler", {"beta_start": "a lot"}),
        ("dape", "config", {"num_tags": 10**12}),
        ("dape", "config", {"swin": {"image_size": 1 << 20, "window": 1 << 10}}),
        ("dape", "config", {"swin": {"patch_size": 0}}),
        ("dape", "thresholds", ["high"]),
        ("dape", "tags", {"a": 1}),
        ("seesr", "config", {"unet": 3}),
        ("seesr", "step", "many"),
        ("seesr", "defaults", {"steps": [1]}),
    ],
)
def test_metadata_of_wrong_types_and_sizes(model: Path, name: str, field: str, change: Any) -> None:
    path = model / f"{name}.safetensors"
    old = metadata_of(path, field)
    value = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    if isinstance(old, dict) and "swin" in change:
        value = {**old, "swin": {**old["swin"], **change["swin"]}}
    rewritten(path, {field: value})
    readers: dict[str, Callable[[Path], object]] = {"tiny": load_base, "dape": read_dape, "seesr": read_control}
    with pytest.raises(WeightsError, match=rf"{name}\.safetensors") as caught:
        readers[name](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"layers_per_block": 10**6}, {"down_block_types": ["Evil"]}, {"block_out_channels": [64] * 100}]
)
def test_a_network_that_would_be_built_for_ever(model: Path, change: dict[str, Any]) -> None:
    path = model / "seesr.safetensors"
    config = metadata_of(path, "config")
    rewritten(path, {"config": {**config, "controlnet": {**config["controlnet"], **change}}})
    with pytest.raises(WeightsError, match="the metadata field 'config' cannot be used"):
        read_control(path)


def test_numbers_of_thousands_of_digits_and_deep_nests_in_metadata(model: Path) -> None:
    path = model / "dape.safetensors"
    with safe_open(path, "pt") as handle:
        fields = handle.metadata()
    for text in ("9" * 5000, "[" * 100_000, '{"swin": Infinity}', "1e999"):
        save_file(load_file(path), path, {**fields, "config": text})
        with pytest.raises(SeeSRError, match="dape"):
            read_dape(path)


def test_a_header_length_beyond_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "truncated or damaged" in refusal(tmp_path / "x.safetensors")

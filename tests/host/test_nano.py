"""The small model through the host's own checkpoint loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from .locate import PLUGIN, plugin
from .nets import LATENT_CHANNELS
from .small_base import PROMPT, RECORDED, TEXT, TIMESTEP, UNET, small_inputs, write_small_base


def load(path: Path) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, as Load Checkpoint gives them."""
    import comfy.sd

    plugin("nodes.host.nano").register()
    loaded: Any = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
    return loaded[:3]


@contextmanager
def previews_on() -> Iterator[None]:
    """The host started with previews."""
    from comfy.cli_args import LatentPreviewMethod, args

    before, args.preview_method = args.preview_method, LatentPreviewMethod.Auto
    try:
        yield
    finally:
        args.preview_method = before


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base file of other sizes than the shipped one."""
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    write_small_base(path)
    return path


@pytest.fixture(scope="module")
def small(small_file: Path) -> tuple[Any, Any, Any]:
    """The same, loaded."""
    return load(small_file)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any, Any]:
    """The embedded model, loaded."""
    return load(plugin("nodes.host.nano").EMBEDDED)


def recorded(name: str) -> Any:
    """Compares with the core's numbers."""
    return pytest.approx(RECORDED[name], abs=1e-5)


def encode(clip: Any, text: str) -> Tensor:
    """Text states (1, L, D)."""
    return clip.encode_from_tokens(clip.tokenize(text))


def test_networks_of_the_host_give_the_numbers_of_the_core(small: tuple[Any, Any, Any]) -> None:
    model, clip, vae = small
    latent, picture = small_inputs()
    states = encode(clip, PROMPT)
    assert states[0, [1, 76], :2].flatten().tolist() == recorded("text")
    with torch.no_grad():
        eps = model.model.diffusion_model(latent, torch.tensor([TIMESTEP]), context=states)
    assert eps[0, :, 3, 5].tolist() == recorded("eps")
    encoded = model.model.process_latent_in(vae.encode(picture.movedim(1, -1)))
    assert encoded[0, :, 1, 2].tolist() == recorded("latent")
    decoded = vae.decode(model.model.process_latent_out(latent))
    # The host's autoencoder cuts at black and white.
    assert decoded[0, 9, 9].tolist() == pytest.approx([max(level, 0.0) for level in RECORDED["picture"]], abs=1e-5)


def test_a_file_brings_its_own_tokenizer(small: tuple[Any, Any, Any]) -> None:
    _, clip, _ = small
    ids = [number for number, _ in clip.tokenize(PROMPT)["h"][0]]
    assert ids[:6] == [9, 8, 7, 0, 5, 10]
    assert ids[6:] == [TEXT["pad_token_id"]] * 71


def test_shipped_file_is_read_whole(shipped: tuple[Any, Any, Any]) -> None:
    import comfy.utils

    nano = plugin("nodes.host.nano")
    model, clip, vae = shipped
    text_config, files = nano._text_of(comfy.utils.load_torch_file(str(nano.EMBEDDED)))
    assert type(model.model.model_config) is nano.SeeSRNano
    assert model.model.model_type.name == "EPS"
    assert (vae.latent_channels, vae.spacial_compression_encode()) == (LATENT_CHANNELS, 8)
    assert encode(clip, "a photo of food").shape == (1, 77, text_config["hidden_size"])
    words = [clip.tokenizer.clip_h.inv_vocab[number] for number, _ in clip.tokenize("a photo of food")["h"][0]]
    assert "food</w>" in words
    assert set(words) <= files.vocab.keys()


def test_autoencoder_scale_is_taken_back(shipped: tuple[Any, Any, Any]) -> None:
    # The host multiplies latents of this family by 0.18215; the small model's files have their own scale.
    nano = plugin("nodes.host.nano")
    model, _, vae = shipped
    scale = plugin("seesr_core.formats.sd").read_base(nano.EMBEDDED).vae_config["scaling_factor"]
    picture = small_inputs()[1]
    with torch.no_grad():
        plain = vae.first_stage_model.taesd_encoder(picture)
    seen_by_unet = model.model.process_latent_in(vae.encode(picture.movedim(1, -1)))
    assert model.get_model_object("latent_format").latent_channels == LATENT_CHANNELS
    torch.testing.assert_close(seen_by_unet, scale * plain, atol=1e-5, rtol=1e-5)


def test_a_file_of_sixteen_latent_channels_brings_its_own_latents(tmp_path: Path) -> None:
    import comfy.sd

    path, nano = tmp_path / "sixteen.safetensors", plugin("nodes.host.nano")
    write_small_base(path, latent_channels=16)
    model, clip, vae = load(path)
    latents = model.get_model_object("latent_format")
    assert isinstance(latents, nano.CosineLatent)
    assert (latents.latent_channels, vae.latent_channels, len(latents.latent_rgb_factors)) == (16, 16, 16)
    # The host takes U-Nets of more than four input channels for inpainting ones, and would give them a mask.
    assert model.model.concat_keys == ()
    picture = small_inputs()[1]
    with torch.no_grad():
        plain = vae.first_stage_model.taesd_encoder(picture)
        eps = model.model.diffusion_model(plain, torch.tensor([TIMESTEP]), context=encode(clip, PROMPT))
    assert eps.shape == plain.shape == (1, 16, 4, 8)
    torch.testing.assert_close(model.model.process_latent_in(vae.encode(picture.movedim(1, -1))), plain)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model, clip, vae)
    again, _, _ = load(tmp_path / "saved.safetensors")
    assert type(again.model.model_config) is nano.SeeSRNano


def test_the_preview_s_factors_are_those_of_the_trainer_s_code() -> None:
    factors = torch.tensor(plugin("nodes.host.nano").CODE_RGB)
    # One level of each primary colour: the trainer's own arithmetic, which the host's environment does not have.
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert (factors[0] / factors[0, 0]).tolist() == [1.0, 1.0, 1.0]
    assert (factors[[12, 15]] @ luma).abs().max() < 2e-4


@pytest.mark.parametrize("which", ["small", "shipped"])
def test_saved_checkpoint_loads_again(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import comfy.sd

    model, clip, vae = request.getfixturevalue(which)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model, clip, vae)
    again, clip_again, _ = load(tmp_path / "saved.safetensors")
    torch.testing.assert_close(encode(clip_again, "a b, ab!"), encode(clip, "a b, ab!"), atol=1e-6, rtol=0)
    saved, loaded = model.model.diffusion_model.state_dict(), again.model.diffusion_model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_file_without_tokenizer_of_other_sizes_is_refused(small_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_file)
    del tensors[plugin("nodes.host.nano").TEXT_JSON]
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(plugin("seesr_core.errors").WeightsError, match=r"no tokenizer inside.*11 words and width 64"):
        load(tmp_path / "bare.safetensors")


def test_registering_twice_adds_one_entry_at_the_end() -> None:
    import comfy.supported_models

    nano = plugin("nodes.host.nano")
    nano.register()
    before = list(comfy.supported_models.models)
    nano.register()
    assert comfy.supported_models.models == before
    assert [model.__name__ for model in before].count("SeeSRNano") == 1
    assert before[-1] is nano.SeeSRNano


OTHERS: dict[str, dict[str, Any]] = {
    "SD15": {"model_channels": 320, "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None},
    "SD20": {"model_channels": 320, "context_dim": 1024, "use_linear_in_transformer": True, "adm_in_channels": None},
    "SDXL": {"model_channels": 320, "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816},
    "none of the host's": {
        "model_channels": 192,
        "context_dim": 640,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
}
_DEPTHS: dict[str, Any] = {"SDXL": [0, 0, 2, 2, 10, 10]}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_detected_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_detection
    import comfy.supported_models

    nano = plugin("nodes.host.nano")
    config = {
        **OTHERS[name],
        "in_channels": 4,
        "use_temporal_attention": False,
        "transformer_depth": _DEPTHS.get(name, [1] * 8),
    }
    # Even with a text encoder beside it.
    state = {nano._TOKENS: torch.empty(7, config["context_dim"])}
    nano.register()
    found = comfy.model_detection.model_config_from_unet_config(config, state)
    monkeypatch.setattr(
        comfy.supported_models, "models", [m for m in comfy.supported_models.models if m is not nano.SeeSRNano]
    )
    without = comfy.model_detection.model_config_from_unet_config(config, state)
    assert type(found) is type(without)
    assert name not in ("SD15", "SD20", "SDXL") or type(found).__name__ == name


@pytest.mark.parametrize("change", [{"model_channels": 320}, {"context_dim": 32}, {"in_channels": 9}])
def test_only_small_models_with_their_own_text_match(change: dict[str, int]) -> None:
    nano = plugin("nodes.host.nano")
    config = {
        "model_channels": UNET["block_out_channels"][0],
        "context_dim": UNET["cross_attention_dim"],
        "in_channels": 4,
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    state = {nano._TOKENS: torch.empty(11, UNET["cross_attention_dim"])}
    assert nano.SeeSRNano.matches(config, state)
    assert not nano.SeeSRNano.matches({**config, **change}, state)
    assert not nano.SeeSRNano.matches(config)
    assert not nano.SeeSRNano.matches(config, {})


def test_live_previews_have_the_photo_s_colours(shipped: tuple[Any, Any, Any]) -> None:
    """The host's own preview of a photo's latent, against the photo."""
    model, _, vae = shipped
    photo = Image.open(PLUGIN / "seesr_core" / "nano" / "example.jpg").convert("RGB")
    photo = photo.resize((photo.width // 8 * 8, photo.height // 8 * 8))
    latent = vae.encode(torch.from_numpy(np.array(photo))[None].float() / 255)
    assert _preview_error(model.get_model_object("latent_format"), latent, photo) < (50 if LATENT_CHANNELS == 4 else 2)


def _preview_error(latent_format: Any, latent: Tensor, photo: Image.Image) -> float:
    """Root mean square over cells and channels, in levels of 255."""
    from latent_preview import get_previewer

    with previews_on():
        previewer = get_previewer(torch.device("cpu"), latent_format)
    preview = previewer.decode_latent_to_preview(latent_format.process_in(latent)).convert("RGB")
    cells = photo.resize(preview.size, Image.Resampling.BOX)
    return float(np.sqrt(np.mean((np.asarray(preview, np.float64) - np.asarray(cells, np.float64)) ** 2)))

"""The base model as one file: what goes in comes out, under the names that stock loaders look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.errors import SettingsError, WeightsError
from seesr_core.formats.base import build_tokenizer, load_base
from seesr_core.formats.sd import TEXT_JSON, BaseParts, TokenizerFiles, read_base, unpack_text, write_base

from .checkpoint_files import normal, randomize, tokenizer_files, unet_config, write_zeros

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel

    from seesr_core.method.unet import build_unet

    text = CLIPTextConfig(
        vocab_size=9,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return {
        "unet": randomize(build_unet(unet_config([False, True, True], widths=[32, 64, 64]), context_dim=16), 1),
        "vae": randomize(AutoencoderTiny(scaling_factor=0.5), 2),
        "text_encoder": randomize(CLIPTextModel(text), 3),
    }


@pytest.fixture(scope="module")
def parts(modules: dict[str, Any]) -> BaseParts:
    info = {"recipe": "nano", "step": 7}
    return BaseParts.from_modules(**modules, tokenizer=tokenizer_files(), scheduler=SCHEDULER, info=info)


@pytest.fixture(scope="module")
def path(parts: BaseParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(target, parts, dtype=torch.float32)
    return target


def test_weights_and_settings_come_back(parts: BaseParts, path: Path) -> None:
    again = read_base(path)
    for name in ("unet_state", "vae_state", "text_state"):
        before, after = getattr(parts, name), getattr(again, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (again.scheduler, again.info, again.tokenizer) == (parts.scheduler, parts.info, parts.tokenizer)


def test_loaded_modules_compute_the_same(modules: dict[str, Any], path: Path) -> None:
    from seesr_core.method.unet import build_unet

    base = load_base(path)
    unet: Any = build_unet(base.unet_config, context_dim=16)
    unet.load_state_dict(base.unet_state, strict=False)
    x, text, ids = normal(1, 4, 16, 16), normal(1, 5, 32), torch.tensor([[0, 2, 8, 1]])
    image = normal(1, 3, 32, 32).tanh()
    with torch.no_grad():
        assert torch.equal(unet(x, 5, text).sample, modules["unet"](x, 5, text).sample)
        assert torch.equal(base.vae.encode(image).latents, modules["vae"].encode(image).latents)
        assert torch.equal(base.vae.decode(x).sample, modules["vae"].decode(x).sample)
        assert torch.equal(base.text_encoder(ids)[0], modules["text_encoder"](ids)[0])
    assert base.vae.config.scaling_factor == 0.5
    assert base.scheduler == SCHEDULER


def test_sizes_are_read_from_shapes_not_from_metadata(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    lying = {**json.loads(metadata["text_config"]), "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1}
    other = tmp_path / "lying.safetensors"
    save_file(load_file(path), other, {**metadata, "text_config": json.dumps(lying)})
    text = read_base(other).text_config
    assert (text["vocab_size"], text["hidden_size"], text["num_hidden_layers"]) == (9, 32, 3)
    assert text["num_attention_heads"] == 4


def test_names_that_stock_loaders_look_for(path: Path) -> None:
    keys = load_file(path).keys()
    assert {
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.taesd_encoder.0.weight",
        "first_stage_model.taesd_decoder.1.weight",
        "first_stage_model.vae_scale",
        "first_stage_model.vae_shift",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc2.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    } <= keys
    assert not any("image_attentions" in key for key in keys)


def test_the_scale_in_the_file_gives_a_stock_reader_the_units_of_the_unet(path: Path) -> None:
    """A stock reader encodes x to encoder(x) / vae_scale and hands 0.18215 times that to the U-Net."""
    scale = load_file(path)["first_stage_model.vae_scale"]
    assert scale.shape == ()
    assert 0.18215 / scale.item() == pytest.approx(0.5, rel=1e-6)


def test_half_precision_halves_the_file(parts: BaseParts, path: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    write_base(half, parts)
    assert half.stat().st_size < 0.6 * path.stat().st_size
    again = read_base(half)
    assert {t.dtype for t in again.unet_state.values()} == {torch.float16}
    assert again.vae_config["scaling_factor"] == 0.5


def test_tokenizer_goes_into_the_file_and_comes_out(path: Path) -> None:
    tokenizer = build_tokenizer(read_base(path).tokenizer)
    ids = tokenizer("ab a ü", padding="max_length", max_length=8, truncation=True)["input_ids"]
    assert ids == [0, 8, 5, *tokenizer("ü")["input_ids"][1:-1], 1, 1, 1, 1][:8]
    assert tokenizer.model_max_length == 16
    again = TokenizerFiles.from_tokenizer(tokenizer)
    assert (again.vocab, again.merges) == (tokenizer_files().vocab, tokenizer_files().merges)


def test_tokenizer_files_as_transformers_4_saves_them() -> None:
    class SlowTokenizer:
        bos_token, eos_token, unk_token, pad_token = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>", "!"
        model_max_length = 16

        def save_pretrained(self, folder: str) -> None:
            tokenizer_files().write(Path(folder))

    found = TokenizerFiles.from_tokenizer(SlowTokenizer())
    assert (found.vocab, found.merges) == (tokenizer_files().vocab, tokenizer_files().merges)
    assert (found.config["pad_token"], found.config["model_max_length"]) == ("!", 16)


def test_a_checkpoint_of_stable_diffusion_is_sent_to_its_folder(tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.{}.weight"
    shapes = {key.format("0.0"): (320, 4, 3, 3), key.format("1.1.transformer_blocks.0.attn2.to_k"): (320, 1024)}
    path = write_zeros(tmp_path / "sd2.safetensors", shapes)
    with pytest.raises(
        WeightsError, match=r"looks like a single-file checkpoint \(Stable Diffusion 2\.x\); expected .*folder"
    ):
        load_base(path)


def test_another_autoencoder_is_not_written(parts: BaseParts, tmp_path: Path) -> None:
    narrow = {**parts.vae_config, "encoder_block_out_channels": (32, 32, 32, 32)}
    other = BaseParts(**{name: getattr(parts, name) for name in BaseParts.__slots__} | {"vae_config": narrow})
    with pytest.raises(SettingsError, match=r"TAESD's sizes .* found channels \[32, 64\]"):
        write_base(tmp_path / "x.safetensors", other)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_numbers_are_not_written(parts: BaseParts, tmp_path: Path) -> None:
    state = {**parts.unet_state, "conv_in.bias": torch.full((32,), 1e6)}
    other = BaseParts(**{name: getattr(parts, name) for name in BaseParts.__slots__} | {"unet_state": state})
    with pytest.raises(SettingsError, match=r"input_blocks\.0\.0\.bias is not finite as torch\.float16"):
        write_base(tmp_path / "x.safetensors", other)
    assert not list(tmp_path.iterdir())


def test_a_missing_text_weight_is_named(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    tensors = {key: t for key, t in load_file(path).items() if not key.endswith("final_layer_norm.bias")}
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken, metadata)
    with pytest.raises(
        WeightsError, match=r"broken\.safetensors: the text encoder does not fit.*final_layer_norm\.bias"
    ):
        load_base(broken)


def test_a_newer_version_is_refused(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(path), newer, {**metadata, "version": "2"})
    with pytest.raises(WeightsError, match="version 2; this release reads up to 1"):
        read_base(newer)


def test_text_settings_and_tokenizer_are_a_tensor_too(path: Path, parts: BaseParts) -> None:
    assert unpack_text(load_file(path)[TEXT_JSON]) == (parts.text_config, parts.tokenizer)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"text_config": {}}', '{"text_config": {}, "tokenizer": {"x": 1}}'])
def test_a_damaged_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer in .*text_json cannot be read"):
        unpack_text(torch.tensor(list(text.encode()), dtype=torch.uint8))

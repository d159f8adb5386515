"""Key names of U-Net and tiny autoencoder in single files: known ones, round trips, diffusers' own conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seesr_core.errors import SettingsError, WeightsError
from seesr_core.formats.ldm import taesd_from_ldm, taesd_to_ldm, unet_from_ldm, unet_modules, unet_to_ldm
from seesr_core.formats.unet_config import check_host_can_read, unet_config_from_ldm

from .checkpoint_files import SD2_UNET, normal, randomize, unet_config
from .golden import golden_dir
from .parity.weights import read_key_shapes

# Names in the public single-file checkpoints of Stable Diffusion 2, and in its diffusers folder.
SD2_NAMES = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_1.weight": "time_embed.0.weight",
    "time_embedding.linear_2.bias": "time_embed.2.bias",
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.bias": "out.2.bias",
    "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
    "down_blocks.0.resnets.0.conv1.bias": "input_blocks.1.0.in_layers.2.bias",
    "down_blocks.0.resnets.1.time_emb_proj.weight": "input_blocks.2.0.emb_layers.1.weight",
    "down_blocks.0.resnets.1.norm2.bias": "input_blocks.2.0.out_layers.0.bias",
    "down_blocks.0.resnets.1.conv2.weight": "input_blocks.2.0.out_layers.3.weight",
    "down_blocks.0.attentions.0.norm.weight": "input_blocks.1.1.norm.weight",
    "down_blocks.0.attentions.1.proj_in.weight": "input_blocks.2.1.proj_in.weight",
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.bias": (
        "input_blocks.2.1.transformer_blocks.0.attn1.to_out.0.bias"
    ),
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "down_blocks.1.downsamplers.0.conv.bias": "input_blocks.6.0.op.bias",
    "down_blocks.2.attentions.1.proj_out.bias": "input_blocks.8.1.proj_out.bias",
    "down_blocks.2.downsamplers.0.conv.weight": "input_blocks.9.0.op.weight",
    "down_blocks.3.resnets.0.conv1.weight": "input_blocks.10.0.in_layers.2.weight",
    "down_blocks.3.resnets.1.conv2.bias": "input_blocks.11.0.out_layers.3.bias",
    "mid_block.resnets.0.conv1.weight": "middle_block.0.in_layers.2.weight",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (
        "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
    ),
    "mid_block.resnets.1.norm2.weight": "middle_block.2.out_layers.0.weight",
    "up_blocks.0.resnets.0.conv_shortcut.bias": "output_blocks.0.0.skip_connection.bias",
    "up_blocks.0.resnets.2.conv1.weight": "output_blocks.2.0.in_layers.2.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
    "up_blocks.1.resnets.0.norm1.weight": "output_blocks.3.0.in_layers.0.weight",
    "up_blocks.1.attentions.2.norm.bias": "output_blocks.5.1.norm.bias",
    "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
    "up_blocks.2.upsamplers.0.conv.weight": "output_blocks.8.2.conv.weight",
    "up_blocks.3.resnets.2.conv2.weight": "output_blocks.11.0.out_layers.3.weight",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
}

CONFIGS = {
    "attention everywhere": unet_config([True, True, True]),
    "none at the outermost": unet_config([False, True, True], widths=[32, 64, 128]),
    "none at the innermost": unet_config([True, True, False], layers=2),
    "two levels": unet_config([False, True], layers=2),
    "convolutional projections": {**unet_config([True, True]), "use_linear_projection": False},
}


def build(config: dict[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    return randomize(UNet2DConditionModel.from_config(config))


@pytest.fixture(params=list(CONFIGS.values()), ids=list(CONFIGS))
def unet(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize(("diffusers_key", "ldm_key"), SD2_NAMES.items())
def test_names_of_stable_diffusion_2(diffusers_key: str, ldm_key: str) -> None:
    tensor = torch.zeros(1)
    assert unet_to_ldm({diffusers_key: tensor}, SD2_UNET) == {ldm_key: tensor}
    assert unet_from_ldm({ldm_key: tensor}, SD2_UNET) == {diffusers_key: tensor}


def test_every_key_of_the_full_unet_has_a_name_of_its_own() -> None:
    shapes = read_key_shapes(golden_dir() / "unet_controlnet" / "full_unet_keys.json.gz")
    keys = [key for key in shapes if ".image_attentions." not in key]
    tensor = torch.zeros(1)
    ldm = unet_to_ldm(dict.fromkeys(keys, tensor), SD2_UNET)
    assert len(ldm) == len(keys) == 686
    assert set(unet_from_ldm(ldm, SD2_UNET)) == set(keys)


def test_module_table_is_one_to_one() -> None:
    table = unet_modules(SD2_UNET)
    assert len(set(table.values())) == len(table)


def test_diffusers_own_conversion_agrees(unet: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ldm = unet_to_ldm(unet.state_dict(), unet.config)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in ldm.items()}
    converted = convert_ldm_unet_checkpoint(prefixed, dict(unet.config))
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in unet.state_dict().items())


def test_config_from_shapes_rebuilds_the_same_network(unet: Any) -> None:
    ldm = unet_to_ldm(unet.state_dict(), unet.config)
    config = unet_config_from_ldm({key: tuple(t.shape) for key, t in ldm.items()}, "file")
    again = build(config)
    again.load_state_dict(unet_from_ldm(ldm, config))
    x, text, t = normal(1, 4, 16, 16), normal(1, 5, 32, seed=2), torch.tensor([7])
    with torch.no_grad():
        expected, found = unet(x, t, text).sample, again(x, t, text).sample
    assert expected.std() > 0.01
    assert torch.equal(found, expected)


def test_a_key_without_a_place_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"add_embedding\.linear_1\.weight"):
        unet_to_ldm({"add_embedding.linear_1.weight": torch.zeros(1)}, SD2_UNET)


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in unet_to_ldm(build(config).state_dict(), config).items()}


def test_uneven_levels_are_refused() -> None:
    shapes = shapes_of(unet_config([True, True], layers=2))
    kept = {key: shape for key, shape in shapes.items() if not key.startswith("input_blocks.2.1.")}
    with pytest.raises(WeightsError, match="input block 2"):
        unet_config_from_ldm(kept, "odd.safetensors")


def test_a_unet_without_text_is_refused() -> None:
    shapes = {key: shape for key, shape in shapes_of(unet_config([True, True])).items() if "attn2" not in key}
    with pytest.raises(WeightsError, match=r"odd\.safetensors: expected a U-Net with text attention"):
        unet_config_from_ldm(shapes, "odd.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 16}, "norms of 32 groups; found 16"),
        ({"block_out_channels": [64, 96, 128]}, "multiples of the first level's"),
        ({"attention_head_dim": [1, 2, 1]}, "64 channels a head; found 2 heads at 64"),
    ],
)
def test_what_a_host_cannot_detect_is_refused(change: dict[str, Any], message: str) -> None:
    config = unet_config([True, True, True])
    check_host_can_read(config)
    with pytest.raises(SettingsError, match=message):
        check_host_can_read({**config, **change})


def test_tiny_autoencoder_names() -> None:
    from diffusers import AutoencoderTiny

    autoencoder: Any = AutoencoderTiny()
    state = autoencoder.state_dict()
    names = taesd_to_ldm(state)
    known = {"taesd_encoder.0.weight", "taesd_encoder.14.bias", "taesd_encoder.2.weight", "taesd_encoder.1.conv.4.bias"}
    known |= {
        "taesd_decoder.1.weight",
        "taesd_decoder.3.conv.0.weight",
        "taesd_decoder.7.weight",
        "taesd_decoder.19.bias",
    }
    assert known <= names.keys()
    assert "taesd_decoder.0.weight" not in names
    again = taesd_from_ldm({**names, "vae_scale": torch.tensor(1.0)})
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())

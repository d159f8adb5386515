"""The Swin encoder: windows, shifts, masks, sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from seesr_core.dape.encoder import (
    PatchMerging,
    SwinBlock,
    SwinConfig,
    SwinEncoder,
    WindowAttention,
    join_windows,
    partition_windows,
    relative_position_index,
    shift_mask,
)
from seesr_core.errors import ImageError, SettingsError, WeightsError

from .dape_nets import SWIN, images, seeded, tiny_dape


def tiny_block(*, shifted: bool) -> SwinBlock:
    blocks = [module for module in tiny_dape().modules() if isinstance(module, SwinBlock)]
    return blocks[1 if shifted else 0]


def test_windows_are_squares_of_the_map_row_by_row() -> None:
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = partition_windows(x, 2)
    assert windows.shape == (2 * 2 * 3, 4, 1)
    assert windows[1, :, 0].tolist() == [2, 3, 8, 9]
    assert windows[3, :, 0].tolist() == [12, 13, 18, 19]
    assert torch.equal(join_windows(windows, 2, 4, 6), x)


def test_position_index_counts_row_and_column_offsets() -> None:
    expected = [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert relative_position_index(2).tolist() == expected


@pytest.mark.parametrize(("resolution", "window"), [(4, 2), (6, 3), (12, 3), (12, 6), (20, 5)])
def test_mask_joins_exactly_the_neighbours_in_the_image(resolution: int, window: int) -> None:
    shift = window // 2
    axis = (torch.arange(resolution) + shift) % resolution
    place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)[None]
    tokens = partition_windows(place, window)
    distance = (tokens[:, :, None] - tokens[:, None]).abs().amax(-1)
    assert torch.equal(shift_mask(resolution, window, shift) == 0, distance < window)


def test_attention_equals_its_formula() -> None:
    attention = WindowAttention(8, heads=2, window=2).double()
    generator = seeded()
    nn.init.normal_(attention.relative_position_bias_table, generator=generator)
    x = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64)
    mask = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    q, k, v = (part.view(6, 4, 2, 4).transpose(1, 2) for part in attention.qkv(x).split(8, dim=-1))
    bias = attention.relative_position_bias_table[relative_position_index(2)].permute(2, 0, 1)
    logits = q @ k.mT / 2 + bias + mask.repeat(2, 1, 1)[:, None]
    expected = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(6, 4, 8))
    torch.testing.assert_close(attention(x, mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_token_reaches_its_window_and_no_further(shifted: bool) -> None:
    block = tiny_block(shifted=shifted)
    x = torch.randn(1, 12, 12, 16, generator=seeded())
    changed = x.clone()
    changed[0, 0, 0] = -x[0, 0, 0]
    touched = ((block(changed) - block(x)).abs().amax(-1)[0] > 1e-6).nonzero()
    # Shifted by one, the corner window holds what the shift left of it: one token, and none from the opposite borders.
    assert touched.amax().item() == (0 if shifted else 2)


def test_merging_concatenates_columns_first() -> None:
    merging = PatchMerging(1)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(4)[:2])
    cell = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 2, 2, 1)
    expected = torch.layer_norm(torch.tensor([0.0, 2.0, 1.0, 3.0]), (4,))[:2]
    torch.testing.assert_close(merging(cell).flatten(), expected, rtol=0, atol=1e-6)


def test_a_stage_within_one_window_shrinks_it_and_does_not_shift() -> None:
    config = SwinConfig(image_size=32, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window=8)
    blocks = [module for module in SwinEncoder(config).modules() if isinstance(module, SwinBlock)]
    assert [block.window for block in blocks] == [8, 8, 4, 4]
    assert all(block.shift == 0 and block.attn_mask is None for block in blocks)
    assert blocks[2].attn.relative_position_bias_table.shape == (49, 2)


@pytest.mark.parametrize(
    "config",
    [
        SWIN,
        SwinConfig(image_size=192, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(2, 4, 6, 8), window=6),
        SwinConfig(image_size=64, patch_size=2, embed_dim=8, depths=(1, 3), num_heads=(1, 2), window=16, mlp_ratio=2.0),
        SwinConfig(image_size=16, embed_dim=8, depths=(2, 1), num_heads=(1, 1), window=4, final_norm=False),
    ],
)
def test_sizes_are_read_from_shapes(config: SwinConfig) -> None:
    with torch.device("meta"):
        state = {f"visual_encoder.{key}": value for key, value in SwinEncoder(config).state_dict().items()}
    assert SwinConfig.from_state_dict(state, image_size=config.image_size) == config


def test_without_a_size_the_last_stage_is_one_window() -> None:
    with torch.device("meta"):
        state = SwinEncoder(SwinConfig()).state_dict()
    assert SwinConfig.from_state_dict(state, prefix="") == SwinConfig()


def test_foreign_weights_are_named() -> None:
    with pytest.raises(WeightsError, match="no RAM or DAPE model"):
        SwinConfig.from_state_dict({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="relative_position_bias_table"):
        SwinConfig.from_state_dict({"visual_encoder.layers.0.blocks.0.norm1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2,)}, "as many head counts as stages"),
        ({"depths": (), "num_heads": ()}, "as many head counts as stages"),
        ({"image_size": 50}, "Image size 50"),
        ({"window": 5}, "windows of 5 at stage 0; a multiple of 40 does"),
        ({"num_heads": (3, 4)}, "16 channels, which 3 heads"),
        ({"drop_path": 1.0}, "stochastic depth"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(SWIN, **change)  # type: ignore[arg-type]


def test_first_token_is_the_mean_of_the_others() -> None:
    tokens = tiny_dape().visual_encoder(images())
    assert tokens.shape == (2, 1 + SWIN.grid**2, SWIN.width)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 1, 48, 48), (3, 48, 48)])
def test_other_image_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="48, 48"):
        tiny_dape().visual_encoder(torch.zeros(shape))


def test_stochastic_depth_drops_whole_branches_of_an_image_in_training_only() -> None:
    block, x = tiny_block(shifted=False), torch.randn(64, 12, 12, 16, generator=seeded())
    block.drop_path = 0.5
    # The MLP's last layer silenced, one branch is left: dropped, or doubled to keep its expectation.
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    branch = block(x) - x
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = block.train()(x)
    errors = torch.stack([(x + factor * branch - out).abs().amax(dim=(1, 2, 3)) for factor in (0, 2)])
    assert errors.min(dim=0).values.max() < 1e-5
    assert 16 < errors.argmin(dim=0).sum() < 48


def test_buffers_are_neither_saved_nor_lost_on_the_meta_device() -> None:
    with torch.device("meta"):
        encoder = SwinEncoder(SWIN)
    assert not any(key.endswith(("relative_position_index", "attn_mask")) for key in encoder.state_dict())
    assert all(buffer.device.type == "cpu" for buffer in encoder.buffers())

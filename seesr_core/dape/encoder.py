"""Swin transformer, the image encoder of RAM: shifted-window attention over a pyramid of maps (Liu et al., ICCV 2021).

Parameter names are those of the published RAM file below `visual_encoder.`; sizes come from `SwinConfig`.
Shape letters: B batch, H W rows and columns, C channels, N tokens of one window, h attention heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..formats.schema import Size, Within
from .preprocess import require_square

# Added to the attention logits of pairs that the cyclic shift brought together; the published value.
MASKED = -100.0
_MOST_PAIRS = 1 << 27
"""Pairs of tokens that see each other in the first stage; Swin-L at 384² has 1.3 million."""
_Stages: TypeAlias = Annotated[tuple[Annotated[int, Within(1, 64)], ...], Within(1, 8)]


@dataclass(kw_only=True, slots=True, frozen=True)
class SwinConfig:
    """Sizes of the encoder; the defaults are RAM's Swin-L at 384²."""

    image_size: Size = 384
    """Side of the square input in pixels."""
    patch_size: Size = 4
    """Side of the square patch that becomes one token of the first stage, in pixels."""
    embed_dim: Size = 192
    """Channels of the first stage; every further stage has twice as many."""
    depths: _Stages = (2, 2, 18, 2)
    """Blocks per stage."""
    num_heads: _Stages = (6, 12, 24, 48)
    """Attention heads per stage."""
    window: Size = 12
    """Side of an attention window in tokens; a stage that is not larger than this is one window of its own size."""
    mlp_ratio: Annotated[float, Within(0.01, 64)] = 4.0
    """Hidden width of a block's MLP over its channels."""
    final_norm: bool = True
    """Whether a LayerNorm closes the encoder."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block (rising from 0 at the first one); acts in training mode only."""

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths or min(self.depths) < 1:
            raise SettingsError(
                f"A Swin encoder needs as many head counts as stages of at least one block; "
                f"found depths {self.depths} and heads {self.num_heads}."
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise SettingsError(f"The stochastic depth rate must lie in [0, 1); found {self.drop_path}.")
        if min(self.image_size, self.patch_size, self.embed_dim, self.window, *self.num_heads) < 1:
            raise SettingsError(f"Every size of a Swin encoder must be at least 1; found {self}.")
        for stage, heads in enumerate(self.num_heads):
            self._check_stage(stage, heads)
        if self.resolution(0) ** 2 * self.stage_window(0) ** 2 > _MOST_PAIRS:
            raise SettingsError(
                f"Windows of {self.stage_window(0)} on {self.resolution(0)}² tokens are more than any encoder has."
            )

    def _check_stage(self, stage: int, heads: int) -> None:
        side, window = self.resolution(stage), self.stage_window(stage)
        if self.image_size % (self.patch_size << stage) or side % window:
            fitting = self.patch_size * self.window << (self.stages - 1)
            raise SettingsError(
                f"Image size {self.image_size} does not divide into patches of {self.patch_size} and windows of "
                f"{self.window} at stage {stage}; a multiple of {fitting} does."
            )
        if self.channels(stage) % heads:
            raise SettingsError(f"Stage {stage} has {self.channels(stage)} channels, which {heads} heads cannot share.")

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def width(self) -> int:
        """Channels of the output."""
        return self.channels(self.stages - 1)

    @property
    def grid(self) -> int:
        """Side of the output's grid of tokens."""
        return self.resolution(self.stages - 1)

    def channels(self, stage: int) -> int:
        """Channels of a stage."""
        return self.embed_dim << stage

    def resolution(self, stage: int) -> int:
        """Side of a stage's feature map in tokens."""
        return self.image_size // (self.patch_size << stage)

    def stage_window(self, stage: int) -> int:
        """Side of a stage's windows in tokens."""
        return min(self.window, self.resolution(stage))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, prefix: str = "visual_encoder.", image_size: int | None = None
    ) -> SwinConfig:
        """Read the sizes from the weights' shapes.

        Args:
            state: state dict holding the encoder below `prefix`.
            prefix: what stands before the encoder's own key names.
            image_size: input side in pixels; None takes the one at which the last stage is exactly one window
                (true of all published Swin weights), since no weight's shape depends on it.

        Raises:
            WeightsError: a key of the encoder is missing or has an impossible shape.
        """
        depths = _count_blocks(state, prefix)
        tables = [
            _shape(state, f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table") for i in range(len(depths))
        ]
        windows = [(math.isqrt(rows) + 1) // 2 for rows, _ in tables]
        embed_dim, _, patch, _ = _shape(state, f"{prefix}patch_embed.proj.weight")
        hidden, channels = _shape(state, f"{prefix}layers.0.blocks.0.mlp.fc1.weight")
        return cls(
            image_size=image_size or windows[-1] * patch << (len(depths) - 1),
            patch_size=patch,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=tuple(heads for _, heads in tables),
            window=windows[0],
            mlp_ratio=hidden / channels,
            final_norm=f"{prefix}norm.weight" in state,
        )


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    depths: list[int] = []
    while f"{prefix}layers.{len(depths)}.blocks.0.norm1.weight" in state:
        stem, block = f"{prefix}layers.{len(depths)}.blocks.", 1
        while f"{stem}{block}.norm1.weight" in state:
            block += 1
        depths.append(block)
    if not depths:
        raise WeightsError(
            f"This is no RAM or DAPE model: keys '{prefix}layers.0.blocks.0…' or '{prefix}_conv_stem…' were expected "
            "and none was found; use ram_swin_large_14m.pth or a dape*.safetensors file."
        )
    return tuple(depths)


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise WeightsError(f"The tagger's weights lack '{key}': the file is truncated or of another model.")
    return state[key].shape


def partition_windows(x_BHWC: Tensor, window: int) -> Tensor:
    """(B, H, W, C) into (B · windows, N, C), windows row by row; H and W are multiples of `window`."""
    return rearrange(x_BHWC, "b (h m) (w n) c -> (b h w) (m n) c", m=window, n=window)


def join_windows(x_MNC: Tensor, window: int, height: int, width: int) -> Tensor:
    """Inverse of `partition_windows`: back to (B, height, width, C)."""
    return rearrange(
        x_MNC, "(b h w) (m n) c -> b (h m) (w n) c", m=window, n=window, h=height // window, w=width // window
    )


def relative_position_index(window: int) -> Tensor:
    """(N, N) int64: which row of the bias table belongs to a pair of tokens of one window."""
    axis = torch.arange(window, device="cpu")
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    rows, columns = grid[:, :, None] - grid[:, None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(resolution: int, window: int, shift: int) -> Tensor:
    """(windows, N, N) float32: 0 between tokens of a shifted window that are neighbours in the image, else `MASKED`."""
    edges = torch.tensor([resolution - window, resolution - shift], device="cpu")
    band = torch.bucketize(torch.arange(resolution, device="cpu"), edges, right=True)
    region = (band[:, None] * 3 + band[None, :])[None, :, :, None]
    tokens = partition_windows(region, window).squeeze(-1)
    return (tokens[:, None, :] != tokens[:, :, None]).float() * MASKED


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learned bias per relative position and head."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv: nn.Module = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)

    def forward(self, x_MNC: Tensor, mask_WNN: Tensor | None) -> Tensor:
        """(B · windows, N, C) to the same; `mask_WNN` is added to the logits of each of the windows."""
        bias_WhNN = self._bias(mask_WNN)
        q, k, v = rearrange(
            self.qkv(x_MNC), "(b w) n (three h d) -> three b (w h) n d", three=3, h=self.heads, w=len(bias_WhNN)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_WhNN.flatten(0, 1).to(q.dtype)[None])
        return self.proj(rearrange(out, "b (w h) n d -> (b w) n (h d)", h=self.heads))

    def _bias(self, mask_WNN: Tensor | None) -> Tensor:
        bias_hNN = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return bias_hNN[None] if mask_WNN is None else bias_hNN[None] + mask_WNN[:, None]


class Mlp(nn.Module):
    """Two linear layers with GELU (erf) between."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP; every second block shifts its windows by half a window."""

    attn_mask: Tensor | None

    def __init__(self, config: SwinConfig, stage: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        channels, resolution = config.channels(stage), config.resolution(stage)
        self.window = config.stage_window(stage)
        # A map that is a single window has nothing to shift to.
        self.shift = self.window // 2 if shifted and resolution > config.window else 0
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, config.num_heads[stage], self.window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio))
        mask = shift_mask(resolution, self.window, self.shift) if self.shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x_BHWC = x_BHWC + self._stochastic_depth(self._attend(self.norm1(x_BHWC)))
        return x_BHWC + self._stochastic_depth(self.mlp(self.norm2(x_BHWC)))

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        _, height, width, _ = x_BHWC.shape
        shifted = x_BHWC.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x_BHWC
        attended = self.attn(partition_windows(shifted, self.window), self.attn_mask)
        joined = join_windows(attended, self.window, height, width)
        return joined.roll((self.shift, self.shift), (1, 2)) if self.shift else joined

    def _stochastic_depth(self, branch_BHWC: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch_BHWC
        # Dropout of a one per image: it shares torch's default generator with every other dropout layer.
        return branch_BHWC * F.dropout(branch_BHWC.new_ones(len(branch_BHWC), 1, 1, 1), self.drop_path)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to normed tokens."""

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, H / patch, W / patch, C)."""
        return self.norm(rearrange(self.proj(x_B3HW), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Half the resolution: the four tokens of a 2×2 cell, concatenated, normed and projected to twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / 2, W / 2, 2 C)."""
        # Down the columns of the cell first: the order the published weights were trained with.
        cells = rearrange(x_BHWC, "b (h m) (w n) c -> b h w (n m c)", m=2, n=2)
        return self.reduction(self.norm(cells))


class SwinStage(nn.Module):
    """The blocks of one resolution and, except after the last stage, the step to the next."""

    def __init__(self, config: SwinConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        blocks = [SwinBlock(config, stage, shifted=i % 2 == 1, drop_path=rate) for i, rate in enumerate(drop_paths)]
        self.blocks = nn.Sequential(*blocks)
        last = stage == config.stages - 1
        self.downsample = None if last else PatchMerging(config.channels(stage))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H / 2, W / 2, 2 C), or to the same shape in the last stage."""
        x_BHWC = self.blocks(x_BHWC)
        return x_BHWC if self.downsample is None else self.downsample(x_BHWC)


class SwinEncoder(nn.Module):
    """Normalised image to final-normed tokens with their mean in front."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").split(config.depths)
        self.layers = nn.Sequential(*(SwinStage(config, i, rate.tolist()) for i, rate in enumerate(rates)))
        self.norm = nn.LayerNorm(config.width) if config.final_norm else nn.Identity()

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, size, size), ImageNet-normalised, to (B, 1 + tokens, width); token 0 is the mean of the others.

        Raises:
            ImageError: the image does not have the encoder's size.
        """
        require_square(x_B3HW, self.config.image_size)
        tokens_BNC = self.norm(self.layers(self.patch_embed(x_B3HW)).flatten(1, 2))
        return torch.cat([tokens_BNC.mean(dim=1, keepdim=True), tokens_BNC], dim=1)

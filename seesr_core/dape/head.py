"""RAM's tagging head: every tag's embedding asks the image tokens whether it is in the picture.

Two BERT-style layers of cross-attention without self-attention or positions. Parameter names are those of the published
RAM file below `tagging_head.`. Shape letters: B batch, N tags, L image tokens, E their width, D hidden width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..formats.schema import Size, Within

# BERT's epsilon, not torch's default.
LAYER_NORM_EPS = 1e-12


@dataclass(kw_only=True, slots=True, frozen=True)
class HeadConfig:
    """Sizes of the tagging head; the defaults are RAM's."""

    hidden: Size = 768
    """Width of a tag's state."""
    heads: Size = 4
    """Attention heads; no weight's shape depends on them, so files carry them in their metadata."""
    layers: Annotated[int, Within(1, 64)] = 2
    """Cross-attention layers."""
    intermediate: Size = 3072
    """Hidden width of a layer's MLP."""
    encoder_width: Size = 512
    """Width of the image tokens attended to, which is also the width of the soft prompt."""
    dropout: float = 0.1
    """Dropout of attention probabilities and of both branches; acts in training mode only."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.heads, self.layers, self.intermediate, self.encoder_width) < 1:
            raise SettingsError(f"Every size of the tagging head must be at least 1; found {self}.")
        if self.hidden % self.heads:
            raise SettingsError(f"The tagging head's width {self.hidden} is not a multiple of its {self.heads} heads.")
        if not 0.0 <= self.dropout < 1.0:
            raise SettingsError(f"The tagging head's dropout must lie in [0, 1); found {self.dropout}.")

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, prefix: str = "tagging_head.", heads: int = 4
    ) -> HeadConfig:
        """Read the sizes from the weights' shapes; `heads` is the one that shapes do not show.

        Raises:
            WeightsError: the weights hold no tagging head below `prefix`.
        """
        stem, layers = f"{prefix}encoder.layer.", 0
        while f"{stem}{layers}.crossattention.self.key.weight" in state:
            layers += 1
        if not layers or f"{stem}0.intermediate.dense.weight" not in state:
            raise WeightsError(
                f"The weights hold no RAM tagging head: keys '{stem}0…' were expected; "
                "use ram_swin_large_14m.pth or a dape*.safetensors file."
            )
        hidden, encoder_width = state[f"{stem}0.crossattention.self.key.weight"].shape
        intermediate, _ = state[f"{stem}0.intermediate.dense.weight"].shape
        return cls(hidden=hidden, heads=heads, layers=layers, intermediate=intermediate, encoder_width=encoder_width)


class CrossAttentionCore(nn.Module):
    """Projections and attention, without the output projection (`crossattention.self` in the file)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.encoder_width, config.hidden)
        self.value = nn.Linear(config.encoder_width, config.hidden)

    def forward(self, tags_BND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """(B or 1, N, D) and (B, L, E) to (B, N, D)."""
        q = self._split(self.query(tags_BND)).expand(len(tokens_BLE), -1, -1, -1)
        k, v = self._split(self.key(tokens_BLE)), self._split(self.value(tokens_BLE))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return rearrange(out, "b h n d -> b n (h d)")

    def shares(self, tags_BND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """How a tag's attention is shared out among the tokens, (B, h, N, L) float32; every row sums to 1."""
        q, k = self._split(self.query(tags_BND)).float(), self._split(self.key(tokens_BLE)).float()
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class ResidualOutput(nn.Module):
    """Projection back to the hidden width, added to the layer's input and normed (BERT's post-norm)."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        """(B, N, width) and (B or 1, N, D) to (B, N, D)."""
        return self.LayerNorm(self.dropout(self.dense(branch)) + residual)


class CrossAttention(nn.Module):
    """Cross-attention with its residual."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self = CrossAttentionCore(config)
        self.output = ResidualOutput(config.hidden, config)

    def forward(self, tags_BND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """(B or 1, N, D) and (B, L, E) to (B, N, D)."""
        return self.output(self.self(tags_BND, tokens_BLE), tags_BND)


class Intermediate(nn.Module):
    """First half of a layer's MLP."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) to (…, intermediate), GELU (erf) applied."""
        return F.gelu(self.dense(x))


class HeadLayer(nn.Module):
    """Cross-attention, then the MLP."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate, config)

    def forward(self, tags_BND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """(B or 1, N, D) and (B, L, E) to (B, N, D)."""
        tags_BND = self.crossattention(tags_BND, tokens_BLE)
        return self.output(self.intermediate(tags_BND), tags_BND)


class HeadLayers(nn.Module):
    """The stack of layers (`encoder` in the file)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(HeadLayer(config) for _ in range(config.layers))

    def forward(self, tags_BND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """(B or 1, N, D) and (B, L, E) to (B, N, D)."""
        for layer in self.layer:
            tags_BND = layer(tags_BND, tokens_BLE)
        return tags_BND


class TaggingHead(nn.Module):
    """Tag embeddings and image tokens to one state per tag and image."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = HeadLayers(config)

    def forward(self, tags_ND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """(N, D) and (B, L, E) to (B, N, D); the tags are shared by the batch until they first meet an image."""
        return self.encoder(tags_ND[None], tokens_BLE)

    def shares(self, tags_ND: Tensor, tokens_BLE: Tensor) -> Tensor:
        """Where every layer looks for each tag: (layers, B, h, N, L) float32, shares of the image tokens.

        Tags do not attend to each other, so that some tags give the same shares as all of them.
        """
        tags_BND, found = tags_ND[None], list[Tensor]()
        for layer in self.encoder.layer:
            assert isinstance(layer, HeadLayer)
            found.append(layer.crossattention.self.shares(tags_BND, tokens_BLE))
            tags_BND = layer(tags_BND, tokens_BLE)
        return torch.stack(found)

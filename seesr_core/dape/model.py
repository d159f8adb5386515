"""DAPE, the degradation-aware prompt extractor: RAM's encoder and tagging head (SeeSR §3.1; the same net as plain RAM).

One pass gives both prompts: image tokens (the soft prompt) and tag logits (the hard prompt). Parameter names are the
published RAM keys that inference needs. A small tagger has EfficientNet-Lite0 in place of RAM's Swin; all behind the
encoder is the same. Shape letters: B batch, L tokens, D their width, N tags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from ..formats.schema import MalformedError, Size, read
from .efficientnet import LiteConfig, LiteEncoder
from .encoder import SwinConfig, SwinEncoder, WindowAttention
from .head import HeadConfig, TaggingHead


@dataclass(kw_only=True, slots=True, frozen=True)
class DAPEConfig:
    """Sizes of the whole tagger; the defaults are RAM's with Swin-L."""

    swin: SwinConfig | None = field(default_factory=SwinConfig)
    """The image encoder, if it is RAM's."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The tagging head; its `encoder_width` is the width of the soft prompt."""
    num_tags: Size = 4585
    """Tags of the vocabulary."""
    label_width: Size = 512
    """Width of the stored tag embeddings."""
    lite: LiteConfig | None = None
    """The image encoder, if it is EfficientNet-Lite0; `swin` is None then."""

    def __post_init__(self) -> None:
        if (self.swin is None) == (self.lite is None):
            raise SettingsError(
                "The tagger's configuration should name one image encoder, swin or lite; it names "
                f"{'neither' if self.swin is None else 'both'}."
            )
        if self.num_tags < 1 or self.label_width < 1:
            raise SettingsError(
                f"A tagger needs tags and a width for them; found {self.num_tags} and {self.label_width}."
            )

    @property
    def encoder(self) -> SwinConfig | LiteConfig:
        """Sizes of the image encoder, whichever it is."""
        encoder = self.swin or self.lite
        assert encoder is not None  # see __post_init__
        return encoder

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.encoder.image_size

    @property
    def grid(self) -> int:
        """Side of the grid of image tokens."""
        return self.encoder.grid

    @property
    def tokens(self) -> int:
        """Length of the soft prompt: the grid's tokens and their mean."""
        return self.grid**2 + 1

    @property
    def token_width(self) -> int:
        """Width of the soft prompt."""
        return self.head.encoder_width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the `config` of a file's metadata; the encoder that is not there has no entry."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DAPEConfig:
        """Inverse of `to_dict`, also of its JSON form.

        Raises:
            SettingsError: an unknown or missing entry, or sizes that cannot work together.
        """
        try:
            found: DAPEConfig = read(cls, {"swin": None, "head": None, **data}, "it", strict=True)
            return found
        except (MalformedError, ArithmeticError) as error:
            raise SettingsError(
                f"The tagger's configuration cannot be read ({error}); "
                "it should hold swin or lite, head, num_tags and label_width."
            ) from error

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, image_size: int | None = None, heads: int = 4
    ) -> DAPEConfig:
        """Read every size from the shapes of canonical weights; `image_size` and `heads` are what shapes do not show.

        Raises:
            WeightsError: the weights are not those of a RAM-like tagger.
        """
        if "label_embed" not in state:
            raise WeightsError(
                "The weights lack 'label_embed', so this is no RAM or DAPE model (RAM++ and Tag2Text do not fit); "
                "use ram_swin_large_14m.pth or a dape*.safetensors file."
            )
        num_tags, label_width = state["label_embed"].shape
        lite = LiteConfig.from_state_dict(state, image_size=image_size)
        return cls(
            swin=None if lite else SwinConfig.from_state_dict(state, image_size=image_size),
            lite=lite,
            head=HeadConfig.from_state_dict(state, heads=heads),
            num_tags=num_tags,
            label_width=label_width,
        )


class DAPEOutput(NamedTuple):
    """What one pass over a batch of images gives."""

    tokens_BLD: Tensor
    """Soft prompt: the projected image tokens, the mean token first."""
    logits_BN: Tensor
    """One logit per tag; its sigmoid is the tag's score."""


class DAPE(nn.Module):
    """The tagger; plain RAM or DAPE depends only on the weights."""

    def __init__(self, config: DAPEConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.visual_encoder = LiteEncoder(encoder) if isinstance(encoder, LiteConfig) else SwinEncoder(encoder)
        self.image_proj = nn.Linear(encoder.width, config.token_width)
        self.label_embed = nn.Parameter(torch.zeros(config.num_tags, config.label_width))
        self.wordvec_proj = nn.Linear(config.label_width, config.head.hidden)
        self.tagging_head = TaggingHead(config.head)
        self.fc = nn.Linear(config.head.hidden, 1)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: DAPEConfig | None = None) -> DAPE:
        """A tagger in evaluation mode around canonical weights; it shares their memory and dtype.

        Args:
            state: canonical state dict, without adapters or ballast.
            config: sizes; None reads them from the shapes.

        Raises:
            WeightsError: keys are missing, left over or of another shape than `config` says.
        """
        config = config or DAPEConfig.from_state_dict(state)
        with torch.device("meta"):
            model = cls(config)
        _require_same_keys(model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def encode_image(self, x_B3HW: Tensor) -> Tensor:
        """ImageNet-normalised (B, 3, size, size) to the soft prompt (B, L, D)."""
        return self.image_proj(self.visual_encoder(x_B3HW))

    def tag_logits(self, tokens_BLD: Tensor, tags: Sequence[int] | None = None) -> Tensor:
        """Soft prompt (B, L, D) to tag logits (B, N): of all tags, or of those at some places in the vocabulary.

        Tags do not see each other, so that some have the same logits as among all.
        """
        queries = self._queries(slice(None) if tags is None else list(tags))
        return self.fc(self.tagging_head(queries, tokens_BLD)).squeeze(-1)

    def tag_attention(self, tokens_BLD: Tensor, tags: Sequence[int]) -> Tensor:
        """Where the head looks for some tags, given by their places in the vocabulary: (layers, B, heads, N, L).

        Float32 shares of the soft prompt's tokens, see `TaggingHead.shares`. Nothing of it is computed otherwise.
        """
        return self.tagging_head.shares(self._queries(list(tags)), tokens_BLD)

    def _queries(self, tags: list[int] | slice) -> Tensor:
        """What the head asks the image: (N, hidden)."""
        return F.relu(self.wordvec_proj(self.label_embed[tags]))

    def forward(self, x_B3HW: Tensor) -> DAPEOutput:
        """ImageNet-normalised (B, 3, size, size) to both prompts."""
        tokens_BLD = self.encode_image(x_B3HW)
        return DAPEOutput(tokens_BLD, self.tag_logits(tokens_BLD))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw fresh weights to train from scratch: normal of std 0.02 (tag embeddings 1), biases 0, norms 1.

        Those of EfficientNet-Lite0 are drawn as `LiteTrunk.initialize` says.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0.0, 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, WindowAttention):
                module.relative_position_bias_table.normal_(0.0, 0.02, generator=generator)
        self.label_embed.normal_(generator=generator)
        if isinstance(self.visual_encoder, LiteEncoder):
            self.visual_encoder.initialize(generator)


def _require_same_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(
            f"The tagger's weights do not fit: {len(missing)} keys are missing {missing[:3]} and {len(extra)} are left "
            f"over {extra[:3]}; use a complete RAM or DAPE file."
        )
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            raise WeightsError(
                f"The tagger's weight '{key}' should have the shape {tuple(tensor.shape)} and has "
                f"{tuple(found[key].shape)}; the file's configuration belongs to another model."
            )

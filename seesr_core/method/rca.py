"""Representation cross-attention (RCA): one more transformer after every text transformer, attending to the soft
prompt.

Paper §3.3 and figure 2(c); parameter names (`…image_attentions.N.…`) as published. diffusers' networks stay its own:
each block gets a list of stock `Transformer2DModel`s, and the text transformers pass their output through their
neighbour in it. The soft prompt travels in `cross_attention_kwargs`, so the networks hold no state between calls:

    unet(x, t, text, cross_attention_kwargs={"soft_prompt": tokens_BLD, "rca_scale": 1.0})

Without `soft_prompt` the network is the one without RCA, bit for bit. A further entry, `regions` (`regions.Regions`),
makes the text transformers heed words where they belong; it stands here since it, too, must know each place's map.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

SOFT_PROMPT_DIM = 512
"""Width of RAM's image tokens; the published networks attend to this."""


def add_rca(model: nn.Module, context_dim: int = SOFT_PROMPT_DIM) -> nn.Module:
    """Give a diffusers U-Net or ControlNet RCA at every text transformer, randomly initialised; returns the same model.

    Args:
        model: `UNet2DConditionModel` or `ControlNetModel` whose text transformers are `Transformer2DModel`s.
        context_dim: width D of the soft prompt (B, L, D).
    """
    for block in _blocks_with_text(model):
        block.image_attentions = nn.ModuleList(_beside(text, context_dim) for text in block.attentions)
        for text, rca in zip(block.attentions, block.image_attentions, strict=True):
            text.__class__ = _site_class()
            # A tuple hides the neighbour from nn.Module's registry: its parameters belong to `image_attentions` alone.
            text.rca_neighbour = (rca,)
    return model


def sites(model: nn.Module) -> dict[str, nn.Module]:
    """The RCA modules by site: `down.i.j`, `mid`, `up.i.j`."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        block, marker, index = name.rpartition(".image_attentions.")
        if marker and index.isdecimal():
            found["mid" if block == "mid_block" else f"{block.replace('_blocks', '')}.{index}"] = module
    return found


def rca_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of RCA by their name in `model`."""
    return {name: parameter for name, parameter in model.named_parameters() if ".image_attentions." in name}


def soft_prompt_dim(state_dict: dict[str, Tensor]) -> int | None:
    """Width of the soft prompt that a state dict was made for, or None if it has no RCA."""
    suffix = ".transformer_blocks.0.attn2.to_k.weight"
    widths = (t.shape[1] for name, t in state_dict.items() if ".image_attentions." in name and name.endswith(suffix))
    return next(widths, None)


def _blocks_with_text(model: Any) -> Iterator[Any]:
    blocks = [*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", ())]
    return (block for block in blocks if len(getattr(block, "attentions", ())))


def _beside(text: Any, context_dim: int) -> Transformer2DModel:
    """RCA for one site: the text transformer's shape, depth 1, its context the soft prompt."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return Transformer2DModel(
        text.config.num_attention_heads,
        text.config.attention_head_dim,
        in_channels=text.config.in_channels,
        num_layers=1,
        cross_attention_dim=context_dim,
        norm_num_groups=text.config.norm_num_groups,
        use_linear_projection=text.config.use_linear_projection,
        upcast_attention=text.config.upcast_attention,
    )


@functools.lru_cache(maxsize=1)
def _site_class() -> type:
    """A text transformer followed by its RCA; made on first use, since diffusers is imported only where it is
    needed."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    class TextThenRCA(Transformer2DModel):
        rca_neighbour: tuple[Transformer2DModel]

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            attention_kwargs = dict(kwargs.pop("cross_attention_kwargs", None) or {})
            soft_prompt = attention_kwargs.pop("soft_prompt", None)
            scale = attention_kwargs.pop("rca_scale", 1.0)
            regions = attention_kwargs.pop("regions", None)
            if regions is not None:
                # A bias of three dimensions goes to the text attention as it is, one row for each place of the map.
                kwargs["encoder_attention_mask"] = regions.bias(*hidden_states.shape[-2:]).to(hidden_states)
            kwargs |= {"cross_attention_kwargs": attention_kwargs or None, "return_dict": False}
            (x,) = super().forward(hidden_states, *args, **kwargs)
            if soft_prompt is None or scale == 0:
                return (x,)
            (y,) = self.rca_neighbour[0](x, encoder_hidden_states=soft_prompt, return_dict=False)
            return (y if scale == 1 else x + scale * (y - x),)

    return TextThenRCA

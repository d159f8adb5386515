"""The settings of networks that travel in files: which entries are taken, and within which bounds.

Whatever else a file says stays outside: libraries do more with a config than read sizes from it (transformers loads
code named by `attn_implementation`), and a size out of bounds builds a network for ever.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from .schema import Number, Size, Within, read

_Flag: TypeAlias = bool | None
_Count: TypeAlias = Annotated[int, Within(1, 16)]
_Levels = Within(1, 8)
_Sizes: TypeAlias = Annotated[list[Size], _Levels]
_DownBlock = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
_UpBlock = Literal["UpBlock2D", "CrossAttnUpBlock2D"]
_Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
_Small: TypeAlias = Annotated[int | float, Within(0, 1000)]


class _Encoder(TypedDict, total=False):
    """What U-Net and ControlNet share; entries that only null is taken for belong to other families of networks."""

    in_channels: Size
    flip_sin_to_cos: bool
    freq_shift: _Small
    down_block_types: Annotated[list[_DownBlock], _Levels]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"]
    only_cross_attention: bool | Annotated[list[bool], _Levels]
    block_out_channels: _Sizes
    layers_per_block: _Count | Annotated[list[_Count], _Levels]
    downsample_padding: Annotated[int, Within(0, 8)]
    mid_block_scale_factor: _Small
    act_fn: _Activation
    norm_num_groups: Size
    norm_eps: _Small
    cross_attention_dim: Size
    transformer_layers_per_block: _Count | Annotated[list[_Count], _Levels]
    encoder_hid_dim: None
    encoder_hid_dim_type: None
    attention_head_dim: Size | _Sizes
    num_attention_heads: Size | _Sizes | None
    use_linear_projection: bool
    class_embed_type: None
    addition_embed_type: None
    addition_time_embed_dim: None
    num_class_embeds: None
    upcast_attention: _Flag
    resnet_time_scale_shift: Literal["default", "scale_shift"]
    projection_class_embeddings_input_dim: None
    addition_embed_type_num_heads: Size


class UNet(_Encoder, total=False):
    """A diffusers `UNet2DConditionModel`."""

    sample_size: Size | None
    out_channels: Size
    center_input_sample: bool
    up_block_types: Annotated[list[_UpBlock], _Levels]
    dropout: Annotated[float, Within(0, 1)]
    reverse_transformer_layers_per_block: None
    dual_cross_attention: bool
    resnet_skip_time_act: bool
    resnet_out_scale_factor: _Small
    time_embedding_type: Literal["positional", "fourier"]
    time_embedding_dim: None
    time_embedding_act_fn: None
    timestep_post_act: None
    time_cond_proj_dim: None
    conv_in_kernel: Annotated[int, Within(1, 15)]
    conv_out_kernel: Annotated[int, Within(1, 15)]
    attention_type: Literal["default"]
    class_embeddings_concat: bool
    mid_block_only_cross_attention: _Flag
    cross_attention_norm: None
    use_image_cross_attention: bool


class ControlNet(_Encoder, total=False):
    """A diffusers `ControlNetModel`."""

    conditioning_channels: Size
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"]
    conditioning_embedding_out_channels: _Sizes
    global_pool_conditions: bool
    use_image_cross_attention: bool


class AutoencoderKL(TypedDict, total=False):
    """A diffusers `AutoencoderKL`."""

    in_channels: Size
    out_channels: Size
    down_block_types: Annotated[list[Literal["DownEncoderBlock2D"]], _Levels]
    up_block_types: Annotated[list[Literal["UpDecoderBlock2D"]], _Levels]
    block_out_channels: _Sizes
    layers_per_block: _Count
    act_fn: _Activation
    latent_channels: Size
    norm_num_groups: Size
    sample_size: Size
    scaling_factor: Annotated[float, Within(1e-6, 1e6)]
    shift_factor: Number | None
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool


class TextEncoder(TypedDict, total=False):
    """A transformers `CLIPTextModel`."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    projection_dim: Size
    num_hidden_layers: Annotated[int, Within(1, 128)]
    num_attention_heads: Size
    max_position_embeddings: Annotated[int, Within(1, 1 << 16)]
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"]
    layer_norm_eps: _Small
    attention_dropout: Annotated[float, Within(0, 1)]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None


class Tokenizer(TypedDict, total=False):
    """A transformers `CLIPTokenizer`, without its words."""

    model_max_length: Annotated[int, Within(1, 1 << 16)]
    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str


class Scheduler(TypedDict, total=False):
    """A diffusers scheduler of Stable Diffusion."""

    _class_name: str
    num_train_timesteps: Size
    beta_start: Annotated[float, Within(0, 1)]
    beta_end: Annotated[float, Within(0, 1)]
    beta_schedule: Literal["scaled_linear", "linear", "squaredcos_cap_v2"]
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    timestep_spacing: Literal["leading", "trailing", "linspace"]
    steps_offset: Annotated[int, Within(0, 1000)]
    clip_sample: bool
    set_alpha_to_one: bool
    skip_prk_steps: bool
    rescale_betas_zero_snr: bool
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]


def taken(kind: Any, value: Any, where: str = "it") -> dict[str, Any]:
    """The entries of a config that its kind knows.

    Raises:
        schema.MalformedError: one of them is of another type or out of bounds.
    """
    return dict(read(kind, value, where))

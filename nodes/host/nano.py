"""The embedded small model as a checkpoint that the host's stock loaders take apart.

Its U-Net is Stable Diffusion 2's in small, so one more entry in the host's list of models suffices. Text encoder and
tokenizer are the small model's own; their settings travel in the file as a tensor, or are those of the embedded file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ...seesr_core.errors import WeightsError
from ...seesr_core.formats.sd import SD_LATENT_SCALE, TEXT_JSON, TokenizerFiles, pack_text, read_base, unpack_text
from ...seesr_core.model_files import NANO_FOLDER

EMBEDDED = NANO_FOLDER / "checkpoints" / "seesr-nano.safetensors"

_CLIP = "clip_h."
"""The host's name of SD 2's text encoder, so that its tools (LoRA, saving) know the keys."""
_STORED = "cond_stage_model."
_TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
_NOT_STORED = (f"{_CLIP}transformer.text_projection.weight", f"{_CLIP}logit_scale")
_SD2_CHANNELS = 320
_SD_LATENTS = 4

_MEANS = {0: [0.3447, 0.3447, 0.3447], 12: [0.1717, -0.0453, -0.217], 15: [0.084, -0.0634, 0.1061]}
CODE_RGB = [_MEANS.get(channel, [0.0] * 3) for channel in range(16)]
"""What each latent channel adds to red, green and blue of the live preview: those that hold a cell's mean colour do."""


def register() -> None:
    """Let the host recognise the small model. Calling it again changes nothing."""
    models = comfy.supported_models.models
    if not any(model.__name__ == SeeSRNano.__name__ for model in models):
        # Last: whatever the host knows itself is matched before.
        models.append(SeeSRNano)


class NanoLatent(comfy.latent_formats.SD15):
    """Latents of the first release's autoencoder, four channels; what the host's live previews make of them."""

    def __init__(self) -> None:
        super().__init__()
        # Least squares of photos, each latent cell's mean colour in -1 ... 1 against its four channels.
        self.latent_rgb_factors = [
            [0.1780, 0.1226, -0.0346],
            [0.4521, 0.5071, 0.4737],
            [0.0768, -0.1627, -0.3228],
            [0.0622, -0.0412, -0.0412],
        ]
        self.latent_rgb_factors_bias = [-0.1531, -0.2195, -0.3354]
        # Decodes Stable Diffusion's latents.
        self.taesd_decoder_name = None


class CosineLatent(comfy.latent_formats.LatentFormat):
    """The small model's cosine code of 8×8 pixels, see `trainer.nano.dct`.

    The scale is that of SD's latents, which `vae_scale` in the file takes back; so one file layout serves both.
    """

    latent_channels = len(CODE_RGB)
    scale_factor = SD_LATENT_SCALE
    latent_rgb_factors = CODE_RGB


class SeeSRNano(comfy.supported_models.SD20):
    """SD 2 with fewer channels, a text encoder of its own and, since its second release, latents of its own."""

    latent_format = NanoLatent

    unet_config = {  # noqa: RUF012 - the host's own form
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }

    @classmethod
    def matches(cls, unet_config: Mapping[str, Any], state_dict: Any = None, unet_key_prefix: str = "") -> bool:
        """Whether U-Net and text encoder are a small model's: narrower than SD's, of one text width."""
        if state_dict is None or _TOKENS not in state_dict or not super().matches(unet_config):
            return False
        if unet_config["in_channels"] not in (_SD_LATENTS, CosineLatent.latent_channels):
            return False
        width = state_dict[_TOKENS].shape[1]
        return unet_config["model_channels"] < _SD2_CHANNELS and unet_config.get("context_dim") == width

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        self.memory_usage_factor = unet_config["model_channels"] / _SD2_CHANNELS
        if unet_config["in_channels"] != _SD_LATENTS:
            self.latent_format = CosineLatent()

    def inpaint_model(self) -> bool:
        """Never; the host takes more than four input channels for a picture and its mask."""
        return False

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> Any:
        """The small model predicts noise; SD 2's test for v-prediction reads weights that it does not have."""
        return comfy.model_base.ModelType.EPS

    def clip_target(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Text encoder and tokenizer with the sizes and words of this file."""
        config, files = _text_of(state_dict)
        target = comfy.supported_models_base.ClipTarget(partial(NanoTokenizer, config, files), NanoClip)
        target.params["text_config"] = config
        return target

    def process_clip_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's text weights under the host's names; the projection of the pooled state, unused, is neutral."""
        text = comfy.utils.state_dict_prefix_replace(state_dict, {_STORED: _CLIP}, filter_keys=True)
        text.pop(TEXT_JSON.replace(_STORED, _CLIP), None)
        if text:
            width = text[_TOKENS.replace(_STORED, _CLIP)].shape[1]
            text[_NOT_STORED[0]] = torch.eye(width)
        return text

    def process_clip_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `process_clip_state_dict`; the tokenizer adds `text_json` itself."""
        kept = {key: tensor for key, tensor in state_dict.items() if key not in _NOT_STORED}
        return {_STORED + key.removeprefix(_CLIP): tensor for key, tensor in kept.items()}


class NanoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The small model's byte-pair tokenizer in the host's wrapper."""

    def __init__(self, config: Mapping[str, Any], files: TokenizerFiles, **host: Any) -> None:
        self._packed = pack_text(config, files)
        super().__init__(clip_name="h", tokenizer=partial(_Tokenizer, config, files), **host)

    def state_dict(self) -> dict[str, Tensor]:
        """What the host saves beside the text encoder."""
        return {TEXT_JSON.removeprefix(_STORED): self._packed}


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, config: Mapping[str, Any], files: TokenizerFiles, **host: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            files.write(Path(folder))
            super().__init__(
                folder,
                max_length=config["max_position_embeddings"],
                pad_with_end=False,
                pad_token=config["pad_token_id"],
                embedding_size=config["hidden_size"],
                embedding_key="clip_h",
                **host,
            )


class NanoClip(comfy.sd1_clip.SD1ClipModel):
    """The small text encoder in the host's wrapper."""

    def __init__(self, **host: Any) -> None:
        super().__init__(clip_name="h", clip_model=_TextEncoder, **host)


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    """Read at its normed last layer, as the core does."""

    def __init__(self, text_config: dict[str, Any], **host: Any) -> None:
        super().__init__(
            max_length=text_config["max_position_embeddings"],
            layer="last",
            textmodel_json_config=dict(text_config),
            model_class=_TextModel,
            special_tokens={
                "start": text_config["bos_token_id"],
                "end": text_config["eos_token_id"],
                "pad": text_config["pad_token_id"],
            },
            **host,
        )


class _TextModel(comfy.clip_model.CLIPTextModel):
    """The host's CLIP with a vocabulary of another size than CLIP's."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            config["hidden_size"],
            vocab_size=config["vocab_size"],
            num_positions=config["max_position_embeddings"],
            dtype=dtype,
            device=device,
            operations=operations,
        )


def _text_of(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], TokenizerFiles]:
    """Settings and tokenizer of a file; files of the first release carry them as metadata, which the host drops."""
    if TEXT_JSON in state_dict:
        return unpack_text(state_dict[TEXT_JSON])
    embedded = read_base(EMBEDDED)
    expected = (embedded.text_config["vocab_size"], embedded.text_config["hidden_size"])
    found = tuple(state_dict[_TOKENS].shape)
    if found != expected:
        raise WeightsError(
            f"The checkpoint has no tokenizer inside (no {TEXT_JSON}), and its text encoder of {found[0]} words and "
            f"width {found[1]} is not the embedded model's ({expected[0]}, {expected[1]}): write it again with "
            "`python -m trainer.nano`."
        )
    return embedded.text_config, embedded.tokenizer

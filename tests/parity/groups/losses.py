"""Both training losses with the gradients they send into the trained weights (paper equations 1 and 2).

Stage 1 runs the full-size tagger, stage 2 the tiny networks. Gradients differ between builds more than outputs do:
they sum over thousands of positions, and many nearly cancel. Tolerances are therefore relative to each quantity's size.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seesr_core.dape import DAPE, DAPEConfig, SwinConfig
from seesr_core.dape.lora import PEFT_PREFIX, peft_lora_to_published, published_lora_to_peft
from seesr_core.dape.preprocess import normalize
from seesr_core.method.controlnet import build_controlnet
from seesr_core.method.losses import noise_loss, prompt_loss
from seesr_core.method.rca import rca_parameters
from seesr_core.method.unet import build_unet
from trainer.data.crops import Crops
from trainer.stage1.networks import add_lora
from trainer.stage1.recipes import stage1_paper
from trainer.stage2.batches import Batch
from trainer.stage2.networks import Networks
from trainer.stage2.recipes import stage2_debug
from trainer.stage2.task import Stage2Task

from ..compare import Comparison
from ..weights import rule_state_dict
from .pipeline import rule_made, salts

GROUP = "losses"
ENCODERS = {"swin_l": SwinConfig(), "swin_b": SwinConfig(embed_dim=128, num_heads=(4, 8, 16, 32))}
LATENTS, PRED, FEATURES, LOGITS = 1e-6, 1e-4, 1e-4, 5e-4
LOSS, GRADIENT = 1e-5, 1e-4
"""Relative to the expected value, or to a tensor's largest element. Against float64, the tiny networks' gradients in
float32 are off by up to 6e-6 of the largest element, and their norms by up to 1.5e-6."""
FLOOR = 1e-6
"""Norms below this are compared as if they were that large."""


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Stage 2, the list of what it trains in the full U-Net and, with `full`, stage 1 of every tagger in the folder."""
    root = folder / GROUP
    if (root / "stage2_meta.json").is_file():
        yield from stage2_cases(folder)
    if (root / "stage2_full_trainable.json.gz").is_file():
        yield from full_size_cases(folder)
    for meta_file in sorted(root.glob("stage1_*_meta.json")) if full else ():
        yield from stage1_cases(folder, meta_file.name.removesuffix("_meta.json"))


def stage2_cases(folder: Path) -> Iterator[Comparison]:
    """Equation 2 of the tiny networks on given latents, noise and prompts."""
    root, meta = folder / GROUP, _read(folder / GROUP / "stage2_meta.json")
    expected = load_file(root / "stage2_outputs.safetensors")
    networks = _tiny_networks(folder / "unet_controlnet", meta)
    trained = _stage2_parameters(networks)
    noisy, pred, loss = _stage2_step(networks, load_file(root / "stage2_inputs.safetensors"))
    loss.backward()
    yield Comparison.of(GROUP, "stage2", "noisy_latents", noisy, expected["noisy_latents"], LATENTS)
    yield Comparison.of(GROUP, "stage2", "pred", pred, expected["pred"], PRED)
    yield _number("stage2", "loss", loss, meta["loss"], LOSS)
    yield from _counts(networks, meta)
    yield from _gradients("stage2", {name: p.grad for name, p in trained.items()}, meta["grad_norms"], expected)
    norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    yield _number("stage2", "total_grad_norm", norm, meta["total_grad_norm"], GRADIENT)


def _tiny_networks(nets: Path, meta: Mapping[str, Any]) -> Networks:
    unet_salt, controlnet_salt = salts(meta, nets)
    unet = rule_made(build_unet(_read(nets / "tiny_unet_config.json")), unet_salt).requires_grad_(False)
    for parameter in rca_parameters(unet).values():
        parameter.requires_grad_(True)
    controlnet = rule_made(build_controlnet(_read(nets / "tiny_controlnet_config.json")), controlnet_salt)
    absent = nn.Identity()
    dape = cast(DAPE, absent)
    return Networks(unet=unet, controlnet=controlnet, vae=absent, text_encoder=absent, tokenizer=None, dape=dape)


def _stage2_parameters(networks: Networks) -> dict[str, nn.Parameter]:
    modules = {"unet": networks.unet, "controlnet": networks.controlnet}
    named = {f"{m}:{name}": p for m, module in modules.items() for name, p in module.named_parameters()}
    return {name: p for name, p in named.items() if p.requires_grad}


def _stage2_step(networks: Networks, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, predicted noise and loss, by the trainer's own step on the golden inputs."""
    condition = inputs["cond_u8"].float() / 255
    batch = Batch(
        target=condition,
        condition=condition,
        latents=inputs["latents"],
        noise=inputs["noise"],
        timesteps=inputs["timesteps"],
        soft_prompt=inputs["soft"],
        prompts=[],
    )
    task = Stage2Task(stage2_debug(), networks, cast(Crops, None), ())
    noisy = batch.noisy()
    pred = task.predict(batch, inputs["text"])
    return noisy, pred, noise_loss(pred, batch.noise)


def _counts(networks: Networks, meta: Mapping[str, Any]) -> Iterator[Comparison]:
    rca = rca_parameters(networks.unet)
    quantities = {
        "unet_trainable_modules": list(dict.fromkeys(name.partition("image_attentions")[0] for name in rca)),
        "n_unet_trainable": sum(p.numel() for p in rca.values()),
        "n_controlnet_trainable": sum(p.numel() for p in networks.controlnet.parameters() if p.requires_grad),
    }
    for quantity, actual in quantities.items():
        if quantity in meta:
            expected = meta[quantity]
            if isinstance(expected, list):
                expected = [name.removesuffix("image_attentions") for name in expected]
            yield Comparison.equal(GROUP, "stage2", quantity, actual, expected)


def full_size_cases(folder: Path) -> Iterator[Comparison]:
    """Names and number of the parameters that stage 2 trains in the full U-Net."""
    with gzip.open(folder / GROUP / "stage2_full_trainable.json.gz", "rt", encoding="utf-8") as handle:
        listed = json.load(handle)
    with torch.device("meta"):
        unet: Any = build_unet(_read(folder / "unet_controlnet" / "full_unet_config.json"))
    rca = rca_parameters(unet)
    count = sum(p.numel() for p in rca.values())
    yield Comparison.equal(
        GROUP, "stage2_full", "unet_trainable_keys", sorted(rca), sorted(listed["unet_trainable_keys_full"])
    )
    yield Comparison.equal(GROUP, "stage2_full", "n_keys", len(rca), listed["n_keys"])
    yield Comparison.equal(GROUP, "stage2_full", "n_params", count, listed["n_params"])


def stage1_cases(folder: Path, case: str) -> Iterator[Comparison]:
    """Equation 1 of a full-size tagger against its own adapted copy, dropout off."""
    root = folder / GROUP
    meta = _read(root / f"{case}_meta.json")
    variant: str = meta["variant"]
    inputs = load_file(root / f"{case}_inputs.safetensors")
    expected = load_file(root / f"{case}_outputs.safetensors")
    clean, degraded = (normalize(inputs[key].permute(0, 3, 1, 2).float() / 255) for key in ("gt_u8_bhwc", "lq_u8_bhwc"))
    salt = _tagger_meta(folder, variant).get("salt", "")
    teacher = _teacher(variant, clean.shape[-1], expected["logits_gt"].shape[-1], salt)
    with torch.no_grad():
        target = teacher(clean)
    student = _student(teacher, salt)
    output = student(degraded)
    loss = prompt_loss(*output, *target)
    loss.total.backward()
    for name, actual in (("feature_lq", output.tokens_BLD), ("feature_gt", target.tokens_BLD)):
        sliced = _thinned(actual, expected[f"{name}_slice"].shape)
        yield Comparison.of(GROUP, case, f"{name}_slice", sliced, expected[f"{name}_slice"], FEATURES)
        yield _number(case, f"{name}_l2", actual.double().norm(), meta[name]["l2"], LOSS)
    for name, logits in (("logits_lq", output.logits_BN), ("logits_gt", target.logits_BN)):
        yield Comparison.of(GROUP, case, name, logits, expected[name], LOGITS)
    for name, value in (("l_fea", loss.tokens), ("l_logits", loss.logits), ("l_total", loss.total)):
        yield _number(case, name, value, meta[name], LOSS)
    yield from _adapter_cases(folder, case, variant, _published_gradients(student), meta, expected)


def _teacher(variant: str, image_size: int, tags: int, salt: str) -> DAPE:
    """The plain tagger with rule-made weights; what the golden tensors' shapes say overrides the published sizes."""
    config = DAPEConfig(swin=replace(ENCODERS[variant.rsplit("_", 1)[0]], image_size=image_size), num_tags=tags)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in DAPE(config).state_dict().items()}
    return DAPE.from_state_dict(rule_state_dict(shapes, salt), config).requires_grad_(False)


def _student(teacher: DAPE, salt: str) -> Any:
    """The trainer's student with rule-made adapters in place of their start values; `teacher` becomes part of it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    student = add_lora(teacher, stage1_paper(), torch.Generator().manual_seed(0)).eval()
    published = peft_lora_to_published(get_peft_model_state_dict(student, save_embedding_layers=False))
    made = rule_state_dict({key: tensor.shape for key, tensor in published.items()}, salt)
    set_peft_model_state_dict(student, published_lora_to_peft(made))
    return student


def _published_gradients(student: nn.Module) -> dict[str, Tensor]:
    """Gradients under the names and in the layout of the published adapter: query and value of the encoder in one."""
    named = {name.replace(".default.", "."): p.grad for name, p in student.named_parameters() if p.requires_grad}
    missing = [name.removeprefix(PEFT_PREFIX) for name, grad in named.items() if grad is None]
    if missing:
        raise ValueError(f"no gradient reached {missing[:3]}")
    return peft_lora_to_published({name: grad for name, grad in named.items() if grad is not None})


def _adapter_cases(
    folder: Path,
    case: str,
    variant: str,
    gradients: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    expected: Mapping[str, Tensor],
) -> Iterator[Comparison]:
    yield from _gradients(case, gradients, meta["grad_norm_by_param"], expected)
    groups: dict[str, float] = {}
    for name, gradient in gradients.items():
        group = _group(name, meta["grad_norm_by_group"])
        groups[group] = math.hypot(groups.get(group, 0.0), gradient.norm().item())
    yield _norms(case, "grad_norm_by_group", groups, meta["grad_norm_by_group"])
    total = torch.tensor(math.hypot(*groups.values()))
    yield _number(case, "total_lora_grad_norm", total, meta["total_lora_grad_norm"], GRADIENT)
    key_list = folder / "dape" / f"{variant}_dape_pth_keys.json.gz"
    if key_list.is_file():
        with gzip.open(key_list, "rt", encoding="utf-8") as handle:
            untrained = {key: entry["shape"] for key, entry in json.load(handle).items() if key not in gradients}
        count = sum(g.numel() for g in gradients.values()) + sum(math.prod(shape) for shape in untrained.values())
        yield Comparison.equal(
            GROUP, case, "lora_params_without_grad", len(untrained), meta["lora_params_without_grad"]
        )
        yield Comparison.equal(GROUP, case, "n_trainable", count, meta["n_trainable"])


def _group(name: str, groups: Collection[str]) -> str:
    """The group such as `visual_encoder.layers.0:lora_A` that a parameter belongs to, else its own name."""
    parts = {group: group.rpartition(":") for group in groups}
    return next(
        (g for g, (stem, _, half) in parts.items() if name.startswith(f"{stem}.") and name.endswith(half)), name
    )


def _gradients(
    case: str, gradients: Mapping[str, Tensor | None], norms: Mapping[str, float], saved: Mapping[str, Tensor]
) -> Iterator[Comparison]:
    """Which parameters have a gradient, the norm of each, and the gradients that were saved whole."""
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    yield _norms(case, "grad_norms", {name: gradient.norm().item() for name, gradient in found.items()}, norms)
    for key, expected in saved.items():
        name = key.removeprefix("grad.")
        if name != key and name in found:
            limit = GRADIENT * expected.abs().max().item()
            yield Comparison.of(GROUP, case, key, found[name], expected, limit)
        elif name != key:
            yield Comparison.wrong(GROUP, case, key, "no gradient")


def _norms(case: str, quantity: str, actual: Mapping[str, float], expected: Mapping[str, float]) -> Comparison:
    """Norms by name, each divided by the expected one, so that small gradients count as much as large ones."""
    if actual.keys() != expected.keys():
        odd = sorted(actual.keys() ^ expected.keys())
        return Comparison.wrong(GROUP, case, quantity, f"{len(odd)} names differ, first {odd[0]}")
    wanted = torch.tensor(list(expected.values()), dtype=torch.float64)
    found = torch.tensor([actual[name] for name in expected], dtype=torch.float64)
    scale = wanted.clamp_min(FLOOR)
    return Comparison.of(GROUP, case, f"{quantity}/expected", found / scale, wanted / scale, GRADIENT)


def _number(case: str, quantity: str, actual: Tensor, expected: float, tolerance: float) -> Comparison:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return Comparison.of(GROUP, case, quantity, actual.detach(), wanted, tolerance * abs(expected))


def _thinned(tokens_BLD: Tensor, shape: torch.Size) -> Tensor:
    """Every n-th element of each axis, so many that the shape fits."""
    steps = [math.ceil(size / kept) for size, kept in zip(tokens_BLD.shape, shape, strict=True)]
    return tokens_BLD.detach()[tuple(slice(None, None, step) for step in steps)]


def _tagger_meta(folder: Path, variant: str) -> dict[str, Any]:
    path = folder / "dape" / f"{variant}_meta.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data

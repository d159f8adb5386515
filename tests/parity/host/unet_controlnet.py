"""Single calls of U-Net and ControlNet with RCA, through the host: SeeSR Apply, its guider, its U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...host.locate import plugin
from ..compare import Comparison
from ..groups.unet_controlnet import GROUP, KINDS, TOLERANCE, forms, read_json, soft_tokens
from .networks import rule_made


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Every run of the kinds of networks that the folder holds."""
    for kind in KINDS if full else KINDS[:1]:
        if (folder / GROUP / f"{kind}_meta.json").exists():
            yield from _kind(folder / GROUP, kind)


def _kind(folder: Path, kind: str) -> Iterator[Comparison]:
    meta = read_json(folder / f"{kind}_meta.json")
    inputs, expected = (load_file(folder / f"{kind}_{name}.safetensors") for name in ("inputs", "outputs"))
    model, seesr = rule_made(folder, kind, (meta["salt_unet"], meta["salt_controlnet"]))
    for name, modules in (
        ("unet", [model.model.diffusion_model, seesr.rca.patcher.model]),
        ("controlnet", [seesr.control.control_model]),
    ):
        count = sum(parameter.numel() for module in modules for parameter in module.parameters())
        yield Comparison.equal(GROUP, kind, f"{name}_parameters", count, meta[f"n_params_{name}"])
    for run, settings in meta["runs"].items():
        size = run.split(".")[0]
        record = compute(model, seesr, inputs, size, settings)
        x, timestep = (
            inputs[f"{size}.latent"],
            torch.as_tensor(settings["timestep"]).expand(len(inputs[f"{size}.latent"])),
        )
        yield Comparison.of(GROUP, f"{kind}.{run}", "unet_input", record.x, x, TOLERANCE)
        yield Comparison.equal(GROUP, f"{kind}.{run}", "timesteps", record.timesteps, timestep.tolist())
        for quantity, actual in record.tensors.items():
            for form, value in forms(quantity, actual).items():
                if f"{run}.{form}" in expected:
                    yield Comparison.of(GROUP, f"{kind}.{run}", form, value, expected[f"{run}.{form}"], TOLERANCE)


@dataclass(slots=True)
class Record:
    """What the host's U-Net got and gave in one call; a wrapper of `WrappersMP.DIFFUSION_MODEL`."""

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    timesteps: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self, executor: Any, x: Tensor, timesteps: Tensor, context: Any, y: Any, control: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """One call; `control` is read first, since the U-Net empties it."""
        self.x, self.timesteps = x, [int(t) for t in timesteps]
        if control is not None:
            self.tensors |= {f"down{i:02d}": residual for i, residual in enumerate(control["output"])}
            self.tensors["mid"] = control["middle"][0]
        self.tensors["eps"] = executor(x, timesteps, context, y, control, *args, **kwargs)
        return self.tensors["eps"]


def compute(model: Any, seesr: Any, inputs: Mapping[str, Tensor], size: str, settings: Mapping[str, Any]) -> Record:
    """One run: the model with the U-Net's soft prompt, the prompt with the ControlNet's."""
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    strength = settings["conditioning_scale"] if settings["control"] else 0.0
    patched, _, _ = _apply(model, seesr, inputs, size, settings["soft_unet"], strength=strength)
    _, positive, negative = _apply(model, seesr, inputs, size, settings["soft_controlnet"] or "A", strength=strength)
    record = Record()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "parity", record)
    x, sampling = inputs[f"{size}.latent"], model.get_model_object("model_sampling")
    sigma = sampling.sigma(torch.as_tensor(settings["timestep"]).float()).expand(len(x))
    noise = torch.zeros_like(x)
    sampler, sigmas = _single_call(x, sigma), torch.stack([sigma.max(), torch.tensor(0.0)])
    comfy.sample.sample_custom(patched, noise, 1.0, sampler, sigmas, positive, negative, noise, disable_pbar=True)
    return record


def _apply(model: Any, seesr: Any, inputs: Mapping[str, Tensor], size: str, soft: str, *, strength: float) -> Any:
    prompt = [[inputs[f"{size}.text"], {}]]
    node = plugin("nodes.apply").SeeSRApply
    applied = node.execute(
        model=[model],
        positive=[prompt],
        negative=[prompt],
        seesr_model=[seesr],
        soft_prompt=[soft_tokens(inputs, size, soft)],
        image=[inputs[f"{size}.cond_u8"].float().movedim(1, -1) / 255],
        strength=[strength],
        rca_strength=[1.0],
        start_percent=[0.0],
        end_percent=[1.0],
    ).args
    return tuple(entry for (entry,) in applied)


def _single_call(x: Tensor, sigma: Tensor) -> Any:
    """A SAMPLER that shows the U-Net exactly `x` once; the host keeps latents scaled by √(1 + σ²)."""
    import comfy.samplers

    class SingleCall(comfy.samplers.Sampler):
        def sample(self, model: Any, _sigmas: Any, extra_args: dict[str, Any], *_: Any, **__: Any) -> Tensor:
            return model(x * (1 + sigma**2).sqrt()[:, None, None, None], sigma, **extra_args)

    return SingleCall()

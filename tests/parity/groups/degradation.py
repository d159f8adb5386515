"""Degradation: kernels, single operations, and whole runs that replay their recorded random decisions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.degradation import (
    BlurConfig,
    DegradationConfig,
    FinalSincConfig,
    Kernels,
    SharpenConfig,
    StageConfig,
    degrade,
)
from trainer.degradation.config import ResizeMode
from trainer.degradation.jpeg import jpeg, quality_to_step
from trainer.degradation.kernels import gaussian_kernel, generalized_kernel, pad_kernel, plateau_kernel, sinc_kernel
from trainer.degradation.noise import gaussian_noise, poisson_noise
from trainer.degradation.ops import blur, quantize, resize, sharpen, sharpen_window

from ..compare import Comparison

GROUP = "degradation"
KERNEL_TOLERANCE = 1e-7
OP_TOLERANCE = 1e-5
JPEG_TOLERANCE = 1e-5  # mean: a block may differ where a DCT coefficient sits on a rounding edge

T = TypeVar("T")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """What the folder holds."""

    meta: dict[str, Any]
    constants: dict[str, Any]
    inputs: Tensors
    outputs: Tensors

    @property
    def image(self) -> Tensor:
        """The photos of the single operations, (B, 3, H, W)."""
        return from_u8(self.inputs["ops.image_u8_hwc"])


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Every recorded kernel, operation and run; all are small, so `full` makes no difference."""
    root = folder / GROUP
    recording = Recording(
        meta=json.loads((root / "meta.json").read_text(encoding="utf-8")),
        constants=json.loads((root / "constants.json").read_text(encoding="utf-8")),
        inputs=load_file(root / "inputs.safetensors"),
        outputs=load_file(root / "outputs.safetensors"),
    )
    yield from _kernel_cases(recording)
    yield from _operation_cases(recording)
    for name in recording.meta["runs"]:
        yield from _run_cases(recording, name)


class ReplayError(Exception):
    """The degradation asked for something else than was recorded."""


class RecordedDraws:
    """Replays a list of recorded decisions and refuses questions that differ from the recorded ones."""

    def __init__(self, entries: Sequence[Mapping[str, Any]], tensors: Tensors, prefix: str) -> None:
        """`entries`: the decisions in order; `tensors`: holds the random tensors as `{prefix}{name of the draw}`."""
        self._entries = list(entries)
        self._tensors = tensors
        self._prefix = prefix
        self._position = 0

    @property
    def left(self) -> int:
        """Decisions that nobody has asked for yet."""
        return len(self._entries) - self._position

    def uniform(self, low: float, high: float) -> float:
        """The recorded `random.uniform`."""
        return self._scalar("random.uniform", [low, high])

    def chance(self, probability: float) -> bool:
        """The recorded `random.random`, compared with the probability."""
        return self._scalar("random.random", []) < probability

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """The recorded `random.choice` or, with weights, `random.choices`."""
        if weights is None:
            return options[list(options).index(self._scalar("random.choice", [list(options)]))]
        return options[list(options).index(self._scalar("random.choices", [list(options), list(weights)])[0])]

    def uniforms(self, count: int, low: float, high: float) -> Tensor:
        """The recorded `uniform_` values, or the recorded `rand` brought into the range."""
        entry = self._next("draw", [count])
        if "values" in entry:
            self._expect(entry["range"], [low, high])
            return torch.tensor(entry["values"])
        return self._tensor(entry, (count,)) * (high - low) + low

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The recorded `randn`."""
        return self._tensor(self._next("draw", list(shape)), shape)

    def poisson(self, rate: Tensor) -> Tensor:
        """The recorded counts."""
        return self._tensor(self._next("draw", list(rate.shape)), rate.shape).float()

    def _next(self, kind: str, request: object) -> Mapping[str, Any]:
        if not self.left:
            raise ReplayError(f"draw {self._position}: asked for {kind} {request}, but the recording ends here")
        entry = self._entries[self._position]
        if kind not in entry:
            raise ReplayError(f"draw {self._position}: asked for {kind} {request}, recorded {dict(entry)}")
        self._position += 1
        return entry

    def _scalar(self, kind: str, arguments: list[Any]) -> Any:
        entry = self._next(kind, arguments)
        self._expect(entry[kind], arguments)
        return entry["result"]

    def _expect(self, recorded: object, asked: object) -> None:
        if recorded != asked:
            raise ReplayError(f"draw {self._position - 1}: asked with {asked}, recorded with {recorded}")

    def _tensor(self, entry: Mapping[str, Any], shape: Sequence[int]) -> Tensor:
        name = self._prefix + entry["draw"]
        tensor = self._tensors[name if name in self._tensors else f"{name}_i16"]
        self._expect(list(tensor.shape), list(shape))
        return tensor


def config_from(constants: Mapping[str, Any], usm: Mapping[str, Any]) -> DegradationConfig:
    """The configuration that a folder's constants describe."""
    kernels = _section(constants, "dataset_args")
    stages = _section(constants, "degradation_args")
    sizes = tuple(constants["kernel_sizes"])
    return DegradationConfig(
        sharpen=SharpenConfig(weight=usm["weight"], radius=usm["radius"], threshold=usm["threshold"]),
        first=_stage(kernels, stages, "", sizes, constants, blur_probability=1.0),
        second=_stage(kernels, stages, "2", sizes, constants, blur_probability=stages["second_blur_prob"]),
        final_sinc=FinalSincConfig(probability=kernels["final_sinc_prob"], sizes=sizes),
        resize_modes=tuple(constants["resize_modes"]),
        kernel_canvas=kernels["blur_kernel_size"],
    )


def from_u8(image: Tensor) -> Tensor:
    """(H, W, 3) or (B, H, W, 3) uint8 to (B, 3, H, W) in [0, 1]."""
    batch = image if image.ndim == 4 else image[None]
    return batch.permute(0, 3, 1, 2).float() / 255


def to_u8(x_B3HW: Tensor) -> Tensor:
    """A batch as (B, H, W, 3) uint8, or a single image as (H, W, 3); saturated and rounded half to even."""
    images = (quantize(x_B3HW) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return images[0] if len(images) == 1 else images


def _section(constants: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(value for key, value in constants.items() if key.startswith(name))


def _stage(
    kernels: Mapping[str, Any],
    stages: Mapping[str, Any],
    suffix: str,
    sizes: tuple[int, ...],
    constants: Mapping[str, Any],
    *,
    blur_probability: float,
) -> StageConfig:
    rotation = constants["rotation_range"]
    return StageConfig(
        blur=BlurConfig(
            sizes=sizes,
            families=tuple(kernels[f"kernel_list{suffix}"]),
            family_weights=tuple(kernels[f"kernel_prob{suffix}"]),
            sinc_probability=kernels[f"sinc_prob{suffix}"],
            sigma=tuple(kernels[f"blur_sigma{suffix}"]),
            rotation=tuple(rotation),
            generalized_beta=tuple(kernels[f"betag_range{suffix}"]),
            plateau_beta=tuple(kernels[f"betap_range{suffix}"]),
        ),
        blur_probability=blur_probability,
        resize_weights=tuple(stages[f"resize_prob{suffix}"]),
        resize_range=tuple(stages[f"resize_range{suffix}"]),
        gaussian_probability=stages[f"gaussian_noise_prob{suffix}"],
        gaussian_sigma=tuple(stages[f"noise_range{suffix}"]),
        poisson_scale=tuple(stages[f"poisson_scale_range{suffix}"]),
        gray_probability=stages[f"gray_noise_prob{suffix}"],
        jpeg_quality=tuple(stages[f"jpeg_range{suffix}"]),
    )


def _kernel_cases(recording: Recording) -> Iterator[Comparison]:
    for name, values in recording.meta["kernels"].items():
        expected = recording.outputs[f"kernel.{name}_f64"]
        yield Comparison.of(GROUP, f"kernel.{name}", "kernel", _blur_kernel(name, values), expected, KERNEL_TOLERANCE)
    for name, values in recording.meta["sinc"].items():
        kernel = sinc_kernel(values["kernel_size"], values["omega_c"])
        if values["pad_to"]:
            kernel = pad_kernel(kernel, values["pad_to"])
        yield Comparison.of(GROUP, name, "kernel", kernel, recording.outputs[f"{name}_f64"], KERNEL_TOLERANCE)


def _blur_kernel(name: str, values: Mapping[str, Any]) -> Tensor:
    sigma_y, rotation = (values["sig_x"], 0.0) if values["isotropic"] else (values["sig_y"], values["theta"])
    shape = (values["kernel_size"], values["sig_x"], sigma_y, rotation)
    if name.startswith("generalized"):
        return generalized_kernel(*shape, values["beta"])
    return plateau_kernel(*shape, values["beta"]) if name.startswith("plateau") else gaussian_kernel(*shape)


def _operation_cases(recording: Recording) -> Iterator[Comparison]:
    yield from _sharpen_cases(recording)
    yield from _blur_cases(recording)
    for name in recording.meta["ops"]:
        if name.startswith(("gauss_", "poisson_")):
            yield from _noise_cases(recording, name)
    yield from _resize_cases(recording)
    yield from _jpeg_cases(recording)


def _sharpen_cases(recording: Recording) -> Iterator[Comparison]:
    values, outputs = recording.meta["ops"]["usm"], recording.outputs
    config = config_from(recording.constants, values).sharpen
    window = sharpen_window(config)
    yield Comparison.equal(GROUP, "usm", "radius_used", config.window, values["radius_used"])
    kernel = outputs[f"usm.kernel{config.window}"]
    yield Comparison.of(GROUP, "usm", "kernel", window.T @ window, kernel, KERNEL_TOLERANCE)
    yield Comparison.of(GROUP, "usm", "out", sharpen(recording.image, config), outputs["usm.out"], OP_TOLERANCE)


def _blur_cases(recording: Recording) -> Iterator[Comparison]:
    kernels = recording.inputs["filter2D.kernels"]
    for quantity, chosen in (("per_sample", kernels), ("single", kernels[:1])):
        expected = recording.outputs[f"filter2D.{quantity}"]
        yield Comparison.of(GROUP, "filter2D", quantity, blur(recording.image, chosen), expected, OP_TOLERANCE)


def _noise_cases(recording: Recording, name: str) -> Iterator[Comparison]:
    values, image = recording.meta["ops"][name], recording.image
    noise, strength = (gaussian_noise, "sigma") if name.startswith("gauss") else (poisson_noise, "scale")
    draws = RecordedDraws(values["draws"], recording.inputs, f"{name}.")
    added = noise(image, torch.tensor(values[strength]), torch.tensor(values["gray"]) > 0, draws)
    out = (image + added).clamp(0, 1)
    yield Comparison.of(GROUP, name, "out", out, recording.outputs[f"{name}.out"], OP_TOLERANCE)
    yield Comparison.equal(GROUP, name, "draws_left", draws.left, 0)


def _resize_cases(recording: Recording) -> Iterator[Comparison]:
    for name, expected in recording.outputs.items():
        match = re.fullmatch(r"resize\.(\w+)\.(?:scale([\d.]+)|size(\d+)x(\d+))", name)
        if not match:
            continue
        mode, scale, height, width = match.groups()
        size = None if scale else (int(height), int(width))
        actual = resize(
            recording.image[: len(expected)], cast(ResizeMode, mode), scale=float(scale) if scale else None, size=size
        )
        yield Comparison.of(GROUP, name, "out", actual, expected, OP_TOLERANCE)


def _jpeg_cases(recording: Recording) -> Iterator[Comparison]:
    for quality, factor in recording.meta["ops"]["jpeg"]["quality_to_factor"].items():
        step = quality_to_step(torch.tensor(float(quality), dtype=torch.float64))
        expected = torch.tensor(factor, dtype=torch.float64)
        yield Comparison.of(GROUP, "jpeg", f"factor_q{quality}", step, expected, KERNEL_TOLERANCE)
    for name, expected in recording.outputs.items():
        if not name.startswith("jpeg."):
            continue
        image = recording.image[: len(expected), :, : expected.shape[-2], : expected.shape[-1]]
        qualities = [float(text) for text in name.rpartition("q")[2].split("_")]
        # One quality for all was a Python float, i.e. double precision; a quality per image a float32 tensor.
        dtype = torch.float64 if len(qualities) == 1 else torch.float32
        quality_B = torch.tensor(qualities, dtype=dtype).expand(len(image))
        yield Comparison.of(GROUP, name, "out", jpeg(image, quality_B), expected, JPEG_TOLERANCE, metric="mean_abs")


def _run_cases(recording: Recording, name: str) -> Iterator[Comparison]:
    inputs, outputs = recording.inputs, recording.outputs
    config = config_from(recording.constants, recording.meta["ops"]["usm"])
    draws = RecordedDraws(recording.meta["runs"][name]["draws_in_order"], inputs, f"{name}.")
    kernels = Kernels(
        first=inputs[f"{name}.kernel1"], second=inputs[f"{name}.kernel2"], final=inputs[f"{name}.sinc_kernel"]
    )
    pair = degrade(from_u8(inputs[f"{name}.gt_u8_hwc"]), config, draws, kernels)
    yield Comparison.equal(GROUP, name, "draws_left", draws.left, 0)
    if f"{name}.gt_usm" in outputs:
        yield Comparison.of(GROUP, name, "gt_usm", pair.hr_usm, outputs[f"{name}.gt_usm"], OP_TOLERANCE)
    yield Comparison.of(GROUP, name, "lq", pair.lr, outputs[f"{name}.lq"], JPEG_TOLERANCE, metric="mean_abs")
    yield Comparison.u8(GROUP, name, "sr_bicubic_u8", to_u8(pair.lr_upsampled), outputs[f"{name}.sr_bicubic_u8_hwc"])

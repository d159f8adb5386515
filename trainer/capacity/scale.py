"""What stage 2 takes at full size on machines that are not at hand: a dry run on shapes alone.

    python -m trainer.scale --recipe paper --gpus 8 --memory 24 --tflops 165 --loop.precision bf16

Networks of SD-2's size are built without contents, and passes of one and of two images are counted: arithmetic, and
the most that lives at once. From these follow the batch layout that fits, and the hours at a stated share of the
cards' peak. No weights, photos or GPU are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seesr_core.dape import DAPE
from seesr_core.dape.model import DAPEConfig
from seesr_core.errors import SettingsError
from seesr_core.formats.base import Base

from ..engine import command
from ..stage2.networks import Networks, build_networks, choose_trained
from ..stage2.recipes import STAGE2_RECIPES, Stage2Config
from .dry_run import GIB, MOMENTS, cost_of_pass

log = logging.getLogger(__name__)

SD2_UNET: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "sample_size": 64,
    "use_linear_projection": True,
}
"""What sets SD-2's U-Net apart from diffusers' defaults."""
SD2_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT_PARAMETERS, TOKENS = 340_387_840, 77
"""Parameters of SD-2's text encoder, and its tokens; two operations for each parameter and token."""
TAGS = 4585
ADAPTERS = "Adapters need networks with contents: `python -m trainer.stage2 --trained lora --dry-run` counts them."
_BYTES = 4


@dataclass(kw_only=True)
class ScaleCommand(command.RecipeCommand):
    """Plan stage 2 on other machines. The flags below override the recipe."""

    config: Annotated[Stage2Config, command.SETTINGS]
    """Settings that override the recipe's."""
    gpus: int = 8
    """Number of GPUs in all machines together."""
    nodes: int = 1
    """Number of machines."""
    memory: float = 80.0
    """Memory of each GPU in GiB."""
    tflops: float = 312.0
    """Peak of a GPU in the recipe's precision: 312 for an A100, 165 for an RTX 4090 (both bf16)."""
    utilisation: float = 0.35
    """Share of the peak that is reached; an assumption."""
    reserve: float = 2.0
    """GiB of each GPU left for its driver, kernels and fragments."""
    shard: bool = False
    """FSDP2: weights, gradients and moments of U-Net and ControlNet are divided between the GPUs."""
    link: float = 10.0
    """Rate at which a machine sends to the others, in GB/s."""
    photo: float = 1.0
    """Size of a photo's file in MB."""
    disk: float = 1.0
    """Rate at which a checkpoint is written, in GB/s."""

    def __post_init__(self) -> None:
        numbers = (self.gpus, self.nodes, self.memory, self.tflops, self.link, self.photo, self.disk)
        if min(numbers) <= 0 or not 0 < self.utilisation <= 1 or self.gpus % self.nodes:
            raise SettingsError(
                "gpus, nodes, memory, tflops, link, photo and disk must be above 0, utilisation at most 1, and gpus a "
                f"multiple of nodes; found {numbers} and {self.utilisation}."
            )


@dataclass(kw_only=True, slots=True)
class Counted:
    """What was counted on shapes."""

    trained: int
    """Parameters with gradients."""
    steered: int
    """Parameters of U-Net and ControlNet, the trained ones among them."""
    frozen: int
    """Parameters of autoencoder, text encoder and tagger."""
    trained_flops: float
    """Operations an image, forward and backward, recomputed ones included."""
    frozen_flops: float
    """Operations of the frozen networks for an image."""
    fixed: float
    """Bytes that a pass needs whatever its images, such as weights in half precision."""
    per_image: float
    """Bytes that each image adds."""

    def memory(self, images: int, config: Stage2Config, shards: int) -> dict[str, float]:
        """Bytes on a GPU by part, for passes of so many images."""
        average = self.trained if config.loop.ema else 0
        return {
            "weights": _BYTES * (self.steered / shards + self.frozen),
            "gradients": _BYTES * self.trained / shards,
            "optimizer": MOMENTS[config.loop.optimizer] * self.trained / shards,
            "average": _BYTES * average / shards,
            "activations": self.fixed + images * self.per_image,
        }


def count(config: Stage2Config, *, unet: dict[str, Any] | None = None, tagger: DAPEConfig | None = None) -> Counted:
    """Build the networks without contents and count passes of one and two crops.

    Args:
        config: recipe.
        unet: diffusers config; SD-2's if None.
        tagger: the published one if None.
    """
    tagger = tagger or DAPEConfig(num_tags=TAGS)
    with torch.device("meta"):
        dape = DAPE(tagger).to("meta")
    dape_flops = _looking(lambda: dape.encode_image(torch.zeros(1, 3, *[tagger.swin.image_size] * 2, device="meta")))
    with FakeTensorMode():
        vae, vae_flops = _autoencoder(config.crop)
        nets = _networks(config, unet or SD2_UNET, dape)
        one, two = (_trained_pass(nets, config, images) for images in (1, 2))
    parameters = [*nets.unet.parameters(), *nets.controlnet.parameters()]
    return Counted(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steered=sum(p.numel() for p in parameters),
        frozen=TEXT_PARAMETERS + sum(p.numel() for module in (vae, dape) for p in module.parameters()),
        trained_flops=two[1] / 2,
        frozen_flops=vae_flops + dape_flops + 2 * TOKENS * TEXT_PARAMETERS * (1 - config.null_text),
        fixed=max(2 * one[0] - two[0], 0),
        per_image=two[0] - one[0],
    )


def _autoencoder(crop: int) -> tuple[Any, float]:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**SD2_VAE)
    return vae, _looking(lambda: vae.encode(torch.zeros(1, 3, crop, crop)))


def _looking(action: Any) -> float:
    """Operations of a forward pass without gradients."""
    with torch.no_grad():
        return cost_of_pass(action, [])[1]


def _networks(config: Stage2Config, unet: dict[str, Any], dape: DAPE) -> Networks:
    nothing = torch.nn.Identity()
    base = Base(unet_config=unet, unet_state={}, vae=nothing, text_encoder=nothing, tokenizer=None, scheduler={})
    if config.trained == "lora":
        raise SettingsError(ADAPTERS)
    nets = build_networks(base, dape, replace(config, trained="all"))  # which asks for no weights to start from
    choose_trained(nets, config)
    nets.unet.train()
    nets.controlnet.train()
    return nets


def _trained_pass(nets: Networks, config: Stage2Config, images: int) -> tuple[int, int]:
    """Bytes and operations of a forward and backward pass."""
    tokens = (nets.dape.config.swin.image_size // 32) ** 2 + 1
    x = torch.zeros(images, 4, config.crop // 8, config.crop // 8)
    condition, text = torch.zeros(images, 3, config.crop, config.crop), torch.zeros(images, TOKENS, _width(nets.unet))
    soft_prompt = torch.zeros(images, tokens, nets.dape.config.token_width)
    t = torch.zeros(images, dtype=torch.long)
    kind = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}.get(config.loop.precision)

    def loss() -> Tensor:
        with torch.autocast("cpu", kind, enabled=kind is not None):
            return nets.predict(x, t, text, image=condition, soft_prompt=soft_prompt).float().square().mean()

    return cost_of_pass(loss, [*nets.unet.parameters(), *nets.controlnet.parameters()])


def _width(unet: Any) -> int:
    return cast(int, unet.config.cross_attention_dim)


@dataclass(kw_only=True, slots=True)
class Layout:
    """How a step's images are divided."""

    images: int
    """Images in a pass."""
    accumulation: int
    """Passes of each process."""


def layout(options: ScaleCommand, counted: Counted) -> Layout:
    """The largest passes that fit and divide the batch.

    Raises:
        SettingsError: the batch cannot be divided between the GPUs, or not even one image fits.
    """
    share, rest = divmod(options.config.loop.batch_size, options.gpus)
    if rest:
        raise SettingsError(
            f"A batch of {options.config.loop.batch_size} images cannot be divided between {options.gpus} GPUs; choose "
            "a batch size that is a multiple."
        )
    room, shards = (options.memory - options.reserve) * GIB, options.gpus if options.shard else 1
    for images in range(share, 0, -1):
        if share % images == 0 and sum(counted.memory(images, options.config, shards).values()) <= room:
            return Layout(images=images, accumulation=share // images)
    least = sum(counted.memory(1, options.config, shards).values()) / GIB
    raise SettingsError(
        f"One image a pass takes {least:.1f} GiB and {room / GIB:.1f} GiB are there; choose 8-bit moments "
        "(--loop.optimizer adamw-8bit), half precision (--loop.precision bf16), --gradient-checkpointing or --shard."
    )


def lines(options: ScaleCommand, counted: Counted) -> list[str]:
    """The plan as text."""
    config, chosen = options.config, layout(options, counted)
    memory = counted.memory(chosen.images, config, options.gpus if options.shard else 1)
    batch, steps = config.loop.batch_size, config.loop.steps
    flops = batch * (counted.trained_flops + counted.frozen_flops)
    compute = flops / (options.gpus * options.tflops * 1e12 * options.utilisation)
    sending = _traffic(options, counted, chosen) / (options.link * 1e9) if options.nodes > 1 else 0.0
    seconds = max(compute, sending)  # gradients travel while others are computed
    rate = batch / seconds
    checkpoint = (_BYTES * (2 if config.loop.ema else 1) + MOMENTS[config.loop.optimizer]) * counted.trained
    parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items() if size)
    limit = "the links between the machines" if sending > compute else "arithmetic"
    return [
        f"parameters: {counted.trained / 1e6:,.1f} M trained, {counted.steered / 1e6:,.1f} M in U-Net and ControlNet, "
        f"{counted.frozen / 1e6:,.1f} M in the frozen networks",
        f"arithmetic: {counted.trained_flops / 1e12:.2f} TFLOP an image forward and backward, "
        f"{counted.frozen_flops / 1e12:.2f} in frozen networks",
        f"layout: {options.gpus} GPUs × accumulation {chosen.accumulation} × {chosen.images} images",
        f"GiB of each GPU: {parts}  total {sum(memory.values()) / GIB:.2f} of {options.memory:g}",
        f"each further image a pass: {counted.per_image / GIB:.2f} GiB",
        f"rate: {rate:.1f} images/s at {options.utilisation:.0%} of {options.tflops:g} TFLOPS a GPU; "
        f"{seconds:.2f} s a step",
        f"reads: {rate * options.photo:.0f} MB/s of photos of {options.photo:g} MB",
        f"gradients: {sending:.2f} s a step between machines at {options.link:g} GB/s",
        f"checkpoint: {checkpoint / GIB:.2f} GiB, {checkpoint / (options.disk * 1e9):.0f} s at {options.disk:g} GB/s, "
        f"every {config.loop.save_every * seconds / 60:.0f} minutes",
        f"hours: {steps * seconds / 3600:.0f} for {steps:,} steps of {batch} images",
        f"limited by: {limit}",
    ]


def _traffic(options: ScaleCommand, counted: Counted, chosen: Layout) -> float:
    """Bytes that each machine sends in a step: a ring passes nearly twice the gradients; sharded weights are gathered
    for both directions of every pass besides."""
    gathered = 2 * chosen.accumulation * counted.steered if options.shard else 0
    return _BYTES * (2 * counted.trained + gathered) * (options.gpus - 1) / options.gpus


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(command.parse(ScaleCommand, STAGE2_RECIPES, argv, prog="python -m trainer.scale")))


def run(options: ScaleCommand) -> None:
    """Log the found."""
    if options.config.trained == "lora":
        raise SettingsError(ADAPTERS)
    for line in lines(options, count(options.config)):
        log.info("%s", line)

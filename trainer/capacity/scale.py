"""What stage 2 takes at full size on machines that are not at hand: a dry run on shapes alone.

    python -m trainer.scale --recipe paper --gpus 8 --memory 24 --tflops 165

Networks of SD-2's size are built without contents, and passes of one and of two images are counted: arithmetic, and
the most that lives at once. From these follow the batch layout that fits, and the hours at a stated share of the
cards' peak. No weights, photos or GPU are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seesr_core.dape import DAPE
from seesr_core.dape.model import DAPEConfig
from seesr_core.errors import SettingsError
from seesr_core.formats.base import Base
from seesr_core.formats.control import RCA
from seesr_core.settings import UpscaleSettings

from ..distill.recipes import DISTILL_RECIPES, DistillConfig
from ..distill.task import adapted, frozen_teacher
from ..engine import command
from ..engine.frozen import check_frozen, keep_frozen
from ..engine.optimizers import moment_bytes
from ..stage2.networks import Networks, build_networks, choose_trained
from ..stage2.recipes import STAGE2_RECIPES, Stage2Config
from .dry_run import GIB, bytes_of, cost_of_pass, unique

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
RECIPES: dict[str, Callable[[], Any]] = {**DISTILL_RECIPES, **STAGE2_RECIPES}
"""Recipes of stage 2, and of students."""


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
    steered_bytes: int
    """Bytes of U-Net and ControlNet."""
    frozen_bytes: int
    """Bytes of the frozen networks."""
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
            "weights": self.steered_bytes / shards + self.frozen_bytes,
            "gradients": _BYTES * self.trained / shards,
            "optimizer": moment_bytes(config.loop.optimizer) * self.trained / shards,
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
        dape = DAPE(tagger).to("meta").requires_grad_(False)
    dape_flops = _looking(lambda: dape.encode_image(torch.zeros(1, 3, *[tagger.swin.image_size] * 2, device="meta")))
    keep_frozen(dape, config.frozen_dtype)
    with FakeTensorMode():
        vae, vae_flops = _autoencoder(config.crop)
        keep_frozen(vae, config.frozen_dtype)
        nets = _networks(config, unet or SD2_UNET, dape)
        one, two = (_trained_pass(nets, config, images) for images in (1, 2))
        parameters = [*nets.unet.parameters(), *nets.controlnet.parameters()]
        looking = [p for module in (vae, dape) for p in module.parameters()]
        frozen = sum(p.numel() for p in looking)
    return Counted(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steered=sum(p.numel() for p in parameters),
        frozen=TEXT_PARAMETERS + frozen,
        steered_bytes=bytes_of(parameters),
        # The text encoder is counted by its size alone.
        frozen_bytes=round(bytes_of(looking) * (1 + TEXT_PARAMETERS / frozen)),
        trained_flops=two[1] / 2,
        frozen_flops=vae_flops + dape_flops + 2 * TOKENS * TEXT_PARAMETERS * (1 - config.null_text),
        fixed=max(2 * one[0] - two[0], 0),
        per_image=two[0] - one[0],
    )


def _autoencoder(crop: int) -> tuple[Any, float]:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**SD2_VAE)
    vae.requires_grad_(False)
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
    nets = build_networks(
        base, dape, replace(config, trained="all", frozen_dtype="fp32")
    )  # which asks for no weights to start from
    choose_trained(nets, config)
    keep_frozen(nets.unet, config.frozen_dtype, but=RCA)
    nets.unet.train()
    nets.controlnet.train()
    return nets


def _trained_pass(nets: Networks, config: Stage2Config, images: int) -> tuple[int, int]:
    """Bytes and operations of a forward and backward pass."""
    x, t, text, more = _inputs(nets, config, images)
    half = config.loop.precision != "fp32"

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return nets.predict(x, t, text, **more).float().square().mean()

    parameters = [*nets.unet.parameters(), *nets.controlnet.parameters()]
    return cost_of_pass(loss, parameters, offload=config.loop.offload_activations)


def _inputs(nets: Networks, config: Stage2Config, images: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timesteps, text states, and what else the networks look at."""
    tokens = (nets.dape.config.swin.image_size // 32) ** 2 + 1
    x = torch.zeros(images, 4, config.crop // 8, config.crop // 8)
    condition, text = torch.zeros(images, 3, config.crop, config.crop), torch.zeros(images, TOKENS, _width(nets.unet))
    soft_prompt = torch.zeros(images, tokens, nets.dape.config.token_width)
    t = torch.zeros(images, dtype=torch.long)
    return x, t, text, {"image": condition, "soft_prompt": soft_prompt}


def count_student(
    config: DistillConfig, *, unet: dict[str, Any] | None = None, tagger: DAPEConfig | None = None
) -> Counted:
    """As `count`, of a student: its own steps, the decoder behind them, and the follower of the matching term.

    The teacher's steps, with their guidance, are among the operations of frozen networks.
    """
    plain = replace(config, trained="all", gradient_checkpointing=False)
    looking = count(plain, unet=unet, tagger=tagger)
    with torch.device("meta"):  # where adapters can be added, as they cannot be to tensors without contents elsewhere
        dape = DAPE(tagger or DAPEConfig(num_tags=TAGS)).requires_grad_(False)
        teacher = frozen_teacher(_networks(config, unet or SD2_UNET, dape))
        keep_frozen(teacher.controlnet, config.frozen_dtype)
        nets = [adapted(teacher, config, number) for number in range(2 if config.matching_weight else 1)]
    with FakeTensorMode():
        vae: Any = _autoencoder(config.crop)[0]
        keep_frozen(vae, config.frozen_dtype)
        known: dict[int, Any] = {}
        steering = [network for n in (teacher, *nets) for network in (n.unet, n.controlnet)]
        for network in steering:
            _place(network, known)
        if config.gradient_checkpointing:
            for network in (*steering, vae):
                network.enable_gradient_checkpointing()
        forward = _looking(lambda: _predicted(teacher, config, 1))
        one, two = (_student_pass(nets, vae, config, images) for images in (1, 2))
        steered = unique(p for network in steering for p in network.parameters())
        trained = [p for p in steered if p.requires_grad]
    settings = UpscaleSettings.for_model(config.teacher())
    calls = len(settings.denoised_timesteps()) * (2 if settings.cfg > 1 else 1)
    return replace(
        looking,
        trained=sum(p.numel() for p in trained),
        steered=sum(p.numel() for p in steered),
        steered_bytes=bytes_of(steered),
        trained_flops=two[1] / 2,
        frozen_flops=looking.frozen_flops + calls * forward,
        fixed=max(2 * one[0] - two[0], 0),
        per_image=two[0] - one[0],
    )


def _place(network: Any, known: dict[int, Any]) -> None:
    """Give a network on the meta device tensors without contents on the CPU; those in `known` are there already."""
    for part in network.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in known:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    wanted = isinstance(tensor, torch.nn.Parameter)
                    known[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if wanted else empty
                if tensor is not None:
                    tensors[name] = known[id(tensor)]


def _predicted(nets: Networks, config: Stage2Config, images: int) -> Tensor:
    x, t, text, more = _inputs(nets, config, images)
    return nets.predict(x, t, text, **more)


def _student_pass(nets: Sequence[Networks], vae: Any, config: DistillConfig, images: int) -> tuple[int, int]:
    """Bytes and operations of a pass of student and follower, and of the decoder."""
    x, t, text, more = _inputs(nets[0], config, images)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.loop.precision != "fp32"):
            z = x
            for _ in range(config.student_steps):
                z = z - nets[0].predict(z, t, text, **more).float()
            result = vae.decode(z, return_dict=False)[0].float().square().mean() + z.square().mean()
            for follower in nets[1:]:
                result = result + follower.predict(z.detach(), t, text, **more).float().square().mean()
            return result

    networks = [network for n in nets for network in (n.unet, n.controlnet)]
    parameters = unique(p for network in (*networks, vae) for p in network.parameters())
    return cost_of_pass(loss, parameters, offload=config.loop.offload_activations)


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
        "(--loop.optimizer adamw-8bit), half precision (--loop.precision mixed, --frozen-dtype bf16), "
        "--gradient-checkpointing, --loop.offload-activations or --shard."
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
    checkpoint = (_BYTES * (2 if config.loop.ema else 1) + moment_bytes(config.loop.optimizer)) * counted.trained
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
    return command.run(lambda: run(command.parse(ScaleCommand, RECIPES, argv, prog="python -m trainer.scale")))


def run(options: ScaleCommand) -> None:
    """Log the found."""
    if options.config.trained == "lora":
        raise SettingsError(ADAPTERS)
    check_frozen(options.config.frozen_dtype)
    config = options.config
    for line in lines(options, count_student(config) if isinstance(config, DistillConfig) else count(config)):
        log.info("%s", line)

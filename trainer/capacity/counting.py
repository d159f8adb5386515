"""Passes at full size, counted on networks without contents: arithmetic, and the most that lives at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seesr_core.dape import DAPE
from seesr_core.dape.model import DAPEConfig
from seesr_core.errors import SettingsError
from seesr_core.formats.base import Base
from seesr_core.formats.control import RCA
from seesr_core.segsr.model import SegSR
from seesr_core.settings import UpscaleSettings

from ..distill.recipes import DistillConfig
from ..distill.task import adapted, frozen_teacher
from ..engine.frozen import keep_frozen
from ..engine.optimizers import moment_bytes
from ..segsr.classes import class_list
from ..segsr.command import build_segsr
from ..segsr.recipes import SegSRTrainConfig
from ..stage2.networks import Networks, build_networks, choose_trained
from ..stage2.recipes import Stage2Config
from .dry_run import bytes_of, cost_of_pass, unique

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
BYTES = 4
CLASSES = 150
"""Of SegSR's labels: ADE20K's."""


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
            "gradients": BYTES * self.trained / shards,
            "optimizer": moment_bytes(config.loop.optimizer) * self.trained / shards,
            "average": BYTES * average / shards,
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
    dape_flops = _looking(lambda: dape.encode_image(torch.zeros(1, 3, *[tagger.image_size] * 2, device="meta")))
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
    # All is trained at first, which asks for no weights to start from, and which only stage 2 can name.
    known = {field.name: getattr(config, field.name) for field in fields(Stage2Config)}
    nets = build_networks(base, dape, Stage2Config(**{**known, "trained": "all", "frozen_dtype": "fp32"}))
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
    tokens = nets.dape.config.tokens
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


def count_segsr(
    config: SegSRTrainConfig, *, unet: dict[str, Any] | None = None, tagger: DAPEConfig | None = None
) -> Counted:
    """As `count`, of the joint step: SegDM and bridge beside what stage 2 has. The passes without gradients, through
    which images come to their timestep, are among the operations of frozen networks."""
    looking, tagger = count(config, unet=unet, tagger=tagger), tagger or DAPEConfig(num_tags=TAGS)
    with torch.device("meta"):
        dape = DAPE(tagger).requires_grad_(False)
    with FakeTensorMode():
        nets = _networks(config, unet or SD2_UNET, dape)
        classes = class_list([f"class {number}" for number in range(CLASSES)])
        segsr = build_segsr(config, nets, classes)
        without, forward = (_looking(lambda f=f: f(nets, segsr, config, 1)) for f in (_picture, _joint))
        one, two = (_joint_pass(nets, segsr, config, images) for images in (1, 2))
    own = sum(p.numel() for p in segsr.parameters())
    log.info(
        "SegDM and bridge of %d classes: %.1f M parameters, %.4f TFLOP an image and step beside %.3f of U-Net and "
        "ControlNet",
        CLASSES,
        own / 1e6,
        (forward - without) / 1e12,
        without / 1e12,
    )
    return replace(
        looking,
        trained=looking.trained + own,
        steered=looking.steered + own,
        steered_bytes=looking.steered_bytes + bytes_of(segsr.parameters()),
        trained_flops=two[1] / 2,
        frozen_flops=looking.frozen_flops + config.own * config.unroll * forward,
        fixed=max(2 * one[0] - two[0], 0),
        per_image=two[0] - one[0],
    )


def _picture(nets: Networks, segsr: SegSR, config: SegSRTrainConfig, images: int) -> Tensor:
    return _predicted(nets, config, images)


def _joint(nets: Networks, segsr: SegSR, config: SegSRTrainConfig, images: int) -> Tensor:
    """Both predictions of a step, each told of the other."""
    x, t, text, more = _inputs(nets, config, images)
    acp, noisy = torch.zeros(images), torch.zeros(images, segsr.bits, *x.shape[2:])
    hint = segsr.bridge.segmentation_condition(noisy, acp)
    features = segsr.segdm.features(x, more["soft_prompt"])
    s0 = segsr.segdm(noisy, features, acp, segsr.bridge.image_condition(x, acp))
    return nets.predict(x, t, text, **more, hint=hint).float().square().mean() + s0.float().square().mean()


def _joint_pass(nets: Networks, segsr: SegSR, config: SegSRTrainConfig, images: int) -> tuple[int, int]:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.loop.precision != "fp32"):
            return _joint(nets, segsr, config, images)

    parameters = [*nets.unet.parameters(), *nets.controlnet.parameters(), *segsr.parameters()]
    return cost_of_pass(loss, parameters, offload=config.loop.offload_activations)


def _width(unet: Any) -> int:
    return cast(int, unet.config.cross_attention_dim)

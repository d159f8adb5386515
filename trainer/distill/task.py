"""A student of few steps: adapters on a teacher's U-Net and ControlNet, and what they learn from it.

Teacher, student and the follower of the distribution-matching term share the teacher's weights; each has adapters of
its own, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.method.denoiser import Denoiser
from seesr_core.method.losses import noise_loss
from seesr_core.method.sampling import StepNoise, sample, start_latent
from seesr_core.method.schedule import alphas_cumprod, q_sample
from seesr_core.settings import UpscaleSettings

from ..data.fingerprints import fingerprint
from ..data.order import Stream, by_image, scoped_seed
from ..engine.adapters import add_lora, sharing
from ..engine.processes import refuse_sharded_adapters
from ..stage2.networks import Networks
from .few_steps import FewStepTask, Shown, signed, to_8_bits
from .losses import distribution_matching_loss, end_point_loss
from .recipes import DistillConfig


@dataclass(slots=True)
class Taught(Shown):
    """A prepared batch, and where the teacher ends from its start."""

    noise: Tensor
    """Noise of the start (B, C, H/8, W/8)."""
    end_point: Tensor
    """The teacher's scaled latents (B, C, H/8, W/8)."""


def frozen_teacher(networks: Networks) -> Networks:
    """The networks, nothing of which learns."""
    networks.unet.requires_grad_(False)
    networks.controlnet.requires_grad_(False)
    return networks


def adapted(teacher: Networks, config: DistillConfig, stream: int) -> Networks:
    """Networks that share the teacher's weights, with adapters on U-Net and ControlNet that start without effect."""
    unet, controlnet = sharing(teacher.unet), sharing(teacher.controlnet)
    with scoped_seed(config.loop.seed, stream):
        for network in (controlnet, unet):
            add_lora(network, config.lora_rank, everywhere=config.adapt_convolutions)
    return replace(teacher, unet=unet, controlnet=controlnet)


class DistillTask(FewStepTask):
    """The student's steps, end to end, beside the teacher's.

    Args:
        config: how.
        teacher: the teacher's networks, frozen.
        data: crops and their tags.
        teacher_defaults: the teacher's own settings of sampling.
        more: as `FewStepTask` has them.
    """

    config: DistillConfig
    shown_type = Taught

    def __init__(
        self, config: DistillConfig, teacher: Networks, *data: Any, teacher_defaults: Mapping[str, Any], **more: Any
    ) -> None:
        refuse_sharded_adapters()
        self.taught_by = teacher.to(config.loop.resolve_device())
        self.teacher_settings = UpscaleSettings.for_model(teacher_defaults, **config.teacher())
        self.follower = adapted(teacher, config, Stream.DISTILL_FOLLOWER) if config.matching_weight else None
        student = adapted(teacher, config, Stream.STAGE2_ADAPTERS)
        if config.gradient_checkpointing:
            student.vae.enable_gradient_checkpointing()
        super().__init__(config, student, *data, defaults=config.student(), **more)

    def _choose(self) -> nn.ModuleDict:
        """Only adapters learn; `adapted` has seen to it."""
        parts = {"controlnet": self.networks.controlnet, "unet": self.networks.unet}
        if self.follower:
            parts |= {"follower_controlnet": self.follower.controlnet, "follower_unet": self.follower.unet}
        return nn.ModuleDict(parts)

    def _key(self) -> str:
        teacher = (self.taught_by.unet, self.taught_by.controlnet)
        return f"{super()._key()} {self._weights(*teacher)} {self.teacher_settings}"

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the run is resumed."""
        ends = self._weights(self.taught_by.unet.conv_out, self.taught_by.controlnet.controlnet_mid_block)
        return {
            **super().identity(),
            "teacher": ends,
            "teacher's timesteps": self.teacher_settings.denoised_timesteps(),
            "teacher's guidance": self.teacher_settings.cfg,
        }

    def _start(self) -> dict[str, str]:
        """The teacher's weights, of which everything starts, are told apart by their ends."""
        return {}

    @property
    def has_teacher(self) -> bool:
        """There always is one."""
        return True

    def terms(self, shown: Shown, z: Tensor, step: int) -> dict[str, Tensor]:
        """Those of the few steps, the end point's and the distribution's."""
        assert isinstance(shown, Taught)
        terms = super().terms(shown, z, step)
        if self.config.end_point_weight:
            ends = shown.end_point.to(self.device)
            terms["end_point"] = self.config.end_point_weight * end_point_loss(z, ends)
        return {**terms, **self._matching(shown, z, step)} if self.follower else terms

    def _matching(self, shown: Taught, z: Tensor, step: int) -> dict[str, Tensor]:
        """The distribution-matching term, and what the follower learns by: eq. 2 on the student's results."""
        draws = by_image(self.config.loop.seed, Stream.FEW_STEPS, 5, images=self.config.loop.images(step))
        low, high = self.config.matching_timesteps
        t = torch.cat([torch.randint(low, high + 1, (1,), generator=g) for g in draws]).to(self.device)
        noise = StepNoise(draws)(z.detach().float())
        acp, text = alphas_cumprod().to(self.device)[t].view(-1, 1, 1, 1), self.text(shown)
        noisy = q_sample(z.detach().float(), noise, acp)
        fake = self.predicted(shown, noisy, t, text, self.follower).float()
        with torch.no_grad():
            real = self._teacher(shown, text)(noisy, t)
        matching = distribution_matching_loss(z, noisy, real, fake, acp)
        return {"matching": self.config.matching_weight * matching, "follower": noise_loss(fake, noise)}

    def start_noise(self, shown: Shown, drawn: Tensor) -> Tensor:
        """That which the teacher started from."""
        assert isinstance(shown, Taught)
        return shown.noise.to(drawn)

    def _teacher(self, shown: Shown, text: Tensor) -> Denoiser:
        """The teacher's guided noise prediction for a batch."""
        negative = self.text_states([self.teacher_settings.negative])
        return Denoiser(
            unet=self.taught_by.unet,
            controlnet=self.taught_by.controlnet,
            positive=text,
            negative=negative.expand(len(text), -1, -1),
            soft_prompt=shown.soft_prompt.to(self.device),
            image=shown.condition.to(self.device).float().div(255),
            cfg=self.teacher_settings.cfg,
        )

    @torch.no_grad()
    def _show(self, number: int) -> Taught:
        """What `FewStepTask` prepares, and the teacher's end points from noise that belongs to the images."""
        shown = super()._show(number)
        z_lr = self.encode(signed(shown.condition.to(self.device)))
        images = self.config.loop.images(number)
        noise = StepNoise(by_image(self.config.loop.seed, Stream.FEW_STEPS, 1, images=images))(z_lr)
        end = sample(
            self._teacher(shown, self.text(shown)),
            start_latent(noise, z_lr=z_lr, start_timestep=self.config.start),
            timesteps=self.teacher_settings.denoised_timesteps(),
            noise_source=StepNoise([]),
            solver="ddim",
        )
        kept = {field.name: getattr(shown, field.name) for field in fields(Shown)}
        kept["taught"] = to_8_bits(self.networks.decode(end))
        return Taught(**kept, noise=noise.cpu(), end_point=end.cpu())

    @staticmethod
    def _weights(*modules: nn.Module) -> str:
        return " ".join(map(fingerprint, modules))

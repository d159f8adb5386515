"""A model tuned end to end for the few steps that it ships with: from the noised LR latent to decoded pixels.

Trained by eq. 2 a small network returns averages of what it cannot know, and sampling moves away from the photo step by
step. Here the steps are run as they will be, and the decoded picture is compared with the photo and with what a
deterministic teacher makes of the same LR (as OSEDiff, Wu et al. 2024, does without one): pixels, differences of
neighbours, and deep features. A part of the steps stays with eq. 2, which keeps other timesteps alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seesr_core.method.losses import noise_loss
from seesr_core.method.sampling import StepNoise, sample, start_latent
from seesr_core.method.schedule import alphas_cumprod, q_sample
from seesr_core.method.text import compose_prompt
from seesr_core.settings import UpscaleSettings
from seesr_core.tiling.grid import PIXELS_PER_CELL

from ..data.order import Stream, by_image, scoped_seed, seeded
from ..data.pairs import make_pairs
from ..data.pool import Pool
from ..deep_features import EfficientNetLite0
from ..degradation import BlurConfig, DegradationConfig, FinalSincConfig, SharpenConfig, StageConfig
from ..degradation.ops import quantize, resize
from ..engine.journal import Figures
from ..engine.samples import save_grid
from ..stage2.networks import Networks
from ..stage2.recipes import Stage2Config
from ..stage2.task import Judge, Stage2Task
from .critic import Critic
from .losses import deep_loss, fooling_loss, hinge_loss, latent_loss, picture_loss, with_gradient, with_tones_of

Upscaler = Callable[[Tensor], Tensor]
"""LR (B, 3, h, w) -> SR (B, 3, H, W), both in [0, 1]."""
Learns = Literal["denoiser", "decoder", "all"]
CRITIC = "critic"
"""Under which name the critic stands among what is trained; it does not belong to the model."""


def mild() -> DegradationConfig:
    """What most photos that people enlarge have been through: some blur, a resize, little noise, good JPEG."""
    first = StageConfig(
        blur=BlurConfig(sizes=(7, 9, 11, 13), sinc_probability=0.0, sigma=(0.2, 2.6)),
        blur_probability=0.6,
        resize_weights=(0.0, 0.0, 1.0),
        gaussian_sigma=(0.0, 2.0),
        poisson_scale=(0.0, 0.1),
        jpeg_quality=(97.0, 99.5),
    )
    second = StageConfig(
        blur_probability=0.0,
        resize_weights=(0.0, 0.0, 1.0),
        gaussian_sigma=(0.0, 4.0),
        poisson_scale=(0.0, 0.3),
        jpeg_quality=(75.0, 99.0),
    )
    return DegradationConfig(
        sharpen=SharpenConfig(weight=0.0, radius=3, fast=True),
        first=first,
        second=second,
        final_sinc=FinalSincConfig(probability=0.0),
        resize_modes=("area",),
        quantize=True,
    )


@dataclass(kw_only=True, slots=True)
class FewStepConfig(Stage2Config):
    """How a model is tuned for its few steps; targets are the photos as they are, not sharpened."""

    learns: Learns = "denoiser"
    """What is trained: U-Net and ControlNet through the frozen decoder, the decoder on what these restore, or all three
    together."""
    mild: DegradationConfig = field(default_factory=mild)
    """A second degradation beside `degradation`."""
    mild_share: float = 0.6
    """Share of the images that it degrades."""
    noise_share: float = 0.12
    """Share of the steps that are eq. 2's, at all timesteps."""
    exact_share: float = 0.5
    """Share of the images whose exact codes the decoder is given, when it learns; it is to stay an autoencoder's."""
    window: int = 0
    """Side in pixels, a multiple of 8, of the random window of every crop that is decoded and compared; 0 decodes whole
    crops. The decoder costs most of a step."""
    teacher_weight: float = 0.5
    """Share of the teacher's picture in the targets; the rest is the photo's."""
    teacher_detail: bool = True
    """Whether only the teacher's detail is learnt, on the photo's own tones (`losses.with_tones_of`): networks that
    draw sharply often shift brightness and colour of real photos."""
    clean_prompts: float = 0.0
    """Share of the images whose soft prompt is that of the clean crop, which DAPE's is to come near: what stands in it
    is true then, and worth heeding."""
    latent_weight: float = 0.15
    """Weight of the error of the latents against the photo's, which are seen without the decoder's softness."""
    edge_weight: float = 1.0
    """Weight of the differences of neighbouring pixels."""
    deep_weight: float = 0.3
    """Weight of the distance of deep features; 0 needs no network for them."""
    critic_weight: float = 0.0
    """How hard a critic pulls at the decoded picture, as a share of what all other losses pull there (the adaptive
    weight of VQGAN, Esser et al., CVPR 2021); 0 leaves it out. It makes texture, and costs fidelity."""
    critic_warmup: int = 100
    """Steps that the critic learns alone, and then again as many in which its pull grows to the whole."""


@dataclass(slots=True)
class Shown:
    """A prepared batch: pictures in 8 bits, and what the tagger says of them."""

    photos: Tensor
    """Which photo each crop is from (B,)."""
    hr: Tensor
    """Crops as they are (B, 3, H, W), uint8."""
    condition: Tensor
    """Upsampled LR (B, 3, H, W), uint8."""
    taught: Tensor
    """The teacher's pictures of the LR, or HR again without one (B, 3, H, W), uint8."""
    soft_prompt: Tensor
    """DAPE's tokens (B, L, D)."""


class FewStepTask(Stage2Task):
    """The shipped steps, end to end.

    Args:
        config: how.
        networks: those of stage 2.
        data: crops and their tags.
        defaults: the model's sampling settings, whose steps are run.
        teacher: what else to learn from than the photos; None leaves it out.
        features: network for the loss on deep features; None leaves that out.
        pool_folder: where prepared batches are kept.
        validation: what judges the run.
    """

    config: FewStepConfig
    shown_type: type[Shown] = Shown

    def __init__(
        self,
        config: FewStepConfig,
        networks: Networks,
        *data: Any,
        defaults: Mapping[str, Any],
        teacher: Upscaler | None = None,
        features: EfficientNetLite0 | None = None,
        pool_folder: Path | None = None,
        validation: Judge | None = None,
    ) -> None:
        super().__init__(config, networks, *data, validation=validation)
        self.teacher, self.settings = teacher, UpscaleSettings.for_model(defaults)
        self.features = features.to(self.device) if features else None
        key = self._key() if config.pool else ""
        self.shown = Pool(config.pool * config.loop.parts, key, pool_folder, kind=self.shown_type)
        self.denoiser_learns, self.decoder_learns = config.learns != "decoder", config.learns != "denoiser"
        self.trained = self._choose()
        self.critic = self._own_critic()
        self.trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # stubs know tensors only

    def _key(self) -> str:
        """Everything that a prepared batch depends on."""
        config = self.config
        how = (config.mild, config.mild_share, config.clean_prompts, self.teacher is not None, config.teacher_detail)
        return f"{self.batches.key()} {how}"

    def _choose(self) -> nn.ModuleDict:
        """Let what learns require gradients, and nothing else; returns it."""
        config, networks, decoder = self.config, self.networks, self.networks.vae.decoder
        parts = {"unet": networks.unet, "controlnet": networks.controlnet, "decoder": decoder}
        learning = {"denoiser": ("unet", "controlnet"), "decoder": ("decoder",), "all": tuple(parts)}[config.learns]
        for name, module in parts.items():
            module.requires_grad_(name in learning)
        return nn.ModuleDict({name: parts[name] for name in learning})

    def _own_critic(self) -> Critic | None:
        """The critic among what is trained, if there is one."""
        if not self.config.critic_weight:
            return None
        with scoped_seed(self.config.loop.seed, Stream.FEW_STEPS, 6):
            critic = Critic(with_features=self.features is not None).to(self.device)
        self.trained.add_module(CRITIC, critic)
        return critic

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the part is resumed."""
        return {**super().identity(), "timesteps run": self.settings.denoised_timesteps(), "taught": self.has_teacher}

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """The losses of a part of a batch."""
        shown = self.shown.get(step, self._show)
        by_noise = float(torch.rand((), generator=seeded(self.config.loop.seed, Stream.FEW_STEPS, step)))
        if self.denoiser_learns and by_noise < self.config.noise_share:
            return self._noise_loss(shown, step)
        with torch.set_grad_enabled(self.denoiser_learns):
            z = self.restored(shown, step)
        terms = self.terms(shown, z, step)
        return torch.stack(list(terms.values())).sum(), {name: value.detach() for name, value in terms.items()}

    def terms(self, shown: Shown, z: Tensor, step: int) -> dict[str, Tensor]:
        """The weighted losses of restored latents z (B, C, H/8, W/8), by name."""
        config = self.config
        hr, taught = (signed(image.to(self.device)) for image in (shown.hr, shown.taught))
        codes = self.encode(hr)
        if self.decoder_learns:
            exact = self._exact(step)
            z, taught = torch.where(exact, codes, z), torch.where(exact, hr, taught)
        condition = signed(shown.condition.to(self.device))
        z_seen, hr, taught, condition = self._window(step, z, hr, taught, condition)
        scaled = z_seen / self.networks.vae.config.scaling_factor
        picture = self.networks.vae.decode(scaled, return_dict=False)[0].float()  # once: pulls at it are compared
        terms = {"picture": self._to_both(self.picture_loss, picture, hr, taught)}
        if self.denoiser_learns and config.latent_weight:
            terms["latent"] = config.latent_weight * latent_loss(z, codes)
        if self.features is not None and config.deep_weight:
            terms["deep"] = config.deep_weight * self._to_both(self.deep_loss, picture, hr, taught)
        if self.critic is not None:
            terms |= self._judged(self.critic, picture, hr, condition, terms, step)
        return terms

    def _judged(
        self, critic: Critic, picture: Tensor, hr: Tensor, condition: Tensor, terms: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        """What the critic learns by, and its pull at the picture."""
        result = picture.detach().requires_grad_()
        seen, photo, made = (self._features(image) for image in (condition, hr, result))
        apart = [features.detach() for features in made]
        fooled = fooling_loss(critic(result, condition, made, seen))
        judged = hinge_loss(critic(hr, condition, photo, seen), critic(result.detach(), condition, apart, seen))
        others = terms["picture"] + terms["deep"] if "deep" in terms else terms["picture"]
        (pull,), (theirs,) = (
            torch.autograd.grad(loss, by, retain_graph=True) for loss, by in ((fooled, result), (others, picture))
        )
        share = self.config.critic_weight * self._critic_share(step)
        wanted = share * theirs.norm() / pull.norm().clamp_min(1e-12) * pull
        return {"critic": judged, "fooled": with_gradient(fooled, picture, wanted)}

    def _critic_share(self, step: int) -> float:
        """How much of its weight the critic has at a step, 0 to 1."""
        warmup = self.config.critic_warmup
        return min(1.0, max(0.0, (step / self.config.loop.parts - warmup) / max(warmup, 1)))

    def _features(self, image: Tensor) -> list[Tensor]:
        """Deep features of pictures in [−1, 1]; none without a network for them."""
        return self.features.features(image.add(1).div(2)) if self.features is not None else []

    def _to_both(self, loss: Callable[..., Tensor], result: Tensor, hr: Tensor, taught: Tensor) -> Tensor:
        """The loss against the photo and against the teacher, by their weights."""
        weight = self.config.teacher_weight if self.has_teacher else 0.0
        total = (1 - weight) * loss(result, hr)
        return total + weight * loss(result, taught) if weight else total

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher's picture beside the photo."""
        return self.teacher is not None

    def picture_loss(self, result: Tensor, target: Tensor) -> Tensor:
        """Pixels and differences of neighbours, pictures in [−1, 1]."""
        return picture_loss(result, target, edge_weight=self.config.edge_weight)

    def deep_loss(self, result: Tensor, target: Tensor) -> Tensor:
        """Distance of deep features."""
        with torch.no_grad():
            wanted = self._features(target)
        return deep_loss(self._features(result), wanted)

    def _noise_loss(self, shown: Shown, step: int) -> tuple[Tensor, Figures]:
        """Eq. 2 with the photo's own latents."""
        images = self.config.loop.images(step)
        draws = by_image(self.config.loop.seed, Stream.DENOISING, images=images)
        t = self.batches._timesteps(torch.cat([torch.rand(1, generator=g) for g in draws])).to(self.device)
        z = self.encode(signed(shown.hr.to(self.device)))
        noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in draws]).to(self.device)
        acp = alphas_cumprod().to(self.device)[t].view(-1, 1, 1, 1)
        eps = self.predicted(shown, q_sample(z, noise, acp), t, self.text(shown))
        loss = noise_loss(eps, noise)
        return loss, {"noise": loss.detach()}

    def restored(self, shown: Shown, step: int) -> Tensor:
        """Scaled latents that the shipped steps give, differentiable (B, C, H/8, W/8)."""
        images, settings = self.config.loop.images(step), self.settings
        z_lr = self.encode(signed(shown.condition.to(self.device)))
        noise = StepNoise(by_image(self.config.loop.seed, Stream.FEW_STEPS, 1, images=images))
        start, text = self.start_noise(shown, noise(z_lr)), self.text(shown)
        return sample(
            lambda x, t: self.predicted(shown, x, torch.full((len(x),), int(t), device=x.device), text).float(),
            start_latent(start, z_lr=z_lr, start_timestep=settings.start_timestep),
            timesteps=settings.denoised_timesteps(),
            noise_source=noise,
            solver=settings.solver,
        )

    def start_noise(self, shown: Shown, drawn: Tensor) -> Tensor:
        """The noise that the start has, (B, C, H/8, W/8): what was `drawn` for this step."""
        return drawn

    def _exact(self, step: int) -> Tensor:
        """Which images the decoder is given exact codes of (B, 1, 1, 1); no teacher stands beside the photo there."""
        draws = by_image(self.config.loop.seed, Stream.FEW_STEPS, 2, images=self.config.loop.images(step))
        share = torch.cat([torch.rand(1, generator=g) for g in draws]).view(-1, 1, 1, 1)
        return (share < self.config.exact_share).to(self.device)

    def _window(self, step: int, z: Tensor, *pictures: Tensor) -> tuple[Tensor, ...]:
        """The step's window of latents and of the pictures that belong to them."""
        side = self.config.window // PIXELS_PER_CELL or z.shape[-1]
        generator = seeded(self.config.loop.seed, Stream.FEW_STEPS, 4, step)
        place = [int(torch.randint(n - side + 1, (), generator=generator)) for n in z.shape[-2:]]
        seen = _crop(z, place, side, 1)
        return seen, *(_crop(picture, place, side, PIXELS_PER_CELL) for picture in pictures)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Scaled latents of pictures in [−1, 1]."""
        return self.networks.encode_image(image.add(1).div(2), seeded(0))

    def text(self, shown: Shown) -> Tensor:
        """Text states of a batch's tags as they are read when a photo is upscaled."""
        tags = [self.batches.tags[photo].rstrip(",") for photo in shown.photos.tolist()]
        texts = [compose_prompt([t] if t else [], self.settings.prompt, self.settings.added_prompt) for t in tags]
        return self.text_states(texts)

    def predicted(self, shown: Shown, x: Tensor, t: Tensor, text: Tensor, networks: Networks | None = None) -> Tensor:
        """ε̂ of noisy latents of a batch, by these networks or by those that are trained."""
        condition = shown.condition.to(self.device).float().div(255)
        nets, soft = networks or self.networks, shown.soft_prompt.to(self.device)
        return nets.predict(x, t, text, image=condition, soft_prompt=soft)

    @torch.no_grad()
    def _show(self, number: int) -> Shown:
        """Degrade the crops of a part and ask the frozen networks and the teacher about them."""
        images = self.config.loop.images(number)
        crops, photos = self.batches.crops.batch(number, len(images))
        lr = torch.cat([self._degraded_alone(crop[None], image) for crop, image in zip(crops, images, strict=True)])
        condition = quantize(resize(lr, "bicubic", size=crops.shape[-2:]))
        return Shown(
            photos=torch.tensor(photos),
            hr=crops,
            condition=to_8_bits(condition),
            taught=self._taught(self.teacher, lr, crops) if self.teacher else crops,
            soft_prompt=self._looked_at(condition, crops, images),
        )

    def _taught(self, teacher: Upscaler, lr: Tensor, crops_u8: Tensor) -> Tensor:
        """The teacher's pictures of LR in 8 bits, on the tones of the crops if wanted."""
        drawn, tones = teacher(lr), crops_u8.to(lr).div(255)
        return to_8_bits(with_tones_of(drawn, tones).clamp(0, 1) if self.config.teacher_detail else drawn)

    def _looked_at(self, condition: Tensor, crops_u8: Tensor, images: Sequence[int]) -> Tensor:
        """The soft prompts of the pictures, (B, L, D): of some the clean crop's."""
        if self.config.clean_prompts:
            draws = by_image(self.config.loop.seed, Stream.FEW_STEPS, 7, images=images)
            clean = torch.cat([torch.rand(1, generator=g) for g in draws]) < self.config.clean_prompts
            clean = clean.to(condition.device).view(-1, 1, 1, 1)
            condition = torch.where(clean, crops_u8.to(condition).div(255), condition)
        return self.networks.soft_prompt(condition).cpu()

    def _degraded_alone(self, crop: Tensor, image: int) -> Tensor:
        """The LR of one crop, (1, 3, h, w)."""
        numbers = (self.config.loop.seed, Stream.STAGE2_DEGRADATION)
        kind = float(torch.rand((), generator=seeded(self.config.loop.seed, Stream.FEW_STEPS, 3, image)))
        degradation = self.config.mild if kind < self.config.mild_share else self.config.degradation
        return make_pairs(crop, degradation, numbers=numbers, first=image, group=1, device=self.device).lr

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> Mapping[str, float] | None:
        """LR, result, teacher, HR; and the figures of the validation, if there is one."""
        shown = self.shown.get(0, self._show)
        lr, taught, hr = (image.float().div(255) for image in (shown.condition, shown.taught, shown.hr))
        rows = (lr, self.networks.decode(self.restored(shown, 0)), taught, hr)
        save_grid(folder / f"{step:06d}.png", [row[:8] for row in rows], ("LR", "result", "teacher", "HR"))
        return self.validation(self.networks, folder, step) if self.validation else None


def signed(image_u8: Tensor) -> Tensor:
    """Pictures in 8 bits as [−1, 1], channels last."""
    return image_u8.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def _crop(image: Tensor, place: Sequence[int], side: int, scale: int) -> Tensor:
    """The window at `place` of `side`, both in cells of `scale` pixels."""
    top, left = (scale * at for at in place)
    part = image[..., top : top + scale * side, left : left + scale * side]
    return part.contiguous(memory_format=torch.channels_last)


def to_8_bits(image: Tensor) -> Tensor:
    """Pictures in [0, 1] as 8 bits on the CPU."""
    return image.mul(255).round().to(torch.uint8).cpu()


def without_critic(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors that belong to the model."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(f"{CRITIC}.")}

"""The small model's last part: its decoder learns to give texture to the latents that the sampler delivers.

A small denoiser trained by squared error returns averages, and a decoder trained on exact codes draws them smooth. Here
encoder, U-Net and ControlNet stay as they are, so the latent space does too; the decoder is tuned on latents restored
from degraded crops, mixed with exact codes, by pixel losses and against a critic (hinge loss, Miyato et al. 2018). The
critic sees the upsampled LR beside the picture, so that texture is asked for where there was some; a loss on the local
strength of fine detail asks for as much of it as HR has, so that flat areas stay flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from seesr_core.errors import SettingsError
from seesr_core.method.denoiser import Denoiser
from seesr_core.method.sampling import StepNoise, sample, start_latent
from seesr_core.method.text import compose_prompt
from seesr_core.settings import UpscaleSettings

from ..data.fingerprints import digest, fingerprint
from ..data.order import Stream, seeded
from ..data.pool import Pool, Prepared
from ..engine.loop_config import LoopConfig
from ..engine.samples import save_grid
from ..stage2.networks import Networks
from ..stage2.task import Stage2Task
from .autoencoder import charbonnier, to_signed


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """How the decoder is tuned."""

    loop: LoopConfig
    """Optimisation of decoder and critic; its batches are parts of stage 2's, so its batch size divides theirs."""
    clean: float = 0.25
    """Share of the latents that are exact codes of the HR crop instead of restored ones."""
    pixel_weight: float = 1.0
    """Weight of the loss on pixels."""
    coarse_weight: float = 2.0
    """Weight of the loss on 4×4 means, which holds colours and shapes while texture is free."""
    adversarial_weight: float = 0.05
    """Weight of the critic's verdict."""
    feature_weight: float = 0.5
    """Weight of the difference between the critic's features of the result and of the HR crop."""
    texture_weight: float = 0.03
    """Weight of the difference in local strength of fine detail: as much texture as HR has, none where it is flat."""
    excess: float = 3.0
    """How much more too much detail costs than too little: what cannot be known is left out rather than invented."""
    margin: int = 8
    """Pixels at the border of the crops that the critic does not see: what the decoder lacks there, a photo has."""
    critic_width: int = 32
    """Channels of the critic's first layer."""
    share: float = 0.7
    """How far the decoder that ships lies between the autoencoder's own, 0, and the tuned one, 1: texture against
    fidelity (network interpolation, Wang et al. 2018)."""


@dataclass(slots=True)
class Decodable:
    """What the decoder learns from: a prepared batch of stage 2, restored, with its crops as they were."""

    restored: Tensor
    """Latents sampled from the condition with the model's own defaults (B, 4, H/8, W/8)."""
    codes: Tensor
    """Codes of the crops (B, 4, H/8, W/8)."""
    crops: Tensor
    """HR crops, not sharpened: sharpening draws halos (B, 3, H, W), uint8."""
    condition: Tensor
    """Upsampled LR (B, 3, H, W), uint8."""

    def rows(self, chosen: slice) -> Decodable:
        """Some of the images."""
        return Decodable(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


class NormedConv(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value.

    The value is found anew in every pass, by power iteration from a fixed vector: torch's own spectral norm carries the
    vector along, as a state that a checkpoint of parameters would lose.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The convolution (B, C, H, W) with its weights divided by their largest singular value."""
        return self._conv_forward(input, self.weight / largest_singular_value(self.weight.flatten(1)), self.bias)


def interpolated(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The decoder's tensors (those of `after` called `decoder.…`), `share` of the way from `before` to `after`."""
    tuned = {name: tensor for name, tensor in after.items() if name.startswith("decoder.")}
    return {name: torch.lerp(before[name].to(tensor), tensor, share) for name, tensor in tuned.items()}


def largest_singular_value(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Power iteration, in float32; differentiable through the last product alone, as usual."""
    with torch.autocast(matrix.device.type, enabled=False), torch.no_grad():
        fixed = matrix.detach().float()
        v = F.normalize(fixed.abs().sum(0), dim=0)
        for _ in range(iterations):
            u = F.normalize(fixed @ v, dim=0)
            v = F.normalize(fixed.T @ u, dim=0)
    with torch.autocast(matrix.device.type, enabled=False):
        return u @ (matrix.float() @ v)


class Critic(nn.Module):
    """Tells results from HR crops, patch by patch (28 pixels wide), by their detail alone.

    Without their local means it cannot ask for other colours, which the pixel losses hold.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                NormedConv(6, width, 3, padding=1),
                NormedConv(width, 2 * width, 4, stride=2, padding=1),
                NormedConv(2 * width, 4 * width, 4, stride=2, padding=1),
                NormedConv(4 * width, 4 * width, 3, padding=1),
                NormedConv(4 * width, 1, 3, padding=1),
            ]
        )
        # Weights are normed in use, so only the size of a step relative to theirs matters: small ones learn faster than
        # the decoder, which shares the optimizer's learning rate.
        for parameter in self.parameters():
            parameter.data.mul_(0.125)

    def forward(self, image: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Verdicts (B, 1, H/4, W/4) on pictures (B, 3, H, W) in [−1, 1], and the features that led to them."""
        detail = [x - _blurred(x, 9) for x in (image, condition)]
        x, features = torch.cat(detail, 1), []
        *hidden, last = self.layers
        for layer in hidden:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return last(x), features


class DecoderTask(Stage2Task):
    """Decoding of restored latents; decoder and critic are trained by one optimizer.

    The critic's weights are held fixed where the decoder is judged, and the result where the critic learns, so the sum
    of both losses gives either its own gradient.
    """

    def __init__(
        self,
        config: DecoderConfig,
        control: Any,
        networks: Networks,
        *data: Any,
        defaults: Mapping[str, Any],
        pool_folder: Path | None = None,
        restored_folder: Path | None = None,
    ) -> None:
        if control.loop.batch_size % config.loop.batch_size:
            raise SettingsError(
                f"The decoder's batches are parts of stage 2's: {config.loop.batch_size} does not divide "
                f"{control.loop.batch_size}. Choose a batch size that does."
            )
        super().__init__(control, networks, *data, pool_folder=pool_folder)
        self.decoding = config
        self.settings = UpscaleSettings.for_model(defaults)
        for module in (networks.unet, networks.controlnet, networks.vae.encoder):
            module.requires_grad_(False)
        self.restored = Pool(control.pool, self._restored_key(), restored_folder, kind=Decodable)
        with torch.random.fork_rng():
            torch.manual_seed(seeded(config.loop.seed, Stream.NANO_WEIGHTS).initial_seed())
            self.critic = Critic(config.critic_width)
        self.decoder = networks.vae.decoder.requires_grad_(True).train()
        self.trained = nn.ModuleDict({"decoder": self.decoder, "critic": self.critic}).to(self.device)
        self.trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the part is resumed."""
        own = {f.name: getattr(self.decoding, f.name) for f in fields(self.decoding) if f.name != "loop"}
        return {**super().identity(), **own, "timesteps": self.settings.denoised_timesteps()}

    def _restored_key(self) -> str:
        """Everything that restored latents depend on."""
        networks = (self.networks.unet, self.networks.controlnet, self.networks.text_encoder)
        parts = (self.batches.key(), asdict(self.settings), self.decoding.loop.seed, *map(fingerprint, networks))
        return digest(repr(part).encode() for part in parts)

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """The decoder's losses and the critic's, of one part of a prepared batch."""
        config = self.decoding
        batch = self._part(step)
        hr, condition = (_channels_last(to_signed(x.to(self.device))) for x in (batch.crops, batch.condition))
        result = self.decoder(self._mixed(batch, step)).float()
        figures = self._pixel_losses(result, hr)
        seen, shown, given = (self._inner(x) for x in (result, hr, condition))
        verdict, features = self._judge(seen, given)
        with torch.no_grad():
            _, true_features = self._judge(shown, given)
        figures["features"] = torch.stack(
            [(a.float() - b.float()).abs().mean() for a, b in zip(features, true_features, strict=True)]
        ).mean()
        figures["verdict"] = -verdict.float().mean()
        figures["critic"] = self._critic_loss(seen.detach(), shown, given)
        weights = {
            "pixels": config.pixel_weight,
            "coarse": config.coarse_weight,
            "texture": config.texture_weight,
            "features": config.feature_weight,
            "verdict": config.adversarial_weight,
            "critic": 1.0,
        }
        loss = torch.stack([weights[name] * figures[name] for name in weights]).sum()
        return loss, {name: value.item() for name, value in figures.items()}

    def _pixel_losses(self, result: Tensor, hr: Tensor) -> dict[str, Tensor]:
        error = result - hr
        return {
            "pixels": charbonnier(error),
            "coarse": charbonnier(F.avg_pool2d(error, 4)),
            "texture": uneven(texture_strength(result) - texture_strength(hr), self.decoding.excess),
        }

    def _inner(self, image: Tensor) -> Tensor:
        margin = self.decoding.margin
        return image[..., margin : image.shape[-2] - margin, margin : image.shape[-1] - margin]

    def _judge(self, image: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The critic as it is, not learning."""
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        verdict: tuple[Tensor, list[Tensor]] = functional_call(self.critic, frozen, (image, condition))
        return verdict

    def _critic_loss(self, result: Tensor, hr: Tensor, condition: Tensor) -> Tensor:
        """Hinge loss."""
        real, fake = (self.critic(image, condition)[0].float() for image in (hr, result))
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    def _part(self, step: int) -> Decodable:
        """The crops of a step: stage 2's prepared batches, one part after the other."""
        parts = self.config.loop.batch_size // self.decoding.loop.batch_size
        return self.restored.get(step // parts, self._decodable).rows(slice(step % parts, None, parts))

    @torch.no_grad()
    def _decodable(self, number: int) -> Decodable:
        batch = self.batches.prepared(number)
        crops, _ = self.batches.crops.batch(number, self.config.loop.batch_size)
        codes = self.networks.encode_image(crops.to(self.device).float().div(255), seeded(0)).cpu()
        return Decodable(restored=self.restore(batch, number), codes=codes, crops=crops, condition=batch.condition)

    def _mixed(self, batch: Decodable, step: int) -> Tensor:
        """What the decoder is given: restored latents, some exact codes among them."""
        draws = torch.rand(len(batch.codes), generator=seeded(self.decoding.loop.seed, Stream.NANO_DECODER, step))
        exact = (draws < self.decoding.clean).view(-1, 1, 1, 1)
        return torch.where(exact, batch.codes, batch.restored).to(self.device)

    @torch.no_grad()
    def restore(self, batch: Prepared, number: int) -> Tensor:
        """Latents sampled from a batch's condition with the model's own defaults (B, 4, H/8, W/8), on the CPU."""
        settings = self.settings
        condition = batch.condition.to(self.device).float().div(255)
        count = len(condition)
        z_lr = self.networks.encode_image(condition, seeded(0))
        noise = StepNoise.from_seed(self.decoding.loop.seed + count * number, count)
        start = start_latent(noise(z_lr), z_lr=z_lr, start_timestep=settings.start_timestep)
        return sample(
            self._denoiser(batch, condition),
            start,
            timesteps=settings.denoised_timesteps(),
            noise_source=noise,
            solver=settings.solver,
        ).cpu()

    def _denoiser(self, batch: Prepared, condition: Tensor) -> Denoiser:
        settings = self.settings
        tags = [self.batches.tags[i].rstrip(",") for i in batch.photos.tolist()]
        prompts = [compose_prompt([t] if t else [], settings.prompt, settings.added_prompt) for t in tags]
        text = self.networks.encode_text([settings.negative, *prompts])
        return Denoiser(
            unet=self.networks.unet,
            controlnet=self.networks.controlnet,
            positive=text[1:],
            negative=text[:1].expand(len(tags), -1, -1),
            soft_prompt=batch.soft_prompt.to(self.device),
            image=condition,
            cfg=settings.cfg,
            control_scale=settings.control_scale,
            rca_scale=settings.rca_scale,
        )

    def sample(self, folder: Path, step: int) -> None:
        """LR, result from restored latents, from exact codes, HR."""
        batch = self._part(0)
        rows = [self.networks.decode(z.to(self.device)) for z in (batch.restored, batch.codes)]
        lr, hr = (image.float().div(255) for image in (batch.condition, batch.crops))
        save_grid(folder / f"{step:06d}.png", [row[:8] for row in (lr, *rows, hr)])


def texture_strength(image: Tensor, window: int = 8, floor: float = 0.01) -> Tensor:
    """Logarithm of the local root mean square of two bands of fine detail, about one and three pixels wide.

    Args:
        image: (B, C, H, W) in [−1, 1].
        window: side of the squares, half overlapping, over which the mean is taken.
        floor: what is added before the logarithm; much weaker detail counts as none.

    Returns:
        (B, 2·C, about 2·H/window, about 2·W/window).
    """
    fine, coarse = _blurred(image, 3), _blurred(image, 7)
    bands = torch.cat([image - fine, fine - coarse], 1)
    energy = F.avg_pool2d(bands.square(), window, stride=window // 2)
    return ((energy + 1e-8).sqrt() + floor).log()


def uneven(difference: Tensor, excess: float) -> Tensor:
    """Mean absolute value, positive ones counted `excess` times; divided so that their sum of weights stays 2."""
    return torch.where(difference > 0, excess * difference, -difference).mean() * 2 / (1 + excess)


def _blurred(image: Tensor, side: int) -> Tensor:
    margin = side // 2
    return F.avg_pool2d(F.pad(image, (margin,) * 4, mode="reflect"), side, stride=1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)

"""From photos to the inputs of a training step: degraded pairs, what frozen networks make of them, and what is drawn.

Every random draw derives from the seed and the number of an image in the run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from seesr_core.method.schedule import alphas_cumprod, q_sample
from seesr_core.method.text import training_text
from seesr_core.pictures.sizes import from_u8, to_u8

from ..data.cache import FrozenCache, network_key
from ..data.crops import Crops
from ..data.fingerprints import digest, fingerprint, listed
from ..data.order import Stream, by_image
from ..data.pairs import check_pairs_return, given_pairs, make_pairs
from ..data.photos import Photo
from ..data.pool import Pool, Prepared
from ..degradation import Pair
from ..engine.processes import is_main_process
from .networks import Networks
from .recipes import Stage2Config

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Batch:
    """The inputs of one training step, on the training device."""

    target: Tensor
    """Sharpened HR (B, 3, H, W) in [0, 1]."""
    condition: Tensor
    """Upsampled LR (B, 3, H, W) in [0, 1]."""
    latents: Tensor
    """z₀ of the target, scaled (B, 4, H/8, W/8)."""
    noise: Tensor
    """Noise ε of each image, of the latents' shape."""
    timesteps: Tensor
    """Timesteps (B,), integers in [0, 1000)."""
    soft_prompt: Tensor | None
    """DAPE's tokens (B, L, D); None goes without RCA."""
    prompts: list[str]
    """Tags, or the empty prompt."""

    @property
    def acp(self) -> Tensor:
        """ᾱ_t of each image's own timestep (B, 1, 1, 1)."""
        return alphas_cumprod().to(self.latents.device)[self.timesteps].view(-1, 1, 1, 1)

    def noisy(self) -> Tensor:
        """z_t of each image (B, C, h, w)."""
        return q_sample(self.latents, self.noise, self.acp)


class Batches:
    """The batches of a run.

    Args:
        config: of the run.
        networks: of the run, the frozen ones of which look at the pairs.
        crops: of the photos.
        tags: the text of each photo.
        pool_folder: where prepared batches are kept, if there is a pool.
        pair_folder: where is kept what frozen networks made of given pairs, if `cache_pairs` is on.
    """

    prepared_type: type[Prepared] = Prepared

    def __init__(
        self,
        config: Stage2Config,
        networks: Networks,
        crops: Crops,
        tags: Sequence[str],
        *,
        pool_folder: Path | None = None,
        pair_folder: Path | None = None,
    ) -> None:
        self.config, self.networks, self.crops, self.tags = config, networks, crops, tags
        self.device = config.loop.resolve_device()
        key = self.key() if config.pool else ""
        self.pool = Pool(config.pool * config.loop.parts, key, pool_folder, kind=self.prepared_type)
        self.seen: FrozenCache | None = None
        if config.cache_pairs:
            check_pairs_return(crops)
            self.seen = FrozenCache(network_key(config.loop, networks.vae, networks.dape), pair_folder, parts=2)

    def get(self, number: int) -> Batch:
        """All inputs of part `number` of the training, on the training device."""
        return self.draw(number, self.prepared(number))

    @torch.no_grad()
    def draw(self, number: int, prepared: Prepared) -> Batch:
        """All that is drawn for a prepared part."""
        config = self.config
        generators = by_image(config.loop.seed, Stream.DENOISING, images=config.loop.images(number))
        u, drop_u = (torch.cat([torch.rand(1, generator=generator) for generator in generators]) for _ in range(2))
        drop = drop_u < config.null_text
        latents = prepared.latents.to(self.device)
        return Batch(
            target=from_u8(prepared.target.to(self.device)),
            condition=from_u8(prepared.condition.to(self.device)),
            latents=latents,
            noise=torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(self.device),
            timesteps=self._timesteps(u).to(self.device),
            soft_prompt=prepared.soft_prompt.to(self.device),
            prompts=["" if d else self.tags[i] for d, i in zip(drop.tolist(), prepared.photos.tolist(), strict=True)],
        )

    def _timesteps(self, u: Tensor) -> Tensor:
        """Timesteps for even draws u (B,) from [0, 1)."""
        chosen = torch.tensor(self.config.timesteps or range(1000))
        return chosen[(len(chosen) * u.pow(self.config.timestep_power)).long().clamp(max=len(chosen) - 1)]

    def prepared(self, number: int) -> Prepared:
        """What of part `number` is the same whenever it is drawn, from the pool if there is one."""
        return self.pool.get(number, self.prepare)

    def prepare(self, number: int) -> Prepared:
        """Part `number` made anew."""
        images = self.config.loop.images(number)
        if self.crops.paired:
            return self.encoded(*given_pairs(self.crops, number, len(images), device=self.device), images)
        crops, photos = self.crops.batch(number, len(images))
        return self.encoded(self.degraded(crops, images[0]), photos, images)

    def degraded(self, crops: Tensor, first: int) -> Pair:
        """The pairs made of crops, uint8 (B, 3, H, W), the first of which is image number `first`."""
        config, group = self.config, self.config.degradation_group
        numbers = (config.loop.seed, Stream.STAGE2_DEGRADATION)
        return make_pairs(crops, config.degradation, numbers=numbers, first=first, group=group, device=self.device)

    @torch.no_grad()
    def encoded(self, pair: Pair, photos: Sequence[int], images: Sequence[int]) -> Prepared:
        """What the frozen networks make of pairs; `photos` they are from, `images` they are in the run."""
        codes, soft_prompt = self._looked_through(pair)
        draws = by_image(self.config.loop.seed, Stream.POSTERIOR, images=images)
        return Prepared(
            photos=torch.tensor(photos),
            target=to_u8(pair.hr_usm).cpu(),
            condition=to_u8(pair.lr_upsampled).cpu(),
            latents=self.networks.latents(codes, draws).cpu(),
            soft_prompt=soft_prompt.cpu(),
        )

    def _looked_through(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The autoencoder's codes of HR and DAPE's tokens of LR, from the cache if they were there before."""

        def compute() -> tuple[Tensor, Tensor]:
            return self.networks.codes(pair.hr_usm), self.networks.soft_prompt(pair.lr_upsampled)

        if self.seen is None:
            return compute()
        codes, soft_prompt = self.seen.batch([pair.hr_usm, pair.lr_upsampled], compute)
        return codes.to(self.device), soft_prompt.to(self.device)

    def key(self) -> str:
        """Everything that a prepared batch depends on."""
        config, names = self.config, ("crop", "min_scale", "degradation", "degradation_group")
        settings = {name: asdict(config)[name] for name in (*names, *(["fixed_crops"] if config.fixed_crops else []))}
        loop = ("by image", config.loop.seed, config.loop.micro_batch, config.loop.resolve_precision())
        networks = fingerprint(self.networks.vae), fingerprint(self.networks.dape)
        given = [listed(photo.lr for photo in self.crops.photos)] if self.crops.paired else []
        photos = listed(photo.path for photo in self.crops.photos)
        return digest(repr(part).encode() for part in (settings, loop, networks, photos, *given))


def tag_prompts(photos: Sequence[Photo]) -> list[str]:
    """The photos' tags in the published form "a, b," (with the trailing comma); one warning about photos without."""
    without = [photo for photo in photos if not photo.tags]
    if without and is_main_process():
        sources = sorted({photo.source.name for photo in without if photo.source})
        log.warning(
            "%d of %d photos%s have no tags and are trained with the empty prompt; `python -m trainer.tag` tags them.",
            len(without),
            len(photos),
            f" (from {', '.join(sources)})" if sources else "",
        )
    return [training_text(photo.tags) for photo in photos]

"""Stage 2: ControlNet, its image encoder and RCA are trained around a frozen base model (paper §3.3, eq. 2).

Every input as published: z₀ from the sharpened HR crop; the condition is the bicubic-upsampled LR in [0, 1]; tags
are those that the plain tagger gave for the HR photo, dropped with probability ½; the soft prompt is DAPE's on the
upsampled LR; RCA is initialised once in the U-Net and copied into the ControlNet.

    python -m trainer.stage2 --recipe paper --data photos.jsonl --base sd-2-base --dape dape.safetensors --out
    runs/stage2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seesr_core.method.losses import min_snr_weight, noise_loss, noise_loss_per_image
from seesr_core.method.rca import rca_parameters
from seesr_core.method.schedule import x0_from_eps

from ..data.cache import FrozenCache, network_key
from ..data.crops import Crops
from ..data.fingerprints import digest, drawn_from, fingerprint, listed
from ..data.pairs import check_groups
from ..data.photos import Photo
from ..engine.identity import flat
from ..engine.journal import Figures, Total
from ..engine.processes import refuse_sharded_adapters
from ..engine.samples import save_grid
from .batches import Batch, Batches
from .networks import Networks
from .recipes import Stage2Config

LABELS = ("LR", "from t 250", "from t 500", "HR")
"""Of the rows of a sample picture."""


class Judge(Protocol):
    """What judges a run while it trains."""

    def __call__(self, networks: Networks, folder: Path, step: int) -> Mapping[str, float]:
        """Figures of the present state; pictures go into `folder`."""


class Stage2Task:
    """Noise prediction on degraded crops."""

    batches_type: type[Batches] = Batches

    def __init__(
        self,
        config: Stage2Config,
        networks: Networks,
        crops: Crops,
        tags: Sequence[str],
        *,
        pool_folder: Path | None = None,
        text_folder: Path | None = None,
        pair_folder: Path | None = None,
        validation: Judge | None = None,
    ) -> None:
        self.config, self.networks, self.validation = config, networks, validation
        self.text_folder = text_folder
        self._texts: FrozenCache | None = None
        check_groups(config.loop, config.degradation_group)
        if config.trained == "lora":
            refuse_sharded_adapters()
        self.device = config.loop.resolve_device()
        self.networks.to(self.device)
        self.batches = self.batches_type(
            config, networks, crops, tags, pool_folder=pool_folder, pair_folder=pair_folder
        )
        self.trained: nn.Module = nn.ModuleDict({"controlnet": networks.controlnet, "unet": networks.unet})

    @property
    def photos(self) -> Sequence[Photo]:
        """What is drawn from."""
        return self.batches.crops.photos

    @property
    def frozen(self) -> list[nn.Module]:
        """Networks that are only looked through and not trained."""
        return [self.networks.vae, self.networks.text_encoder, self.networks.dape]

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """Loss of eq. 2 on one part of a batch."""
        batch = self.batch(step)
        pred = self.predict(batch, self.text_states(batch.prompts))
        bands = _by_band(noise_loss_per_image(pred.detach(), batch.noise), batch.timesteps)
        if not self.config.min_snr:
            return noise_loss(pred, batch.noise), bands
        per_image = noise_loss_per_image(pred, batch.noise)
        return (per_image * min_snr_weight(batch.acp.flatten(), self.config.min_snr)).mean(), bands

    def batch(self, step: int) -> Batch:
        """All inputs of a part of a step."""
        return self.batches.get(step)

    def predict(self, batch: Batch, text: Tensor) -> Tensor:
        """ε̂ of a batch under text states (B, L, D), at its own timesteps."""
        noisy, image, soft_prompt = batch.noisy(), batch.condition, batch.soft_prompt
        return self.networks.predict(noisy, batch.timesteps, text, image=image, soft_prompt=soft_prompt)

    def write_caches(self) -> None:
        """Write what is not yet on disk."""
        for cache in filter(None, (self._texts, self.batches.seen)):
            cache.write()

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the stage is resumed."""
        kept = asdict(self.config)
        settings = {name: kept[name] for name in kept.keys() - {"loop", "cache_texts", "cache_pairs"}}
        ends = (self.networks.unet.conv_in, self.networks.unet.conv_out)  # tell base models apart, and are small
        made_of = {"base": " ".join(map(fingerprint, ends)), "dape": fingerprint(self.networks.dape)}
        return {
            **flat(settings),
            "photos": listed(photo.path for photo in self.photos),
            **drawn_from(self.photos),
            **made_of,
            **self._start(),
        }

    def _start(self) -> dict[str, str]:
        """Tells apart the weights that a part of the ControlNet or RCA keeps."""
        parts = (*self.networks.controlnet.parameters(), *rca_parameters(self.networks.unet).values())
        kept = [p.cpu().numpy().tobytes() for p in parts if not p.requires_grad]
        return {"init": digest(kept)} if kept else {}

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """As `encode_text`, of the frozen text encoder; every prompt is encoded once."""
        if self._texts is None:
            self._texts = FrozenCache(network_key(self.config.loop, self.networks.text_encoder), self.text_folder)
        return self._texts.get(prompts, self.networks.encode_text).to(self.device)

    def sample(self, folder: Path, step: int) -> Mapping[str, float] | None:
        """LR, one-step estimates of z₀ from t = 250 and 500, HR; and the figures of the validation, if there is one."""
        batch = self.batch(0)
        text = self.networks.encode_text(batch.prompts)
        rows = [batch.condition]
        for t in (250, 500):
            batch.timesteps = torch.full_like(batch.timesteps, t)
            rows.append(self.networks.decode(x0_from_eps(batch.noisy(), self.predict(batch, text).float(), batch.acp)))
        save_grid(folder / f"{step:06d}.png", [row[:8] for row in (*rows, batch.target)], LABELS)
        return self.validation(self.networks, folder, step) if self.validation else None


def _by_band(per_image: Tensor, timesteps: Tensor) -> dict[str, Total]:
    """Loss of the images with t < 500; the loss over all t says little, since it depends on t so much."""
    low = timesteps < 500
    return {"loss_low_t": Total(torch.where(low, per_image, 0.0).sum(), low.sum())}

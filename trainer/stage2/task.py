"""Stage 2: ControlNet, its image encoder and RCA are trained around a frozen base model (paper §3.3, eq. 2).

Every input as published: z₀ from the sharpened HR crop; the condition is the bicubic-upsampled LR in [0, 1]; tags
are those that the plain tagger gave for the HR photo, dropped with probability ½; the soft prompt is DAPE's on the
upsampled LR; RCA is initialised once in the U-Net and copied into the ControlNet.

    python -m trainer.stage2 --recipe paper --data photos.jsonl --base sd-2-base --dape dape.safetensors --out
    runs/stage2
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from seesr_core.dape import prepare
from seesr_core.errors import DataError
from seesr_core.formats.base import load_base
from seesr_core.formats.control import ControlParts, read_control, write_control
from seesr_core.formats.ram import read_dape
from seesr_core.method.denoiser import predict_noise
from seesr_core.method.losses import noise_loss, noise_loss_per_image
from seesr_core.method.rca import rca_parameters
from seesr_core.method.schedule import alphas_cumprod, q_sample, x0_from_eps
from seesr_core.method.text import encode_prompts

from ..capacity.dry_run import dry_run, show
from ..data.cache import FrozenCache, network_key
from ..data.crops import Crops, write_skipped
from ..data.fingerprints import digest, fingerprint
from ..data.order import Stream, by_image
from ..data.pairs import check_groups, check_pairs_return, given_pairs, make_crops, make_pairs
from ..data.photos import Photo, read_photos
from ..data.pool import Pool, Prepared
from ..degradation import Pair
from ..engine import command
from ..engine.adapters import merge_lora
from ..engine.loop import flat, train
from ..engine.processes import is_main_process, refuse_sharded_adapters
from ..engine.samples import save_grid
from ..engine.sharding import whole
from .networks import Networks, build_networks
from .recipes import STAGE2_RECIPES, Stage2Config
from .validation import Validation

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


class Stage2Task:
    """Noise prediction on degraded crops."""

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
        validation: Validation | None = None,
    ) -> None:
        self.text_folder, self.validation = text_folder, validation
        self._texts: FrozenCache | None = None
        self.config, self.networks, self.crops, self.tags = config, networks, crops, tags
        check_groups(config.loop, config.degradation_group)
        if config.trained == "lora":
            refuse_sharded_adapters()
        self.device = config.loop.resolve_device()
        self.networks.to(self.device)
        self.acp = alphas_cumprod().to(self.device)
        key = self._pool_key() if config.pool else ""
        self.pool = Pool(config.pool * config.loop.parts, key, pool_folder, kind=Prepared)
        self._pairs = self._pair_cache(pair_folder) if config.cache_pairs else None
        self.trained: nn.Module = nn.ModuleDict({"controlnet": networks.controlnet, "unet": networks.unet})

    @property
    def frozen(self) -> list[nn.Module]:
        """Networks that are only looked through and not trained."""
        return [self.networks.vae, self.networks.text_encoder, self.networks.dape]

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Loss of eq. 2 on one part of a batch."""
        batch = self.batch(step)
        pred = self.predict(self.noisy(batch), batch, self.text_states(batch.prompts))
        per_image = noise_loss_per_image(pred.detach(), batch.noise)
        return noise_loss(pred, batch.noise), _by_band(per_image, batch.timesteps)

    @torch.no_grad()
    def batch(self, step: int) -> Batch:
        """All inputs of a part of a step; every random draw derives from the seed and the number of its image."""
        config = self.config
        prepared = self.pool.get(step, self._prepare)
        generators = by_image(config.loop.seed, Stream.DENOISING, images=config.loop.images(step))
        u, drop_u = (torch.cat([torch.rand(1, generator=generator) for generator in generators]) for _ in range(2))
        drop = drop_u < config.null_text
        latents = prepared.latents.to(self.device)
        return Batch(
            target=prepared.target.to(self.device).float().div(255),
            condition=prepared.condition.to(self.device).float().div(255),
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

    def _prepare(self, number: int) -> Prepared:
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
            target=_to_u8(pair.hr_usm),
            condition=_to_u8(pair.lr_upsampled),
            latents=self.networks.latents(codes, draws).cpu(),
            soft_prompt=soft_prompt.cpu(),
        )

    def _looked_through(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The autoencoder's codes of HR and DAPE's tokens of LR, from the cache if they were there before."""

        def compute() -> tuple[Tensor, Tensor]:
            return self.networks.codes(pair.hr_usm), self.soft_prompt(pair.lr_upsampled)

        if self._pairs is None:
            return compute()
        codes, soft_prompt = self._pairs.batch([pair.hr_usm, pair.lr_upsampled], compute)
        return codes.to(self.device), soft_prompt.to(self.device)

    def _pair_cache(self, folder: Path | None) -> FrozenCache:
        check_pairs_return(self.crops)
        return FrozenCache(network_key(self.config.loop, self.networks.vae, self.networks.dape), folder, parts=2)

    def write_caches(self) -> None:
        """Write what is not yet on disk."""
        for cache in filter(None, (self._texts, self._pairs)):
            cache.write()

    def _pool_key(self) -> str:
        """Everything that a prepared batch depends on."""
        config, names = self.config, ("crop", "min_scale", "degradation", "degradation_group")
        settings = {name: asdict(config)[name] for name in (*names, *(["fixed_crops"] if config.fixed_crops else []))}
        loop = ("by image", config.loop.seed, config.loop.micro_batch, config.loop.precision)
        networks = fingerprint(self.networks.vae), fingerprint(self.networks.dape)
        return digest(repr(part).encode() for part in (settings, loop, networks, self._photos()))

    def _photos(self) -> str:
        return f"{len(self.crops)} ({digest(photo.path.name.encode() for photo in self.crops.photos)})"

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the stage is resumed."""
        kept = asdict(self.config)
        settings = {name: kept[name] for name in kept.keys() - {"loop", "cache_texts", "cache_pairs"}}
        ends = (self.networks.unet.conv_in, self.networks.unet.conv_out)  # tell base models apart, and are small
        made_of = {"base": " ".join(map(fingerprint, ends)), "dape": fingerprint(self.networks.dape)}
        return {**flat(settings), "photos": self._photos(), **made_of, **self._start()}

    def _start(self) -> dict[str, str]:
        """Tells apart the weights that a part of the ControlNet or RCA keeps."""
        parts = (*self.networks.controlnet.parameters(), *rca_parameters(self.networks.unet).values())
        kept = [p.cpu().numpy().tobytes() for p in parts if not p.requires_grad]
        return {"init": digest(kept)} if kept else {}

    def encode_image(self, image: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
        """Scaled latents of images in [0, 1]: samples of the posterior (one generator, or one for each image), or a
        deterministic autoencoder's codes."""
        return self.networks.latents(self.networks.codes(image), generator)

    def soft_prompt(self, condition: Tensor) -> Tensor:
        """DAPE's tokens of the upsampled LR, resized as the published training does."""
        size = self.networks.dape.config.swin.image_size
        return self.networks.dape.encode_image(prepare(condition, size, antialias=False, mode="bicubic")).float()

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden state (B, 77, D)."""
        return encode_prompts(prompts, self.networks.tokenizer, self.networks.text_encoder)

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """As `encode_text`, of the frozen text encoder; every prompt is encoded once."""
        if self._texts is None:
            self._texts = FrozenCache(network_key(self.config.loop, self.networks.text_encoder), self.text_folder)
        return self._texts.get(prompts, self.encode_text).to(self.device)

    def noisy(self, batch: Batch) -> Tensor:
        """z_t of each image's own timestep."""
        return q_sample(batch.latents, batch.noise, self.acp[batch.timesteps].view(-1, 1, 1, 1).float())

    def predict(self, x: Tensor, batch: Batch, text: Tensor) -> Tensor:
        """Predicted noise ε̂ with ControlNet and RCA."""
        nets = self.networks
        return predict_noise(
            nets.unet, nets.controlnet, x, batch.timesteps, text, image=batch.condition, soft_prompt=batch.soft_prompt
        )

    def sample(self, folder: Path, step: int) -> Mapping[str, float] | None:
        """LR, one-step estimates of z₀ from t = 250 and 500, HR; and the figures of the validation, if there is one."""
        batch = self.batch(0)
        text = self.encode_text(batch.prompts)
        rows = [batch.condition]
        for t in (250, 500):
            batch.timesteps = torch.full_like(batch.timesteps, t)
            x = self.noisy(batch)
            rows.append(self.decode(x0_from_eps(x, self.predict(x, batch, text).float(), self.acp[t].float())))
        save_grid(folder / f"{step:06d}.png", [row[:8] for row in (*rows, batch.target)])
        return self.validation(self, folder, step) if self.validation else None

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> image in [0, 1]."""
        vae = self.networks.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].float().add(1).div(2).clamp(0, 1)


def _to_u8(image: Tensor) -> Tensor:
    return image.mul(255).round().to(torch.uint8).cpu()


def _by_band(per_image: Tensor, timesteps: Tensor) -> dict[str, float]:
    """Mean loss of the images with t < 500; the loss over all t says little, since it depends on t so much."""
    low = per_image[timesteps < 500]
    return {"loss_low_t": float(low.mean())} if len(low) else {}


def tag_prompts(photos: Sequence[Photo]) -> list[str]:
    """The photos' tags in the published form "a, b, c," (with the trailing comma).

    Raises:
        DataError: no photo has tags.
    """
    if not any(photo.tags for photo in photos):
        raise DataError(
            "None of the photos has tags; give a .jsonl list whose lines have 'tags', those of the plain tagger on HR."
        )
    return [", ".join(photo.tags) + "," if photo.tags else "" for photo in photos]


def export(
    task: Stage2Task, weights: Mapping[str, Tensor], path: Path, *, dtype: torch.dtype = torch.float16, **about: Any
) -> None:
    """Write the trained weights as `seesr*.safetensors`; every process has to ask, and the main one writes."""
    if task.config.trained == "lora":
        task.trained.load_state_dict(weights, strict=False)
        merge_lora(task.networks.controlnet)
    parts = ControlParts.from_modules(
        task.networks.unet, task.networks.controlnet, step=task.config.loop.steps, **about
    )
    parts.controlnet_state = _complete(parts.controlnet_state, weights, "controlnet.")
    parts.rca_state = _complete(parts.rca_state, weights, "unet.")
    if is_main_process():
        write_control(path, parts, dtype=dtype)
        log.info("wrote %s", path)


def _complete(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A network's state with the trained weights in it, and the frozen ones gathered from their shards."""
    return {
        name: weights[prefix + name] if prefix + name in weights else whole(tensor) for name, tensor in state.items()
    }


@dataclass(kw_only=True)
class Stage2Command(command.StageCommand):
    """Train ControlNet, image encoder and RCA. The same command again resumes; the flags below override the recipe."""

    data: str
    """Photos with tags: a .jsonl list as `python -m trainer.tag` writes it, webdataset shards (.tar, also at an
    address), or a mixture of those (.toml)."""
    base: Path
    """Base model: diffusers folder (SD-2-base) or our single file."""
    dape: Path
    """Degradation-aware tagger of stage 1, `dape*.safetensors`."""
    config: Annotated[Stage2Config, command.SETTINGS]
    """Settings that override the recipe's."""
    validate: Path | None = None
    """Folder with LR and HR, pairs to judge the run by; `python -m trainer.evaluate.degrade` makes some."""
    niqe_params: Path | None = None
    """NIQE's published parameters (.npz), to have it among the figures."""
    init: Path | None = None
    """Start from these `seesr*.safetensors` weights instead of fresh ones."""
    export: Literal["fp16", "fp32"] = "fp16"
    """Precision of the exported weights; fp32 has twice the size and gives the validation's pictures to rounding."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(command.parse(Stage2Command, STAGE2_RECIPES, argv, prog="python -m trainer.stage2")))


def run(options: Stage2Command) -> Path | None:
    """Read what the command names, train (or resume) and export; returns the exported file."""
    photos, config = read_photos(options.data), options.config
    dape, vocabulary = read_dape(options.dape)
    start = read_control(options.init) if options.init else None
    networks = build_networks(load_base(options.base), dape, config, start)
    if options.dry_run:
        crops = make_crops(photos, config)
        show(dry_run(Stage2Task(config, networks, crops, tag_prompts(crops.photos)), config.loop))
        return None
    about: dict[str, Any] = {"base": options.base.name, "recipe": options.recipe}
    about["dtype"] = {"fp16": torch.float16, "fp32": torch.float32}[options.export]
    settings = {"steps": config.validation_steps}
    judge = Validation.of_folder(options.validate, vocabulary, settings, options.niqe_params)
    return train_control(config, networks, photos, options.out, validation=judge, **about)


def train_control(
    config: Stage2Config,
    networks: Networks,
    photos: Sequence[Photo],
    out: Path,
    *,
    pool_folder: Path | None = None,
    validation: Validation | None = None,
    **about: Any,
) -> Path:
    """Train (or resume) and write `seesr-control.safetensors`; `about` goes to `export`."""
    crops = make_crops(photos, config)
    if is_main_process():
        write_skipped(crops, out)
    tags, folder = tag_prompts(crops.photos), pool_folder or out / "pool"
    texts = out / "texts" if config.cache_texts else None
    folders = {"pool_folder": folder, "text_folder": texts, "pair_folder": out / "pairs"}
    task = Stage2Task(config, networks, crops, tags, **folders, validation=validation)
    try:
        weights = train(task, config.loop, out, identity=task.identity())
    finally:
        task.write_caches()
    path = out / "seesr-control.safetensors"
    export(task, weights, path, **about)
    return path

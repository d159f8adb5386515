"""The method from a photo to the photo four times larger: prompts, prepared image, LRE start, sampling, finish.

Every step is a method of its own, so that a study can leave one out or put something else in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .dape import Tag, tagger_input
from .dape.vocabulary import split_words
from .errors import ImageError
from .method.denoiser import Denoiser
from .method.guidance import FaithfulDenoiser
from .method.reuse import Embeddings, StepReuse
from .method.sampling import Denoise, StepNoise, sample, start_latent
from .method.schedule import start_for
from .method.text import compose_prompt, encode_prompts
from .models import Models
from .pictures import sixteen
from .pictures.sizes import Picture, Sizes, as_rgb, finish, prepare, prepare_size, to_tensor
from .report import Report
from .runtime.memory import Meter, one_sentence_when_exhausted
from .runtime.planning import count_tiles, default_tile_batch, require_resources
from .segsr.joint import JointDenoiser, JointRun, segmentation_noise
from .segsr.labels import enlarge_labels, label_latent
from .segsr.tiles import LabelPredictor
from .semantics import Semantics, SemanticsReader
from .settings import UpscaleSettings
from .tiling.autoencoder import decode_tiled, encode_tiled
from .tiling.grid import PIXELS_PER_CELL, TiledDenoiser
from .tiling.runner import PictureVAE, PlacedDenoiser, with_hint

Progress = Callable[[int, int], None]
"""Told how many of how many network calls of the sampling are done."""


@dataclass(kw_only=True, slots=True)
class Prompts:
    """What the tagger read in a batch of B photos."""

    tags: list[list[Tag]]
    """Hard prompt: per photo the tags with their scores."""
    soft_prompt: Tensor | None
    """Soft prompt (B, L, D), float32 on the CPU; None samples without RCA."""


@dataclass(kw_only=True, slots=True)
class Result:
    """An upscaled photo."""

    image: Image.Image
    """RGB, exactly the photo's size × scale."""
    report: Report
    """How the picture came about: tags, sizes, seconds and memory."""
    labels: Tensor | None = None
    """With SegSR the class of each pixel, int64 (height, width) of the picture."""
    levels: sixteen.Levels | None = None
    """The same with 16 bits a channel (H, W, 3), where it was asked for."""


@dataclass(kw_only=True, slots=True)
class SeeSRPipeline:
    """The whole method around a set of models."""

    models: Models
    """The networks."""
    progress: Progress = lambda done, total: None
    """Called with (done, total) while it samples."""

    def __call__(
        self, photo: Picture, settings: UpscaleSettings | None = None, *, levels: sixteen.Levels | None = None
    ) -> Result:
        """Upscale one photo; arguments and errors as `run`."""
        return self.run([photo], settings, levels=None if levels is None else [levels])[0]

    def settings(self, **given: Any) -> UpscaleSettings:
        """The model's own defaults, with what is `given` over them."""
        return UpscaleSettings.for_model(self.models.defaults, **given)

    @torch.no_grad()
    def run(
        self,
        photos: Sequence[Picture],
        settings: UpscaleSettings | None = None,
        *,
        prompts: Prompts | None = None,
        levels: Sequence[sixteen.Levels] | None = None,
    ) -> list[Result]:
        """Upscale photos of one size as a batch.

        Args:
            photos: PIL pictures or uint8 arrays (H, W, 3).
            settings: the model's defaults if None.
            prompts: used instead of what the tagger reads.
            levels: the photos at 16 bits a channel, (H, W, 1 or 3): their results have as many. The networks see
                `photos`.

        Raises:
            ImageError: no photos, or photos of several sizes.
            ResourceError: too little memory, told before the work begins.
        """
        lr_photos = _same_size(photos)
        settings = (settings or self.settings()).for_photo(lr_photos[0].size)
        sizes = prepare_size(*lr_photos[0].size, scale=settings.scale, min_size=settings.min_size)
        require_resources(self.models, settings, sizes, batch=len(lr_photos), depth=8 if levels is None else 16)
        with one_sentence_when_exhausted("choose smaller tiles or a smaller scale, or close other programs"):
            return self._run(lr_photos, sizes, settings, prompts, levels)

    def _run(
        self,
        lr_photos: list[Image.Image],
        sizes: Sizes,
        settings: UpscaleSettings,
        prompts: Prompts | None,
        levels: Sequence[sixteen.Levels] | None,
    ) -> list[Result]:
        meter = Meter(self.models.device)
        with meter.phase("prompts"):
            prompts = prompts or self.read_prompts(lr_photos, settings)
            texts = self.compose(prompts, settings)
            states = self.encode_text([settings.negative, *texts])
        with meter.phase("prepare"):
            prepared = self.prepare(lr_photos, settings)
            semantics = self.place(lr_photos, prompts, texts, prepared, settings)
        with meter.phase("encode"):
            wanted = settings.start == "lr" or settings.fidelity > 0 or self.models.segsr is not None
            z_lr = self.encode(prepared, settings) if wanted else None
            joint = self.join(z_lr, prompts.soft_prompt, settings)
        with meter.phase("sample"):
            latent = self.sample(prepared, z_lr, states, prompts.soft_prompt, settings, semantics, joint)
        with meter.phase("decode"):
            decoded = self.decode(latent, settings, rounds=levels is None)
        with meter.phase("finish"):
            finished: list[tuple[Image.Image, sixteen.Levels | None]]
            if levels is None:
                finished = [(image, None) for image in self.finish(decoded, prepared, sizes, settings)]
            else:
                finished = [self._finish_sixteen(*pair, settings) for pair in zip(decoded, levels, strict=True)]
        common = self._report(replace(sizes, final=settings.result_size(sizes.lr)), settings, meter)
        return [
            Result(
                image=settings.cut(image),
                report=common.of_photo(i, tags, text),
                labels=None if joint is None else _fitted(joint.labels()[i], image, settings),
                levels=deep,
            )
            for i, ((image, deep), tags, text) in enumerate(zip(finished, prompts.tags, texts, strict=True))
        ]

    @torch.no_grad()
    def read_prompts(self, photos: Sequence[Image.Image], settings: UpscaleSettings) -> Prompts:
        """Tags and soft prompt of the photos as they are, before any upscaling, in one pass of the tagger."""
        dape = self.models.dape
        size = dape.config.image_size
        inputs = torch.cat([tagger_input(to_tensor(photo), size) for photo in photos])
        tokens, logits = dape(inputs.to(self.models.device))
        exclude = split_words(settings.exclude)
        tags = self.models.vocabulary.select(logits, threshold=settings.threshold, exclude=exclude)
        return Prompts(tags=tags, soft_prompt=tokens.float().cpu())

    def compose(self, prompts: Prompts, settings: UpscaleSettings) -> list[str]:
        """The text of each photo."""
        names = [[tag.name for tag in tags] if settings.use_tags else [] for tags in prompts.tags]
        return [compose_prompt(tags, settings.prompt, settings.added_prompt) for tags in names]

    def place(
        self,
        photos: Sequence[Image.Image],
        prompts: Prompts,
        texts: Sequence[str],
        prepared: Tensor,
        settings: UpscaleSettings,
    ) -> Semantics:
        """What acts where, for photos whose prompts and prepared pictures (B, 3, H, W) are known."""
        reader = SemanticsReader(
            models=self.models,
            settings=settings,
            photos=photos,
            tags=prompts.tags if settings.use_tags else [[] for _ in photos],
            texts=texts,
            soft_prompt=prompts.soft_prompt,
            size=(prepared.shape[-2] // PIXELS_PER_CELL, prepared.shape[-1] // PIXELS_PER_CELL),
        )
        return reader.read()

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text states (N, L, D), float32 on the CPU."""
        return encode_prompts(texts, self.models.tokenizer, self.models.text_encoder).cpu()

    def prepare(self, photos: Iterable[Image.Image], settings: UpscaleSettings) -> Tensor:
        """The upscaled photos that condition the networks: uint8 (B, 3, H, W), sides multiples of 8."""
        pictures = (prepare(photo, scale=settings.scale, min_size=settings.min_size) for photo in photos)
        return torch.stack([_to_u8_tensor(picture) for picture in pictures])

    def encode(self, prepared: Tensor, settings: UpscaleSettings) -> Tensor:
        """Scaled LR latents (B, 4, H/8, W/8) of the prepared pictures."""
        return encode_tiled(self._vae(), prepared, tile_px=settings.vae_tile)

    def decode(self, latent: Tensor, settings: UpscaleSettings, *, rounds: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) of scaled latents: uint8, or not rounded and float32 in [0, 1]."""
        return decode_tiled(self._vae(rounds=rounds), latent, tile_px=settings.vae_tile)

    def _vae(self, *, rounds: bool = True) -> PictureVAE:
        return PictureVAE(self.models.vae, self.models.device, self.models.dtype, rounds=rounds)

    @torch.no_grad()
    def join(
        self, z_lr: Tensor | None, soft_prompt: Tensor | None, settings: UpscaleSettings, labels: Tensor | None = None
    ) -> JointRun | None:
        """The segmentation's side of a run, to be given to `sample`; None without SegSR.

        Args:
            z_lr: scaled LR latents (B, C, h, w).
            soft_prompt: (B, L, D).
            settings: seed and tiles.
            labels: a segmentation to start from, int64 (B, H, W) of any size.
        """
        segsr, device = self.models.segsr, self.models.device
        if segsr is None or z_lr is None or soft_prompt is None:
            return None
        predict = LabelPredictor(
            segsr=segsr,
            features=segsr.segdm.features(z_lr.to(device), soft_prompt.to(device)),
            tiled=self._tiled(settings),
        )
        like = torch.empty(len(z_lr), segsr.bits, *z_lr.shape[2:], device=device)
        noise = segmentation_noise([settings.seed + i for i in range(len(z_lr))], like)
        initial = None if labels is None else label_latent(labels, segsr.codes, *z_lr.shape[2:])
        return JointRun(segsr, predict, noise, initial=initial)

    @torch.no_grad()
    def sample(
        self,
        prepared: Tensor,
        z_lr: Tensor | None,
        states: Tensor,
        soft_prompt: Tensor | None,
        settings: UpscaleSettings,
        semantics: Semantics | None = None,
        joint: JointRun | None = None,
    ) -> Tensor:
        """Denoised latents (B, 4, h, w).

        Args:
            prepared: uint8 (B, 3, 8h, 8w).
            z_lr: scaled LR latents, for the LR start and the fidelity dial; None does without.
            states: text states (1 + B, L, D), those of the negative prompt first.
            soft_prompt: (B, L, D).
            settings: start, schedule, solver, guidance, strengths, tiles.
            semantics: what acts where; None: everything everywhere.
            joint: the segmentation that is denoised beside it, see `join`.
        """
        batch, _, height, width = prepared.shape
        noise = StepNoise.from_seed(settings.seed, batch)
        channels = self.models.unet.config.in_channels
        like = torch.empty(batch, channels, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL)
        start_timestep = start_for(settings.denoised_timesteps(), settings.start_timestep)
        start = start_latent(noise(like), point=settings.start, z_lr=z_lr, start_timestep=start_timestep)
        timesteps = settings.denoised_timesteps()
        tiled = self._denoiser(prepared, states, soft_prompt, settings, semantics or Semantics())
        denoise: Denoise = tiled
        if joint is not None:
            denoise = JointDenoiser(denoise=lambda x, t, hint: with_hint(tiled, hint)(x, t), run=joint)
        if settings.fidelity > 0 and z_lr is not None:
            denoise = FaithfulDenoiser(denoise=denoise, z_lr=z_lr, timesteps=timesteps, fidelity=settings.fidelity)
        return sample(denoise, start, timesteps=timesteps, noise_source=noise, solver=settings.solver)

    def _denoiser(
        self,
        prepared: Tensor,
        states: Tensor,
        soft_prompt: Tensor | None,
        settings: UpscaleSettings,
        semantics: Semantics,
    ) -> TiledDenoiser:
        models, batch = self.models, len(prepared)
        denoiser = Denoiser(
            unet=models.unet,
            controlnet=models.controlnet,
            positive=states[1:],
            negative=states[:1].expand(batch, -1, -1),
            soft_prompt=soft_prompt,
            image=prepared,
            cfg=settings.cfg,
            cfg_interval=settings.cfg_interval,
            control_scale=settings.control_scale,
            rca_scale=settings.rca_scale,
            regions=semantics.regions,
            share=semantics.share,
        )
        tiled = self._tiled(settings)
        counter = self._counter(prepared.shape[-2:], settings, tiled.keywords["tile_batch"])
        return tiled(
            denoise=PlacedDenoiser(
                denoiser=denoiser,
                device=models.device,
                dtype=models.dtype,
                text=semantics.text,
                soft=semantics.soft,
                embeddings=Embeddings() if len(settings.denoised_timesteps()) > 1 else None,
                reuse=StepReuse(steps=settings.control_reuse) if settings.control_reuse > 1 else None,
                on_call=counter,
            )
        )

    def _tiled(self, settings: UpscaleSettings) -> partial[TiledDenoiser]:
        """Makes a denoiser in the tiles that the settings want, of its `denoise`."""
        return partial(
            TiledDenoiser,
            tile=settings.tile // PIXELS_PER_CELL,
            overlap=settings.overlap // PIXELS_PER_CELL,
            tile_batch=settings.tile_batch or default_tile_batch(self.models.device),
            layout=settings.layout,
        )

    def _counter(self, size: Sequence[int], settings: UpscaleSettings, tile_batch: int) -> Callable[[], None]:
        """Tells `progress` of every call of the networks."""
        calls = math.ceil(count_tiles(size[1], size[0], settings) / tile_batch)
        return _Counter(self.progress, calls * len(settings.denoised_timesteps()))

    def finish(
        self, decoded: Iterable[Tensor], prepared: Iterable[Tensor], sizes: Sizes, settings: UpscaleSettings
    ) -> list[Image.Image]:
        """Colours of the prepared picture, then exactly the photo's size × scale."""
        return [
            finish(image, reference, lr_size=sizes.lr, scale=settings.scale, color_fix=settings.color_fix)
            for image, reference in zip(decoded, prepared, strict=True)
        ]

    def _finish_sixteen(
        self, decoded: Tensor, levels: sixteen.Levels, settings: UpscaleSettings
    ) -> tuple[Image.Image, sixteen.Levels]:
        """The same at 16 bits of a picture in [0, 1], and that at 8."""
        fixed = sixteen.finish(
            decoded, levels, scale=settings.scale, min_size=settings.min_size, fix=settings.color_fix
        )
        left, top, right, bottom = settings.box((fixed.shape[1], fixed.shape[0]))
        return sixteen.at_eight(fixed), fixed[top:bottom, left:right]

    def _report(self, sizes: Sizes, settings: UpscaleSettings, meter: Meter) -> Report:
        """What is the same for the whole batch."""
        return Report(
            model=self.models.name,
            device=str(self.models.device),
            dtype=str(self.models.dtype).removeprefix("torch."),
            sizes=sizes,
            timesteps=settings.denoised_timesteps(),
            tiles=count_tiles(*sizes.prepared, settings),
            settings=settings,
            phases=meter.phases,
        )


@dataclass(slots=True)
class _Counter:
    progress: Progress
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def _same_size(photos: Sequence[Picture]) -> list[Image.Image]:
    pictures = [as_rgb(photo) for photo in photos]
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) != 1:
        raise ImageError(f"A batch needs photos of one size, found {', '.join(map(str, sizes)) or 'no photos'}.")
    return pictures


def _fitted(labels_hw: Tensor, image: Image.Image, settings: UpscaleSettings) -> Tensor:
    """Labels for a finished picture before `settings` cut it, (height, width) of what is left."""
    whole = enlarge_labels(labels_hw[None].cpu(), image.height, image.width)[0]
    cut = settings.cut(Image.fromarray(whole.to(torch.uint8).numpy()))
    return torch.from_numpy(np.array(cut)).long()


def _to_u8_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

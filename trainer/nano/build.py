"""Builds the small model part by part; a part whose file is there already is left alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seesr_core.dape import DAPE, Vocabulary
from seesr_core.errors import SettingsError
from seesr_core.formats.base import load_base
from seesr_core.formats.control import ControlParts, read_control, write_control
from seesr_core.formats.metadata import save_safetensors
from seesr_core.formats.ram import read_dape, write_dape
from seesr_core.formats.schema import parse_json, read
from seesr_core.formats.sd import BaseParts, read_base, write_base
from seesr_core.formats.tensorfile import load_tensors
from seesr_core.method.schedule import BETA_END, BETA_START
from seesr_core.runtime.files import read_text, write_text

from ..data.crops import Crops
from ..data.photos import MOST_LIST, read_photos
from ..data.teacher import Teacher
from ..deep_features import load_efficientnet
from ..distill.few_steps import FewStepConfig, FewStepTask, without_critic
from ..engine.loop import train
from ..stage1.command import train_dape
from ..stage2.batches import tag_prompts
from ..stage2.command import train_control
from ..stage2.networks import Networks, build_networks
from ..stage2.recipes import Stage2Config
from . import dct
from .autoencoder import AutoencoderTask, build_autoencoder, exported, to_signed
from .autoencoder import identity as autoencoder_identity
from .prior import PriorTask, build_prior, fit_latents, trainable
from .recipe import NanoConfig
from .tagger import TaggerTask, fit_thresholds, frequent_words, predict, split
from .text import train_tokenizer

log = logging.getLogger(__name__)

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
}

BASE, DAPE_FILE, CONTROL = (
    "checkpoints/seesr-nano.safetensors",
    "dape/dape-nano.safetensors",
    "seesr/seesr-nano-control.safetensors",
)
_WITH_DECODER = ("decoder", "texture")
"""Parts that tune the decoder, too, in their order."""
_DECODER_START = "decoder.layers.0.weight"


class Builder:
    """The parts of one small model in one run folder.

    Args:
        config: a recipe.
        photos: folder or .jsonl list with the photos' own words.
        out: run folder; the three files of the model end up in `out/model`.
        tag_lists: folder with RAM's public tag lists; widens the text encoder's vocabulary and names tags in Chinese.
        init: model folder whose autoencoder, tagger, U-Net, text encoder, ControlNet and RCA are the start instead of
            fresh ones; RCA has to learn the new tagger's tokens. An autoencoder of other latents is trained anew, and
            the ends of U-Net and ControlNet are fitted to it.
        autoencoder: take this one instead of training one: an `autoencoder.safetensors` or a base file.
        teacher: super-resolution network that the few-step tuning learns from beside the photos; a file for spandrel.
    """

    def __init__(
        self,
        config: NanoConfig,
        photos: Path,
        out: Path,
        tag_lists: Path | None = None,
        init: Path | None = None,
        autoencoder: Path | None = None,
        teacher: Path | None = None,
    ) -> None:
        self.config, self.out, self.tag_lists, self.init = config, out, tag_lists, init
        self.given_autoencoder, self.teacher = autoencoder, teacher
        self.source = photos
        self.photos = read_photos(photos)
        self.device = config.control.loop.resolve_device()

    @property
    def parts(self) -> dict[str, tuple[Path, Callable[[], None]]]:
        """Every part in order: its result and what makes it."""
        return {
            "autoencoder": (self.out / "autoencoder.safetensors", self.autoencoder),
            "tagger": (self.out / "tagger.safetensors", self.tagger),
            "dape": (self.out / "dape" / "dape.safetensors", self.dape),
            "tags": (self.out / "tags.jsonl", self.tags),
            "prior": (self.out / "base.safetensors", self.prior),
            "control": (self.out / "control" / "seesr-control.safetensors", self.control),
            "few-steps": (self.out / "few-steps.safetensors", self.few_steps),
            "decoder": (self.out / "decoder.safetensors", self.decoder),
            "texture": (self.out / "texture.safetensors", self.texture),
            "package": (self.out / "model" / CONTROL, self.package),
        }

    def build(self, only: Sequence[str] = ()) -> None:
        """Make the parts that are missing, or those of `only`."""
        for name, (result, make) in self.parts.items():
            if only and name not in only:
                continue
            if result.exists():
                log.info("%s: there already (%s)", name, result)
                continue
            log.info("%s: building", name)
            make()

    def autoencoder(self) -> None:
        """Train the autoencoder, or take the one that is given, or that of `init` if its latents are the same."""
        start = self.given_autoencoder or (self.init / BASE if self.init else None)
        weights = _read_autoencoder(start) if start else {}
        if not _fits(weights):
            if self.given_autoencoder:
                raise SettingsError(
                    f"{self.given_autoencoder} holds no autoencoder of {dct.CHANNELS} latent channels; give an "
                    "autoencoder.safetensors of a run, or a base file of the small model's second release."
                )
            weights = self._train_autoencoder()
        _save(self.parts["autoencoder"][0], weights)

    def _train_autoencoder(self) -> dict[str, torch.Tensor]:
        config = self.config.autoencoder
        crops = Crops(self.photos, size=config.crop, min_scale=config.min_scale, seed=config.loop.seed)
        task = AutoencoderTask(config, crops)
        weights = train(task, config.loop, self.out / "autoencoder", identity=autoencoder_identity(config, crops))
        return exported(weights, task.encoder)

    def tagger(self) -> None:
        """Train the tagger and fit its thresholds on the photos kept out."""
        config = self.config.tagger
        words = frequent_words(self.photos, config.min_count, classes=config.pretrained)
        training, kept = split(self.photos, config.holdout_every, untagged=config.pretrained)
        task = TaggerTask(config, training, words, self._first_tagger(words))
        weights = train(
            task, config.loop, self.out / "tagger", identity={"words": list(words), "photos": len(training)}
        )
        _filled(task.trained, weights)
        model = task.tagger
        thresholds = fit_thresholds(predict(model, kept).sigmoid(), task.truth(kept, words))
        chinese = self._chinese(words)
        vocabulary = Vocabulary(tags=words, thresholds=thresholds, tags_zh=chinese)
        source = f"small tagger, {config.loop.steps} steps, photos {self.source.name}"
        write_dape(self.parts["tagger"][0], model, vocabulary, source=source, dtype=torch.float32)

    def _first_tagger(self, words: Sequence[str]) -> DAPE | None:
        """That of `init`, whose words have to be the same."""
        if self.init is None:
            return None
        tagger, vocabulary = read_dape(self.init / DAPE_FILE)
        if vocabulary.tags != tuple(words):
            raise SettingsError(
                f"{self.init / DAPE_FILE} knows {len(vocabulary)} words, other ones than the {len(words)} of these "
                "photos. Give the photos and min_count that it was trained with, or start afresh."
            )
        return tagger

    def dape(self) -> None:
        """Stage 1 from that tagger; photos that its training kept out are kept out here, too, to measure on."""
        teacher, vocabulary = read_dape(self.parts["tagger"][0])
        kept = set(split(self.photos, self.config.tagger.holdout_every)[1])
        photos = [photo for photo in self.photos if photo not in kept]
        train_dape(self.config.dape, teacher, vocabulary, photos, self.out / "dape", source="nano, stage 1")

    def tags(self) -> None:
        """Tag every photo with the plain tagger, as stage 2 wants it."""
        tagger, vocabulary = read_dape(self.parts["tagger"][0])
        found = vocabulary.prompt_tags(predict(tagger, self.photos))
        lines = [
            json.dumps({"file": str(photo.path.resolve()), "tags": tags.split(", ") if tags else []})
            for photo, tags in zip(self.photos, found, strict=True)
        ]
        write_text(self.parts["tags"][0], "\n".join(lines) + "\n")

    def prior(self) -> None:
        """Train U-Net and text encoder; write the base file and the ControlNet that learnt with them."""
        config = self.config.prior
        networks = self._prior_networks()
        crops, prompts = self._tagged_crops(config.stage2, human_words=config.human_words)
        task = PriorTask(config, networks, crops, prompts, pool_folder=self.out / "pool")
        weights = train(task, config.stage2.loop, self.out / "prior", identity=task.identity())
        task.trained.load_state_dict(weights, strict=False)
        about: dict[str, Any] = {"recipe": "nano", "base": "seesr-nano", "step": config.stage2.loop.steps}
        write_control(
            self.out / "prior-control.safetensors",
            ControlParts.from_modules(networks.unet, networks.controlnet, **about),
            dtype=torch.float32,
        )
        write_base(self.parts["prior"][0], _base_parts(networks, about), dtype=torch.float32)

    def _prior_networks(self) -> Networks:
        """Fresh networks, or those of `init`."""
        config = self.config.prior
        if self.init:
            start, base = read_control(self.init / CONTROL), load_base(self.init / BASE)
            networks = build_networks(base, self._dape(), config.stage2, start)
            self._change_autoencoder(networks)
            return trainable(networks)
        words = [*self._ram_tags(), *(word for photo in self.photos for word in photo.tags)]
        tokenizer = train_tokenizer(words, vocab_size=self.config.vocab_size)
        return build_prior(config, self._vae(), tokenizer, self._dape())

    def _change_autoencoder(self, networks: Networks) -> None:
        """Put the run's autoencoder in the place of `init`'s; U-Net and ControlNet are fitted to other latents."""
        old, networks.vae = networks.vae, self._vae().requires_grad_(False)
        if old.config.latent_channels != networks.vae.config.latent_channels:
            crops, _ = Crops(self.photos, size=64, min_scale=0.5).batch(0, 64)
            pictures = to_signed(crops)
            with torch.no_grad():
                before, after = (
                    vae.encode(pictures).latents * vae.config.scaling_factor for vae in (old, networks.vae)
                )
            fit_latents(networks, before, after)

    def control(self) -> None:
        """Stage 2 around the frozen prior, from the ControlNet that learnt with it."""
        start = read_control(self.out / "prior-control.safetensors")
        networks = build_networks(load_base(self.parts["prior"][0]), self._dape(), self.config.control, start)
        train_control(
            self.config.control,
            networks,
            read_photos(self.parts["tags"][0]),
            self.out / "control",
            pool_folder=self.out / "pool",
            recipe="nano",
            base="seesr-nano",
            defaults=self.config.defaults,
        )

    def few_steps(self) -> None:
        """Tune U-Net, ControlNet and RCA end to end for the steps that ship."""
        weights = self._tuned("few-steps", self.config.few_steps)
        _save(self.parts["few-steps"][0], weights)

    def decoder(self) -> None:
        """Tune the autoencoder's decoder together with them, on the latents that they restore and on exact ones."""
        weights = self._tuned("decoder", self.config.decoder)
        _save(self.parts["decoder"][0], weights)

    def texture(self) -> None:
        """Tune all of them against a critic; the decoder goes only a part of the way to what comes of it.

        Weights between those before and those after, w + a·(w' − w), keep some of the texture and little of the weave
        that a critic brings into a small decoder (network interpolation of ESRGAN, Wang et al. 2018, arXiv:1809.00219).
        """
        after, share = self._tuned("texture", self.config.texture), self.config.texture_share
        before = load_tensors(self.parts["decoder"][0])
        part = {name: torch.lerp(before[name], after[name].float(), share) for name in after if _of_decoder(name)}
        _save(self.parts["texture"][0], {**after, **part})

    def _tuned(self, part: str, config: FewStepConfig) -> dict[str, torch.Tensor]:
        """What a few-step tuning makes of the run's networks."""
        crops, prompts = self._tagged_crops(config)
        task = FewStepTask(
            config,
            self._networks(config),
            crops,
            prompts,
            defaults=self.config.defaults,
            teacher=Teacher.of_file(self.teacher, device=self.device) if self.teacher else None,
            features=load_efficientnet() if config.deep_weight else None,
            pool_folder=self.out / "shown",
        )
        weights = train(task, config.loop, self.out / f"tuned-{part}", identity=task.identity())
        return without_critic(weights)

    def _networks(self, config: Stage2Config) -> Networks:
        """The run's networks with whatever parts are there."""
        start = read_control(self.parts["control"][0])
        networks = build_networks(load_base(self.parts["prior"][0]), self._dape(), config, start)
        networks.vae = self._vae().requires_grad_(False)
        both = nn.ModuleDict({"unet": networks.unet, "controlnet": networks.controlnet})
        for tuned in (self.parts[part][0] for part in ("few-steps", *_WITH_DECODER)):
            if tuned.exists():
                both.load_state_dict(load_tensors(tuned), strict=False)
        return networks

    def package(self) -> None:
        """Write the three files in half precision, under their names in the model folder."""
        folder = self.out / "model"
        for name in (BASE, DAPE_FILE, CONTROL):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        networks = self._networks(self.config.control)
        about: dict[str, Any] = {"recipe": "nano", "base": "seesr-nano", "step": self.config.few_steps.loop.steps}
        write_base(folder / BASE, _base_parts(networks, about))
        dape, vocabulary = read_dape(self.parts["dape"][0])
        write_dape(folder / DAPE_FILE, dape, vocabulary, source="nano, stage 1")
        control = ControlParts.from_modules(networks.unet, networks.controlnet, **about)
        write_control(folder / CONTROL, replace(control, defaults=self.config.defaults))
        self._write_attributions(folder / "ATTRIBUTIONS.tsv")

    def _write_attributions(self, path: Path) -> None:
        """Licence and author of every training photo, from a list whose lines have them."""
        if self.source.is_dir():
            return
        rows = []
        for number, line in enumerate(read_text(self.source, MOST_LIST).splitlines(), 1):
            entry = read(_Attribution, parse_json(line), f"{self.source}:{number}")
            rows.append([Path(entry.file).name, entry.licence, entry.attribution])
        if any(row[1] for row in rows):
            write_text(path, "".join("\t".join(row) + "\n" for row in rows))

    def _vae(self) -> Any:
        """The run's autoencoder, its decoder the one that was tuned last, if any was."""
        tuned = [self.parts[part][0] for part in _WITH_DECODER if self.parts[part][0].exists()]
        weights = load_tensors(self.parts["autoencoder"][0]) | (load_tensors(tuned[-1]) if tuned else {})
        return _filled(build_autoencoder(), weights)

    def _dape(self) -> DAPE:
        return read_dape(self.parts["dape"][0])[0]

    def _tagged_crops(self, config: Stage2Config, *, human_words: bool = False) -> tuple[Crops, list[str]]:
        """Crops and their prompts: the plain tagger's tags, the photos' own words after them if wanted."""
        photos = read_photos(self.parts["tags"][0])
        if human_words:
            own = {photo.path.resolve(): photo.tags for photo in self.photos}
            photos = [replace(p, tags=tuple(dict.fromkeys((*p.tags, *own[p.path])))) for p in photos]
        crops = Crops(photos, size=config.crop, min_scale=config.min_scale, seed=config.loop.seed)
        return crops, tag_prompts(crops.photos)

    def _ram_tags(self) -> list[str]:
        return _lines(self.tag_lists / "ram_tag_list.txt") if self.tag_lists else []

    def _chinese(self, words: Sequence[str]) -> tuple[str, ...]:
        """Chinese names from RAM's lists; a word that they lack keeps its English name."""
        if self.tag_lists is None:
            return ()
        chinese = dict(zip(self._ram_tags(), _lines(self.tag_lists / "ram_tag_list_chinese.txt"), strict=True))
        return tuple(chinese.get(word, word) for word in words)


def _base_parts(networks: Networks, about: dict[str, Any]) -> BaseParts:
    """What of the networks goes into the base file."""
    return BaseParts.from_modules(
        unet=networks.unet,
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer,
        scheduler=SCHEDULER,
        info=about,
    )


@dataclass(frozen=True, slots=True)
class _Attribution:
    """What a line of a list says of whose a photo is."""

    file: str
    licence: str = ""
    attribution: str = ""


def _read_autoencoder(path: Path) -> dict[str, torch.Tensor]:
    """An autoencoder's tensors, from a run's file of them or from a base file."""
    tensors = load_tensors(path)
    return tensors if _DECODER_START in tensors else read_base(path).vae_state


def _fits(autoencoder: dict[str, torch.Tensor]) -> bool:
    """Whether its latents are the cosine code's."""
    return _DECODER_START in autoencoder and autoencoder[_DECODER_START].shape[1] == dct.CHANNELS


def _of_decoder(name: str) -> bool:
    return name.startswith("decoder.")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines()]


def _filled(module: Any, weights: Any) -> Any:
    module.load_state_dict(weights, strict=False)
    return module.eval()


def _save(path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_safetensors(path, {name: tensor.float() for name, tensor in weights.items()}, {})

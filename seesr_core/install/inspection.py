"""What a weights file is, how large, and what it goes with, from its header and a few small tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..formats.detect import FileKind, Kind, detect
from ..formats.tensorfile import is_undamaged
from ..runtime.files import listed
from .evidence import Evidence, evidence_for, is_stated, is_turbo, prediction
from .gather import SUFFIXES
from .hashing import Progress, sha256
from .manifest import COMFY, FOLDER, Asset, load_manifest

_SD2_WIDTH = 1024
_OURS = ("base", "recipe", "step", "source", "base_check", "quantization", "image_size", "defaults", "version")
_LONGEST = 160


@dataclass(kw_only=True, slots=True)
class Inspection:
    """All that is said about one file."""

    path: Path
    """Path of the file."""
    kind: str
    """Kind of the file, a `formats.detect.Kind`."""
    label: str
    """The kind in words."""
    container: str
    """`safetensors` or `pickle`."""
    bytes: int
    """Size of the file in bytes."""
    tensors: int
    """Number of tensors in the file."""
    parameters: int
    """Number of parameters in the file."""
    dtypes: dict[str, int]
    """Numbers by element type, the most frequent first."""
    sizes: dict[str, int]
    """The sizes that tell variants apart."""
    fits: str
    """What it goes with, or why it does not go with anything here."""
    usable: bool
    """Whether SeeSR has a use for it."""
    prediction: str = ""
    """What a relative of Stable Diffusion 2 predicts: "epsilon", "v" or "" (not known)."""
    evidence: list[str] = field(default_factory=list)
    """What the prediction type rests on, one sentence each."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Entries of this project's files."""
    sha256: str = ""
    """Hash of the file, if it was asked for."""
    known_as: str = ""
    """The published file that has this hash."""
    undamaged: bool | None = None
    """Whether the file is as it was written, if it was hashed and states its own hash."""


def inspect_file(path: Path, *, hashed: bool = False, progress: Progress = lambda done, total: None) -> Inspection:
    """Look at one file.

    Args:
        path: a weights file.
        hashed: also compute its sha256, look it up, and compare it with what the file states of itself; reads all.
        progress: of the hashing.

    Raises:
        WeightsError: missing, empty, truncated, unsafe, or no weights file at all.
    """
    found = detect(path)
    header = found.header
    evidence = evidence_for(header) if is_sd2(found) else []
    result = Inspection(
        path=path,
        kind=found.kind.value,
        label=label_of(found, evidence),
        container=header.container,
        bytes=path.stat().st_size,
        tensors=len(header.tensors),
        parameters=header.parameters(),
        dtypes=_dtypes(found),
        sizes=found.sizes,
        fits=_fits(found, evidence),
        usable=_usable(found, evidence),
        prediction=prediction(evidence),
        evidence=[item.text for item in evidence],
        metadata={n: " ".join(header.metadata[n][:_LONGEST].split()) for n in _OURS if header.metadata.get(n)},
    )
    if hashed:
        result.sha256 = sha256(path, progress)
        result.known_as = known_hashes().get(result.sha256, "")
        result.undamaged = is_undamaged(header)
    return result


def damage(path: Path) -> str:
    """What is said of a file that has another hash than it states of itself."""
    return (
        f"{path} has another sha256 than it states of itself: it is damaged, or another program has changed it. Make "
        "or download it again."
    )


def files_of(path: Path) -> list[Path]:
    """The weights files that `path` stands for: itself, or those of a folder and of the folders in it.

    Raises:
        WeightsError: nothing there.
    """
    if not path.is_dir():
        return [path]
    below = [entry for entry in sorted(path.iterdir()) if os.path.isdir(entry) and not entry.name.startswith(".")]
    found = [file for folder in (path, *below) for file in listed(folder) if file.suffix in SUFFIXES]
    if not found:
        raise WeightsError(f"{path} holds no weights files: expected {', '.join(SUFFIXES)} in it or one level below.")
    return found


def known_hashes() -> dict[str, str]:
    """sha256 → name of the published file, for all whose hash the manifest knows."""
    assets: list[Asset] = list(load_manifest().values())
    layouts = [asset.layouts[name] for asset in assets for name in (FOLDER, COMFY)]
    return {file.sha256: file.path for layout in layouts for file in layout.files if file.sha256}


def is_sd2(found: FileKind) -> bool:
    """Whether it holds a U-Net of Stable Diffusion 2's sizes, whose relatives shapes do not tell apart."""
    kinds = (Kind.SD2, Kind.UNET, Kind.SEESR_UNET)
    return found.kind in kinds and found.sizes.get("context_dim") == _SD2_WIDTH and found.sizes.get("in_channels") == 4


def label_of(found: FileKind, evidence: list[Evidence]) -> str:
    """The detected label, with what the evidence adds."""
    if not is_sd2(found) or found.kind is Kind.SEESR_UNET:
        return found.label
    kind = prediction(evidence)
    sure = "" if is_stated(evidence) else "probably "
    if kind == "v":
        return f"{found.label}, {sure}a v-prediction model (2.0 or 2.1 at 768 pixels)"
    if is_turbo(evidence):
        return f"{found.label}, SD-turbo by what is written of it"
    return f"{found.label}, {sure}predicting ε (2-base, 2.1-base or SD-turbo)" if kind else found.label


def _dtypes(found: FileKind) -> dict[str, int]:
    counts: dict[str, int] = {}
    for spec in found.header.tensors.values():
        counts[spec.dtype] = counts.get(spec.dtype, 0) + math.prod(spec.shape)
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def _usable(found: FileKind, evidence: list[Evidence]) -> bool:
    if found.kind in (Kind.SD2, Kind.UNET):
        return is_sd2(found) and prediction(evidence) != "v"
    return found.kind in _FITS or found.kind in (Kind.VAE, Kind.TEXT_ENCODER)


def _fits(found: FileKind, evidence: list[Evidence]) -> str:
    if found.kind in (Kind.SD2, Kind.UNET) and is_sd2(found):
        if prediction(evidence) == "v":
            return "nothing here: SeeSR was trained on the ε-predicting 2-base (`download --what base`)"
        return "SeeSR, as its base model" + ("" if prediction(evidence) else ", if it predicts ε, which nothing shows")
    rule = _FITS.get(found.kind)
    return rule(_all_sizes(found)) if rule else _NOTHING.get(found.kind, "nothing here that is known")


def _all_sizes(found: FileKind) -> dict[str, int]:
    """Sizes, with the width of the soft prompt that a tagger gives."""
    projection = found.header.shape("image_proj.weight")
    return found.sizes | ({"token_width": projection[0]} if projection else {})


_Rule = Callable[[dict[str, int]], str]
_FITS: dict[Kind, _Rule] = {
    Kind.DAPE: lambda sizes: f"a SeeSR file for soft prompts of width {sizes.get('token_width')}",
    Kind.DAPE_PEFT: lambda sizes: "the RAM file that it was trained on (`convert`, or --model)",
    Kind.DAPE_LORA: lambda sizes: "ram_swin_large_14m.pth and the tag lists (`convert` makes one file of them)",
    Kind.RAM: lambda sizes: (
        f"{'DAPE.pth' if 'window' in sizes else 'its adapter of stage 1'} and the tag lists "
        "(`convert` makes one file of them); stage 1 as the teacher"
    ),
    Kind.CONTROL: lambda sizes: (
        f"a base model with {sizes.get('channels')} first channels and text width {sizes.get('context_dim')}, and a "
        f"tagger with soft prompts of width {sizes.get('soft_prompt_dim')}"
    ),
    Kind.SEGSR: lambda sizes: "the SeeSR file and the tagger that it was trained with",
    Kind.BASE: lambda sizes: (
        f"a SeeSR file for {sizes.get('channels')} first channels and text width {sizes.get('context_dim')}"
    ),
    Kind.SEESR_UNET: lambda sizes: "the SeeSR ControlNet of the same folder (`convert` makes one file of them)",
    Kind.SEESR_CONTROLNET: lambda sizes: "the SeeSR U-Net of the same folder (`convert` makes one file of them)",
}
_NOTHING: dict[Kind, str] = {
    Kind.RAM_PLUS: "nothing here: SeeSR was trained with RAM, not RAM++ (`download --what ram`)",
    Kind.TAG2TEXT: "nothing here: SeeSR was trained with RAM (`download --what ram`)",
    Kind.SD1: "nothing here: SeeSR needs Stable Diffusion 2-base (`download --what base`)",
    Kind.SDXL: "nothing here: SeeSR needs Stable Diffusion 2-base (`download --what base`)",
    Kind.SD2: "nothing here: SeeSR needs the text-to-image model with four input channels (`download --what base`)",
    Kind.CONTROLNET: "nothing here: SeeSR's ControlNet has representation cross-attention (`download --what seesr`)",
    Kind.LDM_CONTROLNET: "nothing here: SeeSR's ControlNet is another (`download --what seesr`)",
    Kind.VAE: "a base model, as a part of it",
    Kind.TEXT_ENCODER: "a base model, as a part of it",
    Kind.TAESD: "small base files of this project",
}


def as_json(item: Inspection) -> dict[str, Any]:
    """Plain JSON types."""
    entries = {name: getattr(item, name) for name in Inspection.__slots__}
    return {**entries, "path": str(item.path)}

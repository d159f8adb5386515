"""`convert`: published weights to this project's files, without what inference does not need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SettingsError, WeightsError
from ..formats.ram import read_dape
from ..install.convert_control import ControlJob
from ..install.convert_dape import TaggerJob
from ..install.gather import Material, comfy_folders, gather
from ..install.places import comfy_models
from ..install.tag_change import tag_change
from ..model_files import NANO_FOLDER
from ..runtime.memory import Meter, gigabytes
from .console import progress_bar, say
from .jobs import list_photos
from .tables import say_table, size_text

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_EXAMPLE = NANO_FOLDER / "example.jpg"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = (
        "Convert RAM with DAPE's adapter to one dape.safetensors, and the published SeeSR folders to one "
        "seesr.safetensors. Files are told by content; IN may be files, or a folder that holds them."
    )
    parser.add_argument("sources", metavar="IN", type=Path, nargs="*", help="files and folders to convert")
    parser.add_argument("--comfy", type=Path, metavar="PATH", help="take from and write into ComfyUI's model folders")
    parser.add_argument("--out", type=Path, metavar="PATH", help="folder, or *.safetensors if one file is made")
    parser.add_argument("--base", type=Path, metavar="PATH", help="base model to compare SeeSR's frozen weights with")
    parser.add_argument("--unchecked", action="store_true", help="drop the frozen weights without that comparison")
    parser.add_argument("--no-adapter", action="store_true", help="convert plain RAM, for training a DAPE")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp16", help="of the written weights (fp16)")
    parser.add_argument("--int8", action="store_true", help="store the tagger's matrices in 8 bits")
    parser.add_argument("--photos", type=Path, metavar="PATH", help="photo or folder to measure the change in tags on")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--json", action="store_true", help="print a JSON list with an entry for each file")


@dataclass(kw_only=True, slots=True)
class _Made:
    """A written file, or one that was left as it is."""

    target: Path
    inputs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    material = _material(arguments)
    plans = _plans(arguments, material)
    if not plans:
        raise WeightsError(_nothing(material))
    if arguments.out is not None and arguments.out.suffix and len(plans) > 1:
        raise SettingsError(f"{len(plans)} files are to be made: --out must be a folder, not {arguments.out}.")
    made = [_make(arguments, name, plan, material) for name, plan in plans.items()]
    if arguments.json:
        say(json.dumps([_entry(item) for item in made], ensure_ascii=False, indent=1))
    else:
        _say(made)
    return 0


_Plan = Callable[[argparse.Namespace, Material, _Made], None]


def _material(arguments: argparse.Namespace) -> Material:
    if arguments.comfy is None and not arguments.sources:
        raise SettingsError("Nothing to convert was named: give files, a folder, or --comfy PATH.")
    folders = comfy_folders(comfy_models(arguments.comfy)) if arguments.comfy is not None else []
    return gather([*arguments.sources, *folders])


def _plans(arguments: argparse.Namespace, material: Material) -> dict[str, _Plan]:
    """What can be made of the material, by the file's name."""
    plans: dict[str, _Plan] = {}
    if material.ram:
        stem = "ram" if arguments.no_adapter else "dape"
        plans[f"{stem}{'-int8' if arguments.int8 else ''}.safetensors"] = _make_tagger
    if material.seesr:
        plans["seesr.safetensors"] = _make_control
    return plans


def _make(arguments: argparse.Namespace, name: str, plan: _Plan, material: Material) -> _Made:
    made = _Made(target=_target(arguments, name))
    if made.target.exists() and not arguments.overwrite:
        made.notes.append("exists already and was left as it is (--overwrite replaces it)")
        return made
    meter = Meter(torch.device("cpu"))
    with meter.phase("convert"):
        plan(arguments, material, made)
    made.seconds, made.peak = meter.phases[0].seconds, meter.phases[0].peak_bytes
    return made


def _target(arguments: argparse.Namespace, name: str) -> Path:
    if arguments.out is not None:
        out: Path = arguments.out
        return out if out.suffix == ".safetensors" else out / name
    if arguments.comfy is not None:
        kind = "seesr" if name.startswith("seesr") else "dape"
        return comfy_models(arguments.comfy) / kind / name
    first: Path = arguments.sources[0]
    return (first if first.is_dir() else first.parent) / name


def _make_tagger(arguments: argparse.Namespace, material: Material, made: _Made) -> None:
    ram, adapter, lists = material.only("ram"), material.only("adapters"), material.only("tag_lists")
    if lists is None or ram is None:
        raise WeightsError(
            f"{ram} needs RAM's tag lists: get them with `python -m seesr_core download --what dape` and name their "
            "folder, too."
        )
    if adapter is None and not arguments.no_adapter:
        raise WeightsError(
            f"{ram} is plain RAM and no DAPE adapter was named: name DAPE.pth, too "
            "(`python -m seesr_core download --what dape`), or give --no-adapter for RAM as it is."
        )
    made.inputs = [path for path in (ram, None if arguments.no_adapter else adapter) if path is not None]
    with progress_bar(f"writing {made.target.name}") as progress:
        job = TaggerJob(
            weights=ram,
            adapter=None if arguments.no_adapter else adapter,
            tag_lists=lists,
            target=made.target,
            dtype=_DTYPES[arguments.dtype],
            int8=arguments.int8,
            progress=progress,
        )
        original, vocabulary = job.run()
    if arguments.int8 or arguments.photos is not None:
        change = tag_change(original, read_dape(made.target)[0], vocabulary, _photos(arguments.photos))
        made.notes.append(f"change in tags {change}")
        made.details["change_in_tags"] = asdict(change)


def _photos(path: Path | None) -> list[Path]:
    if path is None:
        return [_EXAMPLE]
    return list_photos(path)[0] if path.is_dir() else [path]


def _make_control(arguments: argparse.Namespace, material: Material, made: _Made) -> None:
    folder = material.only("seesr")
    assert folder is not None  # _plans has seen it
    base = arguments.base or (None if arguments.unchecked else material.only("bases"))
    if base is None and not arguments.unchecked:
        raise WeightsError(
            f"{folder} holds a copy of Stable Diffusion 2-base that is compared before it is dropped, and no base was "
            "found: name it with --base (`python -m seesr_core download --what base`), or give --unchecked."
        )
    with progress_bar(f"converting {folder}") as progress:
        job = ControlJob(
            folder=folder,
            target=made.target,
            base=base,
            dtype=_DTYPES[arguments.dtype],
            progress=progress,
        )
        made.inputs = list(job.files().values())
        check = job.run()
    made.notes.append(f"the dropped U-Net {check or 'was not compared with a base'}")
    if check is not None:
        made.details["base"] = {
            "path": str(check.base),
            "tensors": check.tensors,
            "identical": check.identical,
            "equal_when_rounded": check.rounded,
            "largest_difference": check.largest,
            "largest_difference_in": check.largest_key,
            "relative_difference": check.relative,
        }


def _nothing(material: Material) -> str:
    if material.refused:
        return next(iter(material.refused.values()))
    others = [f"{path} looks like {label}" for path, label in list(material.others.items())[:3]]
    found = f" ({'; '.join(others)})" if others else ""
    return (
        f"Found nothing to convert{found}: expected ram_swin_large_14m.pth with DAPE.pth and the tag lists, or the "
        "published folder with `unet` and `controlnet` inside. Get them with `python -m seesr_core download`."
    )


def _say(made: list[_Made]) -> None:
    rows = []
    for item in made:
        before = size_text(_bytes(item.inputs)) if item.inputs else "-"
        after = size_text(_bytes([item.target]))
        peak = gigabytes(item.peak) if item.peak else "-"
        rows.append((str(item.target), before, after, f"{item.seconds:.1f} s", peak))
    say_table(("file", "before", "after", "time", "peak memory"), rows)
    for item in made:
        for note in item.notes:
            say(f"{item.target.name}: {note}")


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _entry(item: _Made) -> dict[str, Any]:
    return {
        "path": str(item.target),
        "inputs": [str(path) for path in item.inputs],
        "bytes_before": _bytes(item.inputs),
        "bytes_after": _bytes([item.target]),
        "seconds": item.seconds,
        "peak_bytes": item.peak,
        "notes": item.notes,
        **item.details,
    }

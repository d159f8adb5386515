"""`doctor`: is everything there and right, and will it fit?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import SettingsError, WeightsError
from ..formats.detect import Kind
from ..formats.metadata import field
from ..formats.tensorfile import read_header
from ..install.doctor import (
    NOTE,
    OK,
    PROBLEM,
    Doctor,
    Finding,
    ModelFile,
    judge_disk,
    judge_environment,
    judge_host,
)
from ..install.environment import look_around, look_at_host
from ..install.inspection import as_json
from ..install.places import Target
from ..model_files import NANO, NANO_FOLDER
from ..runtime import cost
from ..runtime.devices import AUTO, choose_device, choose_dtype
from ..settings import UpscaleSettings
from .console import say
from .tables import bytes_bar

_FULL_CHANNELS = 320


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = (
        "Look at Python, torch, device, memory, ComfyUI and every weights file; say what is missing, wrong "
        "or too large, with the command that mends it; predict memory and time. Exit status 1 if anything is wrong."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--to", "--model", type=Path, metavar="DIR", help="folder of weights (default: the embedded)")
    where.add_argument("--comfy", type=Path, metavar="PATH", help="ComfyUI's folder")
    parser.add_argument("--size", default="512x512", metavar="WxH", help="photo to predict memory and time for")
    parser.add_argument("--scale", type=float, metavar="X", help="result size over photo size (4)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps (the model's own)")
    parser.add_argument("--tile", type=int, metavar="PX", help="side of a denoised tile (768)")
    parser.add_argument("--card", metavar="NAME", help="predict for this graphics card, such as 'RTX 3060'")
    parser.add_argument("--quick", action="store_true", help="do not hash the files")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    target = _target(arguments)
    doctor = Doctor(target=target, hashed=not arguments.quick, bar=bytes_bar)
    environment = look_around()
    files = doctor.files()
    findings = judge_environment(environment, needs_command_line=arguments.comfy is None)
    if arguments.comfy is not None:
        findings += judge_host(look_at_host(target.root))
    findings += [*judge_disk(target.root), *doctor.findings(files)]
    prediction = _predict(arguments, files)
    findings.append(_judge(prediction))
    if arguments.json:
        say(json.dumps(_report(asdict(environment), files, findings, prediction), ensure_ascii=False, indent=1))
    else:
        _say(findings)
    return 1 if any(finding.level == PROBLEM for finding in findings) else 0


def _target(arguments: argparse.Namespace) -> Target:
    if arguments.comfy is not None:
        return Target.comfy(arguments.comfy)
    named = arguments.to is not None and str(arguments.to) != NANO
    return Target.folder(arguments.to if named else NANO_FOLDER)


def _predict(arguments: argparse.Namespace, files: list[ModelFile]) -> cost.Prediction:
    """Predict for the largest model among the files, since that is the question; without any, for the published one."""
    control = [entry.seen for entry in files if entry.seen and entry.kind == Kind.CONTROL.value]
    small = [seen for seen in control if seen.sizes.get("channels") != _FULL_CHANNELS]
    shape = cost.NANO if small and len(small) == len(control) else cost.FULL
    defaults = _defaults(small[0].path) if shape is cost.NANO else {}
    given = {name: getattr(arguments, name) for name in ("scale", "steps", "tile")}
    settings = UpscaleSettings.for_model(
        defaults, **{name: value for name, value in given.items() if value is not None}
    )
    place = choose_device(AUTO)
    device = cost.this_device(place, choose_dtype(AUTO, place)) if arguments.card is None else cost.card(arguments.card)
    return cost.predict(shape, _size(arguments.size), settings, device)


def _defaults(path: Path) -> Mapping[str, Any]:
    """The sampling defaults of a SeeSR file; none where they cannot be used, of which loading it will tell."""
    try:
        found: dict[str, Any] = field(path, read_header(path).metadata, "defaults", dict, {})
        UpscaleSettings.for_model(found)
    except (SettingsError, WeightsError):
        return {}
    return found


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise SettingsError(f"The size must be like 640x480, not {text!r}.")
    return int(width), int(height)


def _judge(found: cost.Prediction) -> Finding:
    text = found.text()
    if found.fits:
        return Finding(level=OK, text=f"{text}.")
    mend = "a smaller --tile, a smaller --scale, or `--model nano`"
    level = PROBLEM if found.device.kind == "cpu" else NOTE
    extra = "too much for it" if level == PROBLEM else "too much to be there at once: ComfyUI moves parts in and out"
    return Finding(level=level, text=f"{text}: {extra}.", mend=mend)


def _say(findings: list[Finding]) -> None:
    for finding in findings:
        say(f"{finding.level:<9}{finding.text}")
        if finding.mend:
            say(f"{'':<9}→ {finding.mend}")
    counts = {level: sum(finding.level == level for finding in findings) for level in (OK, NOTE, PROBLEM)}
    say(f"{counts[PROBLEM]} problems, {counts[NOTE]} notes.")


def _report(
    environment: dict[str, Any], files: list[ModelFile], findings: list[Finding], prediction: cost.Prediction
) -> dict[str, Any]:
    return {
        "environment": environment,
        "files": [
            as_json(entry.seen) if entry.seen else {"path": str(entry.path), "error": entry.error} for entry in files
        ],
        "findings": [asdict(finding) for finding in findings],
        "prediction": {
            "model": prediction.model,
            "device": prediction.device.name,
            "sizes": asdict(prediction.sizes),
            "steps": prediction.steps,
            "tiles": prediction.tiles,
            "seconds": prediction.seconds,
            "bytes": prediction.bytes,
            "device_bytes": prediction.device.memory,
            "fits": prediction.fits,
        },
    }

"""What is missing, wrong or too large in an installation, in sentences, each with the command that mends it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import WeightsError
from ..formats.detect import Kind
from ..formats.sources import TAG_LISTS
from ..runtime.files import pass_over
from ..runtime.memory import gigabytes
from .environment import (
    COMMAND_LINE,
    OLDEST_HOST,
    OLDEST_PYTHON,
    OLDEST_TORCH,
    Environment,
    Host,
    as_numbers,
    free_disk,
)
from .gather import SUFFIXES
from .hashing import Progress
from .inspection import Inspection, damage, inspect_file
from .ledger import LEDGER, Ledger
from .manifest import COMFY, Asset, RemoteFile, load_manifest
from .places import Target, extra_folders

OK, NOTE, PROBLEM = "ok", "note", "problem"
_DEPTH = 4
_BASE = "base"
_PARTS = {"checkpoints": _BASE, "dape": "tagger", "seesr": "control"}
"""The host's model folders that matter, and the part of a model each holds."""
_ADAPTERS = (Kind.DAPE_LORA.value, Kind.DAPE_PEFT.value)
_PAIR = {Kind.SEESR_UNET.value, Kind.SEESR_CONTROLNET.value}
_BASES = (Kind.BASE.value, Kind.SD2.value, Kind.UNET.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One sentence."""

    level: str
    """`ok`, `note` or `problem`."""
    text: str
    """What was found."""
    mend: str = ""
    """The command that helps."""


@dataclass(kw_only=True, slots=True)
class ModelFile:
    """One weights file of the installation."""

    path: Path
    """Path of the file."""
    part: str = ""
    """The part of a model that its folder is for; empty text in a folder for everything."""
    seen: Inspection | None = None
    """What the file is; None if it cannot be read."""
    error: str = ""
    """Why the file cannot be read; empty if it can."""

    @property
    def kind(self) -> str:
        """The file's kind, or empty text if it cannot be read."""
        return self.seen.kind if self.seen else ""


@dataclass(kw_only=True, slots=True)
class Doctor:
    """An examination of one place that should hold weights."""

    target: Target
    """The folder that is judged."""
    hashed: bool = True
    """Whether files are hashed, which reads all of them."""
    bar: Callable[[str], AbstractContextManager[Progress]] = lambda name: nullcontext(lambda done, total: None)
    """Makes a progress bar for the hashing of a file."""
    assets: dict[str, Asset] = field(default_factory=load_manifest)
    """What could be downloaded."""

    def files(self) -> list[ModelFile]:
        """Every weights file, looked at; of the host's checkpoints only those of SeeSR's kind, or broken."""
        found = []
        for root, part in self._roots():
            for path in _weights_below(root):
                entry = self._look(path, part)
                foreign = entry.seen is not None and not (entry.seen.usable or entry.seen.prediction == "v")
                if not (foreign and part == _BASE):
                    found.append(entry)
        return found

    def findings(self, files: list[ModelFile]) -> list[Finding]:
        """Judgements on the files, and on what is missing among them."""
        if not self.target.root.is_dir():
            return [self._missing_all()]
        judged = [finding for entry in files for finding in self._judge(entry)]
        return [*judged, *self._roles(files), *self._fit(files)]

    def _roots(self) -> Iterator[tuple[Path, str]]:
        """Folders to search, with the part that each is for."""
        if not self._comfy:
            yield self.target.root, ""
            return
        for kind, part in _PARTS.items():
            for folder in (self.target.root / kind, *extra_folders(self.target.root, kind)):
                yield folder, part

    @property
    def _comfy(self) -> bool:
        return self.target.layout == COMFY

    def _look(self, path: Path, part: str) -> ModelFile:
        try:
            seen = inspect_file(path)
            if self.hashed and (seen.usable or part != _BASE):
                with self.bar(f"hashing {path.name}") as progress:
                    seen = inspect_file(path, hashed=True, progress=progress)
            return ModelFile(path=path, part=part, seen=seen)
        except WeightsError as error:
            return ModelFile(path=path, part=part, error=str(error))

    def _judge(self, entry: ModelFile) -> Iterator[Finding]:
        known = self._remote(entry.path)
        if entry.seen is None:
            yield Finding(level=PROBLEM, text=entry.error, mend=self._fetch(known[0]) if known else "")
            return
        yield self._judge_seen(entry.path, entry.part, entry.seen, known)

    def _judge_seen(self, path: Path, part: str, seen: Inspection, known: tuple[str, RemoteFile] | None) -> Finding:
        if text := self._damage(path, seen, known[1] if known else None):
            return Finding(level=PROBLEM, text=text, mend=self._fetch(known[0]) if known else "")
        if not seen.usable:
            level = NOTE if part == _BASE else PROBLEM
            mend = self._fetch(_MENDS.get(seen.kind, "base" if seen.prediction else ""))
            return Finding(level=level, text=f"{path} is {seen.label}; it fits {seen.fits}.", mend=mend)
        name = f" (the published {seen.known_as})" if seen.known_as else ""
        return Finding(level=OK, text=f"{path}: {seen.label}{name}, {gigabytes(seen.bytes)}.")

    def _damage(self, path: Path, seen: Inspection, published: RemoteFile | None) -> str:
        """Why a file is not what was published, downloaded or written; empty if nothing speaks against it."""
        if published and published.size not in (None, seen.bytes):
            return f"{path} has {seen.bytes:,} bytes: the published file has {published.size:,}."
        if not seen.sha256:
            return ""
        if published and published.sha256 not in (None, seen.sha256):
            return f"{path} has another sha256 than the published file, though the same size: it is damaged or changed."
        noted = Ledger(self.target.root).find(path)
        if noted and noted.sha256 != seen.sha256:
            return f"{path} has another sha256 than {LEDGER} noted when it came: it is damaged or changed."
        return damage(path) if seen.undamaged is False else ""

    def _roles(self, files: list[ModelFile]) -> Iterator[Finding]:
        yield from self._tagger(files)
        yield from self._control(files)
        if not any(entry.kind in _BASES and entry.seen and entry.seen.usable for entry in files):
            yield self._missing("base model", "base")

    def _tagger(self, files: list[ModelFile]) -> Iterator[Finding]:
        if any(entry.kind == Kind.DAPE.value for entry in files):
            return
        ram = next((entry for entry in files if entry.kind == Kind.RAM.value), None)
        if ram is None:
            yield self._missing("tagger", "ram dape")
            return
        folder = ram.path.parent
        if not any(entry.kind in _ADAPTERS for entry in files):
            text = f"{ram.path} is plain RAM and there is no DAPE adapter beside it."
            yield Finding(level=PROBLEM, text=text, mend=self._fetch("dape"))
        elif not all((folder / name).is_file() for name in TAG_LISTS[:2]):
            text = f"{folder} has RAM but not its tag lists."
            yield Finding(level=PROBLEM, text=text, mend=self._fetch("dape"))
        else:
            text = f"{ram.path} works as it is; converted it takes a tenth of the room."
            yield Finding(level=NOTE, text=text, mend=self._convert())

    def _control(self, files: list[ModelFile]) -> Iterator[Finding]:
        kinds = {entry.kind for entry in files}
        if Kind.CONTROL.value in kinds:
            return
        missing = _PAIR - kinds
        if not missing:
            text = "The published SeeSR folder works as it is; converted it takes less than half of the room."
            yield Finding(level=NOTE, text=text, mend=self._convert())
        elif len(missing) == 1:
            text = f"{self.target.root} has only one half of SeeSR: the {missing.pop()} is missing."
            yield Finding(level=PROBLEM, text=text, mend=self._fetch("seesr"))
        else:
            yield self._missing("SeeSR file", "seesr")

    def _fit(self, files: list[ModelFile]) -> Iterator[Finding]:
        """Every SeeSR file needs a base of its own sizes."""
        bases = [entry.seen for entry in files if entry.seen and entry.kind in _BASES and entry.seen.usable]
        have = {(seen.sizes.get("channels"), seen.sizes.get("context_dim")) for seen in bases}
        for entry in files:
            if entry.seen is not None and entry.kind == Kind.CONTROL.value and have:
                wants = (entry.seen.sizes.get("channels"), entry.seen.sizes.get("context_dim"))
                if wants not in have:
                    text = f"{entry.path} has no base model that fits: it needs first channels and text width {wants}."
                    mend = self._fetch("base") if wants == (320, 1024) else ""
                    yield Finding(level=PROBLEM, text=text, mend=mend)

    def _missing(self, what: str, asset: str) -> Finding:
        return Finding(level=PROBLEM, text=f"There is no {what} in {self.target.root}.", mend=self._fetch(asset))

    def _missing_all(self) -> Finding:
        text = f"{self.target.root} does not exist."
        return Finding(level=PROBLEM, text=text, mend=f"python -m seesr_core download {self.target.argument}")

    def _remote(self, path: Path) -> tuple[str, RemoteFile] | None:
        """What the manifest says of the file that belongs at `path`, or of one with such a telling name."""
        for name, asset in self.assets.items():
            for file, place in self.target.files(asset):
                if place == path or (file.size is not None and place.name == path.name):
                    return name, file
        return None

    def _fetch(self, assets: str) -> str:
        return f"python -m seesr_core download --what {assets} {self.target.argument}" if assets else ""

    def _convert(self) -> str:
        where = f"--comfy {self.target.root.parent}" if self._comfy else str(self.target.root)
        return f"python -m seesr_core convert {where}"


def _weights_below(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root, onerror=pass_over):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if len(Path(folder).relative_to(root).parts) >= _DEPTH:
            names.clear()
        yield from (Path(folder) / name for name in sorted(files) if Path(name).suffix in SUFFIXES)


_MENDS = {
    Kind.RAM_PLUS.value: "ram",
    Kind.TAG2TEXT.value: "ram",
    Kind.SD1.value: "base",
    Kind.SD2.value: "base",
    Kind.SDXL.value: "base",
    Kind.UNET.value: "base",
    Kind.CONTROLNET.value: "seesr",
    Kind.LDM_CONTROLNET.value: "seesr",
}
"""What a file was probably meant to be."""


def judge_environment(found: Environment, *, needs_command_line: bool = True) -> list[Finding]:
    """Python, torch and packages."""
    findings = [
        Finding(
            level=OK,
            text=f"seesr {found.version}, Python {found.python} on {found.system}, torch {found.torch}, device "
            f"{found.device} ({found.dtype}), {_memory(found)}.",
        )
    ]
    if as_numbers(found.python) < OLDEST_PYTHON:
        text = f"Python {found.python} is too old: expected {'.'.join(map(str, OLDEST_PYTHON))} or newer."
        findings.append(Finding(level=PROBLEM, text=text))
    if as_numbers(found.torch) < OLDEST_TORCH:
        text = f"torch {found.torch} is too old: expected {'.'.join(map(str, OLDEST_TORCH))} or newer."
        findings.append(Finding(level=PROBLEM, text=text, mend="pip install --upgrade torch"))
    missing = [name for name, version in found.packages.items() if not version]
    extras = [name for name in missing if name in COMMAND_LINE]
    for names, level, mend in (
        ([name for name in missing if name not in COMMAND_LINE], PROBLEM, "pip install comfyui-seesr"),
        (extras, PROBLEM if needs_command_line else NOTE, "pip install 'comfyui-seesr[cli]'"),
    ):
        if names:
            purpose = "the command line needs" if names is extras else "everything needs"
            findings.append(Finding(level=level, text=f"{', '.join(names)}, which {purpose}, is missing.", mend=mend))
    return findings


def judge_host(host: Host) -> list[Finding]:
    """The ComfyUI installation itself."""
    oldest = ".".join(map(str, OLDEST_HOST))
    plugins = f"the plugin is in {', '.join(map(str, host.plugins))}" if host.plugins else ""
    if not host.version:
        text = f"{host.root} states no ComfyUI version: a base directory, or no ComfyUI."
        findings = [Finding(level=NOTE, text=text)]
    elif as_numbers(host.version) < OLDEST_HOST:
        text = f"ComfyUI {host.version} in {host.root} is too old: expected {oldest} or newer."
        findings = [Finding(level=PROBLEM, text=text, mend=f"git -C {host.root} pull")]
    else:
        findings = [Finding(level=OK, text=f"ComfyUI {host.version} in {host.root}{'; ' if plugins else ''}{plugins}.")]
    if host.version and not host.plugins:
        text = f"The plugin is not in {host.root / 'custom_nodes'}."
        project = Path(__file__).resolve().parents[2]
        mend = f"ln -s {project} {host.root / 'custom_nodes' / 'comfyui-seesr'}"
        findings.append(Finding(level=PROBLEM, text=text, mend=mend))
    return findings


def judge_disk(folder: Path) -> list[Finding]:
    """Room where weights would go."""
    free = free_disk(folder)
    if free is None:
        return []
    return [Finding(level=OK, text=f"{gigabytes(free)} are free on the disk of {folder}.")]


def _memory(found: Environment) -> str:
    main = "unknown memory" if found.memory is None else f"{gigabytes(found.memory)} of memory free"
    return main if found.device_memory is None else f"{main}, {gigabytes(found.device_memory)} on the device"

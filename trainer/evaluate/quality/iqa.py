"""The metrics as pyiqa (github.com/chaofengc/IQA-PyTorch) computes them, if it is installed and loads.

pyiqa fetches the weights of a metric by itself when they are first used; what cannot be had is told, not replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.pictures.sizes import from_u8

from ...data.fingerprints import digest
from .metrics import Facts, Metric, Outcome

log = logging.getLogger(__name__)

_RGB = "RGB in [0, 1]"
_STUDIO = "Y of YCbCr, BT.601 studio range (16-235)"
_FACTS: Mapping[str, Facts] = {
    "psnr_y": Facts(build="", colour=f"{_STUDIO}, not rounded", remark="identical pictures count as 80 dB"),
    "ssim_y": Facts(build="", colour=f"{_STUDIO}, rounded", remark="Gaussian window 11×11, σ 1.5, whole windows only"),
    "lpips": Facts(build="", colour="RGB in [-1, 1]", remark="AlexNet, version 0.1"),
    "dists": Facts(build="", colour=_RGB),
    "fid": Facts(build="", colour=_RGB, resize="PIL bicubic to 299² (clean-fid)", remark="Inception, 2048 features"),
    "niqe": Facts(
        build="",
        colour="Y of YIQ (0-255), rounded",
        resize="second scale: MATLAB-like bicubic by half",
        remark="cut to whole blocks of 96×96 from the top left",
    ),
    "maniqa": Facts(build="", colour=_RGB, remark="trained on PIPAL; mean over 20 even crops of 224²"),
    "musiq": Facts(build="", colour=_RGB, resize="also to longer sides 384 and 224", remark="trained on KonIQ-10k"),
    "clipiqa": Facts(build="", colour=_RGB, remark="CLIP RN50"),
}


@lru_cache(maxsize=1)
def load_pyiqa() -> tuple[Any, str]:
    """pyiqa, or None and why it does not load."""
    try:
        with _quiet():
            return importlib.import_module("pyiqa"), ""
    except ModuleNotFoundError as error:
        return None, "pyiqa is not installed" if error.name == "pyiqa" else f"pyiqa lacks {error.name}"
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # A torchvision of another torch fails with RuntimeError when its operators are registered.
        return None, f"pyiqa does not load ({_first_line(error)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class PyiqaBuild:
    """A metric of pyiqa's, of pictures or of a set."""

    facts: Facts
    """Facts of how the metric is computed."""
    metric: Any
    """pyiqa's module."""

    def measure(self, pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> list[Outcome]:
        """See `Build`: all at once, or one by one where that fails."""
        try:
            values = self._scores(pictures, originals)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if len(pictures) == 1:
                return [Outcome(None, _first_line(error))]
            return [self.measure(pictures[i : i + 1], originals[i : i + 1])[0] for i in range(len(pictures))]
        return [_finite(value) for value in values]

    def _scores(self, pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> list[float]:
        batches = [from_u8(torch.stack(list(images))) for images in (pictures, originals) if images]
        with _quiet(), torch.no_grad():
            return self.metric(*batches).double().flatten().tolist()

    def measure_set(self, pictures: Path, originals: Path) -> Outcome:
        """See `SetBuild`."""
        try:
            with _quiet(), torch.no_grad():
                value = self.metric(str(pictures), str(originals), num_workers=0, verbose=False)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            return Outcome(None, _first_line(error))
        return _finite(float(value))


def pyiqa_build(metric: Metric, device: torch.device) -> PyiqaBuild | str:
    """The metric, or why it cannot be computed here."""
    if not metric.pyiqa:
        return "pyiqa lacks it"
    pyiqa, why = load_pyiqa()
    if pyiqa is None:
        return why
    try:
        with _quiet():
            module = pyiqa.create_metric(metric.pyiqa, device=device, **metric.pyiqa_options)
    except Exception as error:  # whatever goes wrong in there is the reason to be told
        return f"pyiqa cannot make {metric.pyiqa} ({_first_line(error)})"
    version = importlib.metadata.version("pyiqa")
    facts = replace(_FACTS[metric.key], build=f"pyiqa {version} {metric.pyiqa}", weights=_weights(module.net))
    return PyiqaBuild(facts=facts, metric=module)


def _weights(net: nn.Module) -> str:
    """Short hash of every parameter, also of those that are kept out of the module's state."""
    found = dict(_tensors(net))
    if not found:
        return "none"
    return digest(found[name].detach().float().cpu().numpy().tobytes() for name in sorted(found))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.state_dict().items()
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value
        for index, part in enumerate(value if isinstance(value, list | tuple) else ()):
            if isinstance(part, nn.Module):
                yield from ((f"{name}.{index}.{key}", tensor) for key, tensor in part.state_dict().items())


def _finite(value: float) -> Outcome:
    return (
        Outcome(value)
        if math.isfinite(value)
        else Outcome(None, "not a finite number, as for pictures without texture")
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """pyiqa reports on standard output, which is for tables."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

"""The degradation against the recorded numbers of the published implementation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from trainer.degradation import DegradationConfig

from .golden import golden_dir
from .parity.groups.degradation import RecordedDraws, ReplayError, cases, config_from


def test_every_recorded_case_is_within_tolerance() -> None:
    comparisons = list(cases(golden_dir(), full=False))
    assert {"usm", "filter2D", "poisson_mixed", "jpeg.q60", "run0"} <= {comparison.case for comparison in comparisons}
    assert [comparison.line() for comparison in comparisons if not comparison.ok] == []


def test_the_defaults_are_the_published_settings() -> None:
    folder = golden_dir() / "degradation"
    constants = json.loads((folder / "constants.json").read_text(encoding="utf-8"))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert config_from(constants, meta["ops"]["usm"]) == DegradationConfig()


def test_a_replay_refuses_what_was_not_recorded() -> None:
    entries: list[dict[str, Any]] = [
        {"random.uniform": [0.15, 1], "result": 0.5},
        {"draw": "draw01_randn", "shape": [2, 3]},
    ]
    tensors = {"run.draw01_randn": torch.zeros(2, 3)}
    draws = RecordedDraws(entries, tensors, "run.")
    assert draws.uniform(0.15, 1.0) == 0.5
    with pytest.raises(ReplayError, match=r"draw 1: asked with \[3, 2\], recorded with \[2, 3\]"):
        draws.normal((3, 2))
    with pytest.raises(ReplayError, match="the recording ends here"):
        draws.chance(0.5)
    with pytest.raises(ReplayError, match=r"draw 0: asked for random\.random"):
        RecordedDraws(entries, tensors, "run.").chance(0.5)
    with pytest.raises(ReplayError, match=r"draw 0: asked with \[0.2, 1\]"):
        RecordedDraws(entries, tensors, "run.").uniform(0.2, 1)

"""U-Net and ControlNet through the host against the published implementation's numbers."""

from __future__ import annotations

import pytest

from ..golden import golden_dir
from ..parity.__main__ import run


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_within_tolerance(full: bool) -> None:
    comparisons = list(run(golden_dir(), ("unet_controlnet",), full=full, backend="host"))
    assert len(comparisons) > 100
    assert not [comparison.line() for comparison in comparisons if not comparison.ok]


def test_groups_that_a_host_does_not_compute_are_left_out() -> None:
    assert not list(run(golden_dir(), ("color_fix", "losses"), backend="host"))

"""Recorded runs of the published implementation, sampled by the nodes: `python -m tests.parity DIR --backend host`."""

from __future__ import annotations

import pytest

from ..golden import golden_dir
from ..parity.compare import Comparison
from ..parity.groups.pipeline import input_set
from ..parity.host import pipeline


@pytest.fixture(scope="module")
def fixture() -> pipeline.Fixture:
    return pipeline.Fixture.load(golden_dir())


def assert_all(comparisons: list[Comparison], *quantities: str) -> None:
    assert set(quantities) <= {comparison.quantity for comparison in comparisons}
    assert [comparison.line() for comparison in comparisons if not comparison.ok] == []


def test_tables_and_grids(fixture):
    tables = [*pipeline.schedule_cases(fixture), *pipeline.grid_cases(fixture)]
    assert_all(tables, "timesteps", "alphas_cumprod_samples", "fixed_small_variance", "tile_offsets", "tile_weights")


def test_a_short_run(fixture):
    assert_all([*pipeline.run_cases(fixture, "lr_2_g1.0_turbo")], "unet_input_step00", "eps_guided_step00", "final")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lr_2_g5.5", "lr_10_g5.5_start500", "tiledthin_lr_4_g5.5"])
def test_guided_and_tiled_runs(fixture, name):
    assert_all([*pipeline.run_cases(fixture, name)], "eps_guided_step00", "final")


def test_another_start_is_told_apart(fixture, monkeypatch):
    """The comparison sees what it should: half as much of the recorded start noise is another run."""
    case = input_set(fixture, "lr_2_g1.0_turbo")
    monkeypatch.setitem(fixture.inputs, f"{case}.noise0", 0.5 * fixture.inputs[f"{case}.noise0"])
    failing = {c.quantity for c in pipeline.run_cases(fixture, "lr_2_g1.0_turbo") if not c.ok}
    assert {"unet_input_step00", "final"} <= failing

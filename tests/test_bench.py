"""The benchmark: its loops do the same, and its figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.capacity.bench import PHASES, BenchCommand, bench, main


def test_the_loops_have_the_same_losses_and_their_shares_are_shares(tmp_path: Path) -> None:
    options = BenchCommand(steps=1, batch_size=2, crop=64, json=tmp_path / "bench.json")
    found = bench(options)
    assert found["ours"].losses == pytest.approx(found["plain"].losses, rel=1e-3)
    for loop in found.values():
        assert set(loop.shares) == set(PHASES)
        assert 0 < sum(loop.shares.values()) <= 1
        assert loop.images_per_second > 0
        assert 0 <= loop.waiting < 1
    assert found["plain"].times_plain == 1
    assert found["plain"].shares["degradation"] > 0
    assert found["cached"].shares["degradation"] == found["cached"].shares["data"] == 0
    written = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert written["loops"]["plain"]["losses"] == found["plain"].losses


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--size", "huge"])
    assert "nano" in capsys.readouterr().err

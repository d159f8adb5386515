"""What the benchmark's figures promise without a clock: they are counted in fresh processes, as its command does."""

from __future__ import annotations

import sys

import pytest
import torch

from tools.bench import host, processes
from tools.bench.case import PHASES, Case

from .locate import plugin
from .nets import nano_model
from .test_latent import nano_vae


def test_import_is_quick_and_opens_no_connection() -> None:
    """Sockets are blocked in that process; processor time, since other work on the machine is not the plugin's."""
    assert processes.part("start")["busy"] <= 0.5


def test_a_whole_row_of_the_host() -> None:
    row, why = processes.row(Case(side=128, tile=64, steps=3), patience=600)
    assert (why, row.done, row.device) == ("", True, "cpu")
    assert set(row.phases) == set(PHASES)
    tiles = 3 * 3
    assert row.calls == {"unet": 3 * tiles, "controlnet": 3 * tiles}
    assert row.latents == {"unet": 2 * 3 * tiles, "controlnet": 2 * 3 * tiles}, "both prompts share a call"
    assert sum(row.shares().values()) == pytest.approx(1)


def test_three_passes_are_the_hosts_own_tilers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, vae = plugin("nodes.host.vae"), nano_vae()
    for name, value in {"encode_tiled": None, "decode_tiled": None, "LARGE_PIXELS": 0, "TILE_PX": 512}.items():
        monkeypatch.setattr(module, name, value)
    host._use_the_hosts_tilers()
    image = torch.rand(1, 576, 640, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        z = module.encode_image(nano_model(), vae, image)
        assert torch.equal(z, vae.encode_tiled(image, tile_x=512, tile_y=512, overlap=128))
        assert torch.equal(module.decode_latent(vae, z), vae.decode_tiled(z, tile_x=64, tile_y=64, overlap=16))


def test_what_goes_wrong_in_a_row_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "raise MemoryError('no more')"]
    monkeypatch.setattr(processes, "command", lambda *_: failing)
    row, why = processes.row(Case(side=64, tile=64), patience=60)
    assert (row.done, why) == (False, "MemoryError: no more")


def test_a_row_of_sampling_alone_in_half_precision() -> None:
    row, _ = processes.row(Case(side=64, alone=True, dtype="bf16", steps=1), patience=600)
    assert row.done
    assert set(row.phases) == {"sample"}
    assert sys.maxsize > row.sampling.peak_mib > 0

"""The plugin's own parts of a run on a device that is not there: nothing is left on the CPU by mistake."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ..dape_nets import CONFIG
from ..fake_device import FakeDevice, Watch
from . import nets
from .locate import plugin

DEVICES = {"cuda:0": torch.float16, "mps:0": torch.float32, "xpu:0": torch.bfloat16}
"""And the precision that is tried on each."""


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(request.param)


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's attention asks for it; there is no such device to ask."""

    def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        return (2**30, 2**30) if torch_free_too else 2**30

    monkeypatch.setattr("comfy.model_management.get_free_memory", get_free_memory)


def dtype(place: FakeDevice) -> torch.dtype:
    return DEVICES[str(place.device)]


def check(watch: Watch) -> None:
    assert watch.calls > 0
    assert not watch.missing


def there(place: FakeDevice, *shape: int) -> Tensor:
    return place.tensor(torch.zeros(*shape), dtype(place))


def test_controlnet_and_its_rca(place: FakeDevice) -> None:
    """The soft prompt lies on the CPU, as the node gave it."""
    network = place.module(copy.deepcopy(nets.nano_seesr().control.control_model), dtype(place))
    inputs, channels = nets.nano_inputs(size=8), nets.LATENT_CHANNELS
    text = inputs["negative"][0][0].shape[-1]
    with place.watched() as watch, torch.no_grad():
        found = network(
            x=there(place, 2, channels, 8, 8),
            hint=there(place, 2, 3, 64, 64),
            timesteps=there(place, 2),
            context=there(place, 2, 77, text),
            soft_prompt=inputs["soft_prompt"],
        )
    assert {residual.device for residuals in found.values() for residual in residuals} == {place.device}
    check(watch)


def test_rca_in_the_unet(place: FakeDevice) -> None:
    """Through the wrapper around the U-Net's call."""
    rca, inputs = plugin("nodes.host.rca"), nets.nano_inputs(size=8)
    placed = place.module(copy.deepcopy(nets.nano_seesr().rca.patcher.model), dtype(place))
    unet = copy.deepcopy(nets.nano_model().model.diffusion_model)
    patch = rca.RCAPatch(
        weights=SimpleNamespace(on=lambda device: placed),
        tokens_BLD=inputs["soft_prompt"],
        strength=1.0,
        percent=(0.0, 1.0),
        by_hooks=True,
    )
    place.module(unet, dtype(place))
    unet.dtype = dtype(place)
    executor = Executor(unet)
    x, context = there(place, 2, nets.LATENT_CHANNELS, 8, 8), there(place, 2, 77, inputs["negative"][0][0].shape[-1])
    run = rca.Run(window=(torch.inf, 0.0))
    with place.watched() as watch, torch.no_grad():
        found = patch.around_unet(executor, x, there(place, 2), context, transformer_options={rca.KEY: run})
    assert (found.device, found.shape, run.reached) == (place.device, x.shape, True)
    check(watch)


class Executor:
    """What the host hands to wrappers of the U-Net's call."""

    def __init__(self, unet: Any) -> None:
        self.class_obj = unet

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.class_obj._forward(*args, **kwargs)
        return found


def test_tiles(place: FakeDevice) -> None:
    """Texts and the hint are cut where they lie, and the blend is made on the device.

    Without masks and areas: whether one is empty in a tile is read from the device.
    """
    import comfy.conds

    tiles, channels = plugin("nodes.host.tiling.tiles"), nets.LATENT_CHANNELS
    control = SimpleNamespace(
        cond_hint_original=torch.zeros(1, 3, 128, 192), previous_controlnet=None, compression_ratio=8, vae=None
    )
    seen: list[Any] = []

    def predict(conds: Any, x: Tensor, timestep: Tensor) -> list[Tensor]:
        seen.extend(cond for group in conds for cond in group)
        return [x * 0.5, x * timestep.view(-1, 1, 1, 1)]

    x, text = there(place, 1, channels, 16, 24), comfy.conds.CONDCrossAttn(there(place, 1, 77, 8))
    cond = {"model_conds": {"c_crossattn": text}, "control": control, "uuid": 0}
    with place.watched() as watch, torch.no_grad():
        settings = tiles.TileSettings(tile=8, overlap=2, tile_batch=2)
        run = tiles.TiledRun(settings)
        found = run.denoise(predict, None, [[cond], [cond]], x, there(place, 1), settings.grid(x.shape))
    assert [(one.device, one.shape) for one in found] == [(place.device, x.shape)] * 2
    assert {entry["control"].cond_hint_original.device.type for entry in seen} == {"cpu"}
    check(watch)


def test_the_tagger(place: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos lie on the CPU, and so does what is read."""
    module, core = plugin("nodes.host.dape"), plugin("seesr_core.dape")
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *_, **__: None)
    monkeypatch.setattr(module, "require_finite", lambda *_: None)  # reads what has no contents here
    config = core.DAPEConfig.from_dict(CONFIG.to_dict())
    network = place.module(core.DAPE(config).eval(), dtype(place))
    tagger = module.HostDAPE(patcher=SimpleNamespace(model=network), vocabulary=None, config=config)
    with place.watched() as watch:
        reading = tagger._look([torch.zeros(1, 3, 40, 50), torch.zeros(1, 3, 30, 30)], True)
    assert {part.device.type for part in reading} == {"cpu"}
    assert [len(part) for part in reading] == [2, 2]
    check(watch)

"""The guided prediction: order of the halves, what guidance and scales do."""

from dataclasses import replace

import torch

from seesr_core.method.denoiser import Denoiser
from tests.small_nets import inputs, seeded_networks


def _denoiser(**changes) -> Denoiser:
    unet, control = seeded_networks()
    data = inputs()
    negative = inputs(seed=7)["text"]
    start = Denoiser(
        unet=unet,
        controlnet=control,
        positive=data["text"],
        negative=negative,
        soft_prompt=data["soft"],
        image=data["image"],
    )
    return replace(start, **changes)


def _call(denoiser: Denoiser) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(inputs()["x"], 400)


def test_guidance_combines_the_two_halves():
    positive, negative = _call(_denoiser(cfg=1.0)), _call(_denoiser(cfg=1.0, positive=inputs(seed=7)["text"]))
    torch.testing.assert_close(_call(_denoiser(cfg=3.0)), negative + 3.0 * (positive - negative), rtol=1e-4, atol=1e-5)


def test_without_guidance_the_network_runs_once_per_image():
    denoiser = _denoiser(cfg=1.0)
    sizes = []
    denoiser.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    _call(denoiser)
    denoiser.cfg = 2.0
    _call(denoiser)
    assert sizes == [2, 4]


def test_control_scale_zero_equals_no_controlnet():
    assert torch.equal(_call(_denoiser(control_scale=0.0)), _call(_denoiser(controlnet=None)))
    assert not torch.allclose(_call(_denoiser()), _call(_denoiser(controlnet=None)))


def test_every_image_may_have_a_timestep_of_its_own():
    both = _denoiser(cfg=3.0)
    with torch.no_grad():
        apart = both(inputs()["x"], torch.tensor([400, 700]))
        later = both(inputs()["x"], 700)
    torch.testing.assert_close(apart, torch.stack([_call(both)[0], later[1]]), rtol=1e-4, atol=1e-5)

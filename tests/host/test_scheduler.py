"""SeeSRScheduler."""

from __future__ import annotations

import pytest
import torch

from .locate import plugin
from .nets import nano_model
from .sampling import outputs, sigmas


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 10}, list(range(901, 0, -100))),
        ({"steps": 50}, list(range(981, 0, -20))),
        ({"steps": 20}, list(range(951, 0, -50))),
        ({"steps": 2, "spacing": "trailing"}, [999, 499]),
        ({"steps": 2}, [501, 1]),
        ({"steps": 10, "start_timestep": 500}, [401, 301, 201, 101, 1]),
    ],
)
def test_the_hosts_samplers_turn_sigmas_back_into_the_timesteps(options, expected):
    model = nano_model()
    (levels,) = outputs(plugin("nodes.latent").SeeSRScheduler.execute(model, **options))
    sampling = model.get_model_object("model_sampling")
    assert levels.dtype == torch.float32
    assert levels[-1] == 0
    assert [int(t) for t in sampling.timestep(levels[:-1])] == expected
    assert torch.allclose(levels[:-1], sampling.sigmas[expected], rtol=2e-7, atol=0)


def test_no_timestep_left_is_refused():
    with pytest.raises(Exception, match="no timestep at or below"):
        sigmas(nano_model(), steps=1, start_timestep=0)


@pytest.mark.parametrize(
    ("bases", "match"),
    [
        (("ModelSamplingDiscreteFlow", "CONST"), r"Stable Diffusion MODEL.*another kind"),
        (("ModelSamplingContinuousEDM", "EPS"), "Stable Diffusion MODEL"),
    ],
)
def test_a_model_with_another_kind_of_noise_is_refused(bases, match):
    import comfy.model_sampling

    other = type("Other", tuple(getattr(comfy.model_sampling, name) for name in bases), {})
    model = nano_model()
    model.add_object_patch("model_sampling", other())
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=match):
        sigmas(model, steps=2)

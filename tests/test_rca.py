"""RCA on diffusers' networks: where it sits, what it changes, what it leaves alone."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from seesr_core.method.controlnet import build_controlnet, controlnet_from_unet
from seesr_core.method.rca import rca_parameters, sites, soft_prompt_dim
from seesr_core.method.unet import build_unet
from tests.golden import golden_dir
from tests.small_nets import SOFT_DIM, inputs, seeded_networks, unet_config


def _eps(unet, data, soft=None, **extra):
    kwargs = {} if soft is None else {"soft_prompt": soft, **extra}
    with torch.no_grad():
        return unet(data["x"], 500, data["text"], cross_attention_kwargs=kwargs, return_dict=False)[0]


def test_without_soft_prompt_the_network_is_the_stock_one():
    unet, _ = seeded_networks()
    stock = UNet2DConditionModel.from_config(unet_config()).eval()
    stock.load_state_dict({k: v for k, v in unet.state_dict().items() if ".image_attentions." not in k})
    data = inputs()
    assert torch.equal(_eps(unet, data), _eps(stock, data))


def test_scale_zero_is_the_stock_network_and_soft_prompts_matter():
    unet, _ = seeded_networks()
    data = inputs()
    assert torch.equal(_eps(unet, data, data["soft"], rca_scale=0.0), _eps(unet, data))
    full = _eps(unet, data, data["soft"])
    assert (full - _eps(unet, data)).abs().max() > 1e-3
    assert (full - _eps(unet, data, data["soft"].flip(0))).abs().max() > 1e-5


def test_scale_between_lies_between():
    """At one site: x + s·(rca(x) − x)."""
    unet, _ = seeded_networks()
    text = unet.mid_block.attentions[0]
    x, soft = torch.randn(1, 32, 4, 4), inputs(1)["soft"]
    kwargs = {"encoder_hidden_states": inputs(1)["text"]}
    with torch.no_grad():
        bare, half, full = (
            text(x, **kwargs, cross_attention_kwargs={"soft_prompt": soft, "rca_scale": s})[0] for s in (0, 0.5, 1)
        )
    torch.testing.assert_close(half, (bare + full) / 2)


def test_a_copy_has_rca_of_its_own():
    unet, _ = seeded_networks()
    data = inputs()
    before = _eps(unet, data, data["soft"])
    twin = copy.deepcopy(unet)
    for parameter in rca_parameters(twin).values():
        parameter.data.zero_()
    assert torch.equal(_eps(unet, data, data["soft"]), before)
    assert not torch.equal(_eps(twin, data, data["soft"]), before)


def test_controlnet_starts_as_the_encoder_with_zero_outputs():
    unet, _ = seeded_networks()
    control = controlnet_from_unet(unet, hint_channels=(4, 4, 8, 8))
    data = inputs()
    down, mid = control(
        data["x"],
        5,
        data["text"],
        data["image"],
        cross_attention_kwargs={"soft_prompt": data["soft"]},
        return_dict=False,
    )
    assert not any(residual.any() for residual in (*down, mid))
    theirs, ours = rca_parameters(unet), rca_parameters(control)
    assert ours
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert torch.equal(control.conv_in.weight, unet.conv_in.weight)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        unet, _ = seeded_networks()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        data = inputs()
        unet(data["x"], 9, data["text"], cross_attention_kwargs={"soft_prompt": data["soft"]})[
            0
        ].square().mean().backward()
        gradients.append({name: p.grad for name, p in rca_parameters(unet).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_sizes_of_the_published_networks():
    folder = golden_dir() / "unet_controlnet"
    if not (folder / "full_unet_config.json").exists():
        pytest.skip("no full-size configuration in the golden folder")
    with torch.device("meta"):
        unet = build_unet(_config(folder / "full_unet_config.json"))
        control = build_controlnet(_config(folder / "full_controlnet_config.json"))
    assert (len(sites(unet)), len(sites(control))) == (16, 7)
    assert {"down.0.0", "mid", "up.3.2"} <= sites(unet).keys()
    assert sum(p.numel() for p in rca_parameters(unet).values()) == 260_849_600
    assert soft_prompt_dim(unet.state_dict()) == 512


def _config(path: Path):
    return json.loads(path.read_text("utf-8"))


def test_soft_prompt_width_is_read_from_weights():
    unet, _ = seeded_networks()
    assert soft_prompt_dim(unet.state_dict()) == SOFT_DIM
    assert soft_prompt_dim({"conv_in.weight": torch.zeros(1)}) is None

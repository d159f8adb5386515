"""Regions, guidance by a mask and the fidelity dial together, in models that other nodes have changed as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from . import nets
from .locate import plugin
from .nets import nano_model, nano_seesr
from .sampling import outputs

SIDE = 16


def patched(node: Any, method: str, *arguments: Any) -> Any:
    """What a node of either generation makes of a model."""
    return outputs((getattr(node, "execute", None) or getattr(node(), method))(*arguments))[0]


def with_lora(model: Any) -> Any:
    changed = model.clone()
    key = next(key for key in model.model.state_dict() if key.endswith("attn2.to_k.weight"))
    weight = model.model.state_dict()[key]
    changed.add_patches({key: (0.3 * torch.ones_like(weight),)}, 1.0)
    return changed


def merged(model: Any) -> Any:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return patched(ModelMergeSimple, "merge", model, with_lora(nano_model()), 0.5)


def with_freeu(model: Any) -> Any:
    from comfy_extras.nodes_freelunch import FreeU_V2

    return patched(FreeU_V2, "patch", model, 1.3, 1.4, 0.9, 0.2)


def with_pag(model: Any) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return patched(PerturbedAttentionGuidance, "patch", model, 3.0)


def with_easycache(model: Any) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return patched(EasyCacheNode, "execute", model, 0.2, 0.15, 0.95, False)


def tiled(model: Any) -> Any:
    return patched(plugin("nodes.tiled").SeeSRTileModel, "execute", model, 64, 16)


def prompt(inputs: dict[str, Any], bound: bool) -> Any:
    """The inputs' prompt, its first words bound to the left half."""
    (((tokens, extras),),) = inputs["positive"]
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    numbers = torch.zeros(tokens.shape[1], dtype=torch.int64)
    numbers[1:9] = 1
    region = plugin("nodes.host.regions").RegionPrompt(masks=mask, numbers=numbers, strength=1.0)
    return [[tokens, {**extras, "seesr_regions": (region,)} if bound else extras]], mask


def run(
    before: Callable[[Any], Any], after: Callable[[Any], Any], *, bound: bool, fidelity: float, outside: float
) -> Tensor:
    inputs = nets.nano_inputs(size=SIDE)
    positive, mask = prompt(inputs, bound)
    steering = plugin("nodes.host.steering")
    model, positive, negative = plugin("nodes.apply").apply_seesr(
        before(nano_model()),
        [positive],
        [inputs["negative"]],
        nano_seesr(),
        inputs["soft_prompt"],
        inputs["image"],
    )
    model = steering.attach_spatial_guidance(model, mask, outside=outside, feather=16)
    model = steering.attach_fidelity(model, {"samples": inputs["latent"]}, fidelity=fidelity, decay=4.0)
    return nets.run(after(model), positive, negative, inputs, steps=4)


CHANGES = (with_lora, merged, with_freeu, with_pag, with_easycache, tiled)
OFF: dict[str, Any] = {"bound": False, "fidelity": 0.0, "outside": 1.0}


def same(model: Any) -> Any:
    return model


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_acts_beside_what_other_nodes_do(change: Callable[[Any], Any], after: bool) -> None:
    places = (same, change) if after else (change, same)
    plain = run(*places, **OFF)
    ways: list[dict[str, Any]] = [{"bound": True}, {"fidelity": 0.5}, {"outside": 0.0}]
    for one in ways:
        found = run(*places, **{**OFF, **one})
        assert torch.isfinite(found).all()
        assert not torch.equal(found, plain), one
    if change is with_easycache:
        return  # which may find nothing to reuse in four steps
    together: dict[str, Any] = {"bound": True, "fidelity": 0.5, "outside": 0.0}
    assert not torch.equal(run(*places, **together), run(same, same, **together))


def test_a_second_controlnet_in_the_chain_is_kept() -> None:
    import comfy.controlnet

    inputs = nets.nano_inputs(size=SIDE)
    positive, _ = prompt(inputs, bound=True)
    seen: list[int] = []

    class Other(comfy.controlnet.ControlNet):
        """One that only notes that it was asked."""

        def get_control(self, *args: Any) -> Any:
            seen.append(1)
            return None

        def copy(self) -> Any:
            return self

        def get_models(self) -> list[Any]:
            return []

    second = Other(None)
    with_second = [[positive[0][0], {**positive[0][1], "control": second, "control_apply_to_uncond": True}]]
    model, positive_after, negative = plugin("nodes.apply").apply_seesr(
        nano_model(), [with_second], [inputs["negative"]], nano_seesr(), inputs["soft_prompt"], inputs["image"]
    )
    bound = nets.run(model, positive_after, negative, inputs)
    assert seen
    free = [[positive[0][0], {"control": second, "control_apply_to_uncond": True}]]
    model, positive_after, negative = plugin("nodes.apply").apply_seesr(
        nano_model(), [free], [inputs["negative"]], nano_seesr(), inputs["soft_prompt"], inputs["image"]
    )
    assert not torch.equal(bound, nets.run(model, positive_after, negative, inputs))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde", "lcm", "uni_pc"])
def test_every_kind_of_sampler_takes_them(sampler: str) -> None:
    import comfy.sample
    import comfy.samplers

    inputs = nets.nano_inputs(size=SIDE)
    positive, mask = prompt(inputs, bound=True)
    steering = plugin("nodes.host.steering")
    model, positive, negative = plugin("nodes.apply").apply_seesr(
        nano_model(), [positive], [inputs["negative"]], nano_seesr(), inputs["soft_prompt"], inputs["image"]
    )
    model = steering.attach_spatial_guidance(model, mask, outside=0.2, feather=0)
    model = steering.attach_fidelity(model, {"samples": inputs["latent"]}, fidelity=1.0, decay=0.0)
    found = comfy.sample.sample(
        model,
        inputs["noise"],
        3,
        2.0,
        sampler,
        "normal",
        positive,
        negative,
        inputs["latent"],
        disable_pbar=True,
        seed=1,
    )
    torch.testing.assert_close(found, inputs["latent"], rtol=1e-3, atol=0.05)

"""RCA inside the host's U-Net: both ways in, what it leaves alone, and what it shares with other nodes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from . import nets
from .locate import plugin


@pytest.fixture(params=["patch point", "hooks"])
def by_hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each of the two ways in; the patch point only where this host asks it about transformers."""
    probes = plugin("nodes.host.probes")
    hooks = request.param == "hooks"
    if not hooks and not probes.patch_reaches_transformers():
        pytest.skip("this host never asks its patch point about transformers")
    monkeypatch.setattr(probes, "patch_reaches_transformers", lambda: not hooks)
    return hooks


def with_rca(
    model: Any, soft_prompt: Tensor, *, strength: float = 1.0, window: tuple[float, float] = (0.0, 1.0)
) -> Any:
    """A clone of `model` with RCA."""
    weights = nets.nano_seesr().rca
    return plugin("nodes.host.rca").attach_rca(model.clone(), weights, soft_prompt, strength=strength, window=window)


def sample(model: Any, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """A short run of `model` with the inputs' prompts."""
    return nets.run(model, inputs["positive"][0], inputs["negative"], inputs, **settings)


def test_acts_and_leaves_the_model_alone(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    before = sample(model, inputs)
    patched = with_rca(model, inputs["soft_prompt"])
    keys = patched.model.state_dict().keys()
    assert not torch.allclose(sample(patched, inputs), before, atol=0.1)
    assert torch.equal(sample(model, inputs), before)
    assert keys == model.model.state_dict().keys()
    assert torch.equal(sample(with_rca(model, inputs["soft_prompt"], strength=0.0), inputs), before)


def test_both_ways_in_are_bit_equal(model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    probes = plugin("nodes.host.probes")
    if not probes.patch_reaches_transformers():
        pytest.skip("this host has one way only")
    by_patch = sample(with_rca(model, inputs["soft_prompt"]), inputs)
    monkeypatch.setattr(probes, "patch_reaches_transformers", lambda: False)
    assert torch.equal(sample(with_rca(model, inputs["soft_prompt"]), inputs), by_patch)


def test_strength_goes_from_without_to_with(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    outputs = [unet_output(with_rca(model, inputs["soft_prompt"], strength=s), inputs) for s in (0.0, 1e-3, 1.0)]
    assert (outputs[1] - outputs[0]).abs().max() < 0.05 * (outputs[2] - outputs[0]).abs().max()
    assert not torch.equal(outputs[1], outputs[0])


def test_clones_with_other_soft_prompts_do_not_meet(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    other = nets.nano_inputs(size=8, seed=5)["soft_prompt"]
    first, second = (with_rca(model, soft) for soft in (inputs["soft_prompt"], other))
    alone = sample(first, inputs)
    assert not torch.equal(sample(second, inputs), alone)
    assert torch.equal(sample(first, inputs), alone)
    # A clone made by a node after ours, e.g. a LoRA loader, keeps it.
    assert torch.equal(sample(first.clone(), inputs), alone)


def test_two_photos_equal_two_runs(model: Any, by_hooks: bool) -> None:
    both = nets.nano_inputs(batch=2, size=8, seed=3)
    batched = sample(with_rca(model, both["soft_prompt"]), both)
    for index in range(2):
        one = both | {name: both[name][index : index + 1] for name in ("latent", "noise")}
        alone = sample(with_rca(model, both["soft_prompt"][index : index + 1]), one)
        torch.testing.assert_close(batched[index : index + 1], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("window", "runs"), [((0.0, 1.0), 2), ((0.0, 0.4), 1), ((0.4, 0.8), 0)])
def test_window(
    model: Any, inputs: dict[str, Any], by_hooks: bool, window: tuple[float, float], runs: int, caplog: Any
) -> None:
    patched = with_rca(model, inputs["soft_prompt"], window=window)
    with counted_rca() as calls:
        result = sample(patched, inputs, cfg=1.0)
    assert len(calls) == runs * len(nets.nano_seesr().rca.sites)
    assert torch.equal(result, sample(model, inputs, cfg=1.0)) == (runs == 0)
    assert "RCA" not in caplog.text


def test_applied_again_replaces(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    once = with_rca(model, inputs["soft_prompt"])
    older = with_rca(model, nets.nano_inputs(size=8, seed=9)["soft_prompt"], strength=0.3)
    assert torch.equal(sample(with_rca(older, inputs["soft_prompt"]), inputs), sample(once, inputs))
    removed = with_rca(older, inputs["soft_prompt"], strength=0.0)
    assert torch.equal(sample(removed, inputs), sample(model, inputs))
    assert not removed.get_nested_additional_models()


def test_weights_are_the_hosts_to_manage(model: Any, inputs: dict[str, Any]) -> None:
    patched = with_rca(model, inputs["soft_prompt"])
    assert [m.model for m in patched.get_nested_additional_models()] == [nets.nano_seesr().rca.patcher.model]


def test_hooks_are_gone_after_a_call_even_a_failed_one(
    inputs: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin("nodes.host.probes"), "patch_reaches_transformers", lambda: False)
    patched = with_rca(model, inputs["soft_prompt"])
    sample(patched, inputs)
    assert not hooks_of(model)
    broken = with_rca(model, inputs["soft_prompt"][..., :-1])
    with pytest.raises(RuntimeError):
        sample(broken, inputs)
    assert not hooks_of(model)


def test_other_patches_see_the_same_blocks(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    def seen_by_attention(patched: Any) -> list[Any]:
        seen: list[Any] = []

        def look(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            seen.append((extra["block"], extra["transformer_index"], tuple(k.shape)))
            return q, k, v

        patched.set_model_attn2_patch(look)
        sample(patched, inputs)
        return seen

    assert seen_by_attention(with_rca(model, inputs["soft_prompt"])) == seen_by_attention(model.clone())


def test_another_nodes_handler_runs_first(model: Any, inputs: dict[str, Any]) -> None:
    from comfy.ldm.modules.attention import SpatialTransformer

    if not plugin("nodes.host.probes").patch_reaches_transformers():
        pytest.skip("this host never asks its patch point about transformers")
    handled: list[Any] = []

    def doubled(layer: Any, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any], *_: Any) -> Tensor:
        handled.append(options["block"])
        return 2 * layer(x, context, options)

    entry = ((SpatialTransformer, doubled), "forward_timestep_embed_patch")
    theirs = model.clone()
    theirs.set_model_patch(*entry)
    before, after = with_rca(theirs, inputs["soft_prompt"]), with_rca(model, inputs["soft_prompt"])
    after.set_model_patch(*entry)
    result = sample(before, inputs)
    assert len(handled) == 2 * len(nets.nano_seesr().rca.sites)
    assert torch.equal(sample(after, inputs), result)
    assert not torch.equal(sample(theirs, inputs), result)


def test_says_when_it_never_ran(model: Any, inputs: dict[str, Any], by_hooks: bool, caplog: Any) -> None:
    from comfy.patcher_extension import WrappersMP

    def without_blocks(executor: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    replaced = model.clone()
    replaced.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another node", without_blocks)
    with caplog.at_level(logging.WARNING):
        sample(with_rca(model, inputs["soft_prompt"]), inputs)
        assert "without RCA" not in caplog.text
        sample(with_rca(replaced, inputs["soft_prompt"]), inputs)
    assert caplog.text.count("made without RCA") == 1


def test_the_warning_shows_on_the_running_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from comfy_execution.utils import CurrentNodeContext

    shown: list[Any] = []
    server = SimpleNamespace(instance=SimpleNamespace(send_progress_text=lambda *given: shown.append(given)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=server))
    warn = plugin("nodes.host.report").warn_on_node
    warn("outside")
    with CurrentNodeContext("prompt", "17"):
        warn("inside")
    assert shown == [("inside", "17")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_unets_of_other_types(inputs: dict[str, Any], by_hooks: bool, dtype: torch.dtype) -> None:
    precise = sample(with_rca(nets.nano_model(), inputs["soft_prompt"]), inputs)
    rough = sample(with_rca(nets.nano_model(dtype=dtype), inputs["soft_prompt"]), inputs)
    spread = precise.abs().max()
    assert (rough - precise).abs().max() < {torch.float8_e4m3fn: 0.6}.get(dtype, 0.1) * spread
    assert rough.isfinite().all()


def test_with_lora(inputs: dict[str, Any], by_hooks: bool) -> None:
    model = nets.nano_model()
    key = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    patched = with_rca(model, inputs["soft_prompt"])
    alone, weight = sample(patched, inputs), model.model.state_dict()[key].clone()
    lora = patched.clone()
    assert lora.add_patches({key: (torch.randn_like(weight) * 0.3,)}, 1.0) == [key]
    assert not torch.equal(sample(lora, inputs), alone)
    assert torch.equal(sample(patched, inputs), alone)
    assert torch.equal(model.model.state_dict()[key], weight)


def test_with_a_merged_model(inputs: dict[str, Any], by_hooks: bool) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, other = nets.nano_model(), nets.nano_model()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.05)
    merged = ModelMergeSimple().merge(with_rca(model, inputs["soft_prompt"]), other, 0.5)[0]
    result = sample(merged, inputs)
    assert not torch.equal(result, sample(ModelMergeSimple().merge(model, other, 0.5)[0], inputs))
    assert not torch.equal(result, sample(with_rca(model, inputs["soft_prompt"]), inputs))


@pytest.mark.parametrize("name", ["FreeU_V2", "PerturbedAttentionGuidance"])
def test_with_nodes_that_patch_blocks(inputs: dict[str, Any], by_hooks: bool, name: str) -> None:
    patched, model = with_rca(nets.nano_model(), inputs["soft_prompt"]), nets.nano_model()
    both, theirs = (sample(apply_extra(name, one), inputs) for one in (patched, model))
    assert both.isfinite().all()
    assert not torch.equal(both, sample(patched, inputs)), f"{name} does not act"
    assert not torch.equal(both, theirs), "RCA does not act"


@pytest.mark.slow
def test_compiled(model: Any, inputs: dict[str, Any], by_hooks: bool) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = with_rca(model, inputs["soft_prompt"])
    expected = sample(patched, inputs)
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    torch.testing.assert_close(sample(compiled, inputs), expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def apply_extra(name: str, model: Any) -> Any:
    """One of the host's own patching nodes, in whichever of its two node styles this host has it."""
    import importlib

    module, settings = {
        "FreeU_V2": ("nodes_freelunch", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
        "PerturbedAttentionGuidance": ("nodes_pag", {"scale": 3.0}),
    }[name]
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(node, "define_schema"):
        return node.execute(model=model, **settings).args[0]
    return node().patch(model, **settings)[0]


def unet_output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the U-Net predicts at one noise level."""
    return sample(model, inputs, cfg=1.0, steps=1)


class counted_rca:  # noqa: N801
    """The blocks at which RCA runs inside the `with`."""

    def __enter__(self) -> list[Any]:
        self.calls: list[Any] = []
        module = nets.nano_seesr().rca.patcher.model
        self.handle = module.register_forward_pre_hook(lambda _, given: self.calls.append(given[0]))
        return self.calls

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def hooks_of(model: Any) -> list[Any]:
    """Forward hooks anywhere in the U-Net."""
    return [hook for module in model.model.modules() for hook in module._forward_hooks.values()]

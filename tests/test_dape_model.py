"""The tagger as a whole: head, prompts, configuration, loading."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
import torch
from torch import Tensor, nn

from seesr_core.dape import DAPE, DAPEConfig, HeadConfig
from seesr_core.errors import SettingsError, WeightsError

from .dape_nets import CONFIG, HEAD, images, seeded, tiny_dape
from .golden import golden_dir


def test_one_pass_gives_both_prompts() -> None:
    dape, x = tiny_dape(), images()
    tokens, logits = dape(x)
    assert tokens.shape == (2, CONFIG.tokens, CONFIG.token_width) == (2, 37, 20)
    assert logits.shape == (2, CONFIG.num_tags)
    assert torch.equal(dape.encode_image(x), tokens)
    assert torch.equal(dape.tag_logits(tokens), logits)


def test_images_of_a_batch_do_not_mix() -> None:
    dape, x = tiny_dape(), images(3)
    together = dape(x)
    for i in range(3):
        alone = dape(x[i : i + 1])
        torch.testing.assert_close(alone.tokens_BLD[0], together.tokens_BLD[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.logits_BN[0], together.logits_BN[i], rtol=0, atol=1e-5)


def test_logits_equal_the_formula_of_the_head() -> None:
    dape = tiny_dape().double()
    tokens = torch.randn(2, 5, HEAD.encoder_width, generator=seeded(), dtype=torch.float64)
    state = dape.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEAD.heads, -1)).transpose(1, 2)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    tags = linear(state["label_embed"], "wordvec_proj").relu().expand(2, -1, -1)
    for i in range(HEAD.layers):
        stem = f"tagging_head.encoder.layer.{i}"
        q, k, v = (
            heads(linear(x, f"{stem}.crossattention.self.{name}"))
            for name, x in (("query", tags), ("key", tokens), ("value", tokens))
        )
        mixed = ((q @ k.mT / (HEAD.hidden // HEAD.heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        out = f"{stem}.crossattention.output"
        tags = norm(linear(mixed, f"{out}.dense") + tags, f"{out}.LayerNorm")
        hidden = nn.functional.gelu(linear(tags, f"{stem}.intermediate.dense"))
        tags = norm(linear(hidden, f"{stem}.output.dense") + tags, f"{stem}.output.LayerNorm")
    expected = linear(tags, "fc")[..., 0]
    torch.testing.assert_close(dape.tag_logits(tokens), expected, rtol=0, atol=1e-10)


def test_dropout_acts_in_training_only() -> None:
    dape, tokens = tiny_dape(), torch.randn(1, 5, HEAD.encoder_width, generator=seeded())
    assert torch.equal(dape.tag_logits(tokens), dape.tag_logits(tokens))
    dape.train()
    with torch.random.fork_rng():
        assert not torch.equal(dape.tag_logits(tokens), dape.tag_logits(tokens))
    still = tiny_dape(dataclasses.replace(CONFIG, head=dataclasses.replace(HEAD, dropout=0.0))).train()
    assert torch.equal(still.tag_logits(tokens), still.tag_logits(tokens))


def test_bfloat16_stays_near() -> None:
    dape, x = tiny_dape(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = dape(x)
    exact = dape(x)
    assert low.logits_BN.dtype == torch.bfloat16
    assert (low.tokens_BLD.float() - exact.tokens_BLD).norm() < 0.03 * exact.tokens_BLD.norm()


def test_configuration_survives_json() -> None:
    assert DAPEConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    "data", [{}, {"swin": {}, "head": {"width": 3}}, {"swin": 1, "head": {}}, {"swin": {}, "head": {}, "a": 1}]
)
def test_unreadable_configuration_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="configuration cannot be read"):
        DAPEConfig.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "multiple of its 5 heads"), ({"layers": 0}, "at least 1"), ({"dropout": -0.1}, "dropout")],
)
def test_impossible_heads_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(HEAD, **change)  # type: ignore[arg-type]


def test_weights_alone_rebuild_the_model() -> None:
    dape = tiny_dape()
    # Heads and image size are the only sizes that shapes do not show: four heads are the default, the image is named.
    config = DAPEConfig.from_state_dict(dape.state_dict(), image_size=48)
    assert config == CONFIG
    rebuilt = DAPE.from_state_dict(dape.state_dict(), config)
    assert not rebuilt.training
    assert torch.equal(rebuilt(images()).logits_BN, dape(images()).logits_BN)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("fc.bias"), r"1 keys are missing \['fc.bias'\]"),
        (lambda state: state.update(extra=torch.zeros(1)), r"left over \['extra'\]"),
        (lambda state: state.update({"fc.bias": torch.zeros(2)}), r"'fc.bias' should have the shape \(1,\)"),
    ],
)
def test_unfit_weights_are_refused(spoil, message: str) -> None:
    state = tiny_dape().state_dict()
    spoil(state)
    with pytest.raises(WeightsError, match=message):
        DAPE.from_state_dict(state, CONFIG)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(WeightsError, match="label_embed"):
        DAPEConfig.from_state_dict({"conv.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="tagging head"):
        HeadConfig.from_state_dict({"visual_encoder.norm.weight": torch.zeros(1)})


def test_initialisation_comes_from_the_generator_alone() -> None:
    first, second, other = DAPE(CONFIG), DAPE(CONFIG), DAPE(CONFIG)
    before = torch.random.get_rng_state()
    for dape, seed in ((first, 1), (second, 1), (other, 2)):
        dape.initialize(seeded(seed))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    drawn = [name for name, p in first.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in drawn)
    assert first.label_embed.std().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("variant", ["swin_b_384", "swin_l_384"])
def test_parameters_are_named_as_in_the_published_file(variant: str) -> None:
    with gzip.open(golden_dir() / "dape" / f"{variant}_ram_pth_keys.json.gz", "rt") as handle:
        published = json.load(handle)
    needed = {key: entry["shape"] for key, entry in published.items() if entry["used_for_tagging_and_embeds"]}
    state = {key: torch.empty(shape, device="meta") for key, shape in needed.items()}
    with torch.device("meta"):
        dape = DAPE(DAPEConfig.from_state_dict(state))
    assert {key: list(value.shape) for key, value in dape.state_dict().items()} == needed

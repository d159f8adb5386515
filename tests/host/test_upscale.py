"""The all-in-one node against the graph of the small nodes, and what it refuses before it samples."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, NANO
from .small_base import write_small_base
from .small_nodes import ADDED, NEGATIVE, applied, load_checkpoint

MIN_SIZE = 64
SETTINGS: dict[str, Any] = {
    "scale": 4.0,
    "steps": 4,
    "cfg": 1.0,
    "seed": 3,
    "prompt": "at night",
    "added_prompt": ADDED,
    "negative_prompt": NEGATIVE,
    "sampler_name": "ddim",
    "start_timestep": 251,
    "tile_size": 768,
    "overlap": 32,
    "color_fix": "wavelet",
}


@pytest.fixture(scope="module")
def nano() -> dict[str, Any]:
    """Everything of the shipped model that the node is connected to."""
    return {
        **load_checkpoint(plugin("nodes.host.nano").EMBEDDED),
        "dape": plugin("nodes.host.dape").load_dape(NANO / "dape" / "dape-nano.safetensors"),
        "seesr_model": plugin("nodes.host.seesr_model").load_seesr_model(
            NANO / "seesr" / "seesr-nano-control.safetensors"
        ),
    }


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """512² takes long on a CPU."""
    monkeypatch.setattr(plugin("nodes.upscale"), "MIN_SIZE", MIN_SIZE)


def photos(count: int = 1, height: int = 18, width: int = 26, seed: int = 0) -> Tensor:
    """IMAGE on 8-bit levels."""
    levels = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def cup() -> Tensor:
    """IMAGE of something that the tagger knows, (1, 30, 40, 3)."""
    with Image.open(NANO / "example.jpg") as picture:
        small = picture.convert("RGB").resize((40, 30), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small))[None].float() / 255


def upscaled(nano: dict[str, Any], image: Tensor, **changes: Any) -> tuple[Tensor, list[str]]:
    """What SeeSR Upscale gives."""
    return plugin("nodes.upscale").SeeSRUpscale.execute(image=image, **{**nano, **SETTINGS, **changes}).result


def graph(nano: dict[str, Any], image: Tensor, **changes: Any) -> tuple[Tensor, list[str]]:
    """What the small nodes and the host's own give, connected as in the full workflow."""
    import comfy.samplers

    # By name, since a type checker would take the plugin's own package.
    host_nodes = importlib.import_module("nodes")
    s = SimpleNamespace(**{**SETTINGS, **changes})
    image_nodes, prompts, latents = plugin("nodes.image"), plugin("nodes.prompts"), plugin("nodes.latent")
    (prepared,) = image_nodes.SeeSRPrepareImage.execute(image, s.scale, MIN_SIZE).result
    (tags,) = prompts.SeeSRExtractTags.execute(nano["dape"], image, 1.0, "", "en").result
    (soft_prompt,) = prompts.SeeSRSoftPrompt.execute(nano["dape"], image).result
    # The host runs nodes after a list output once per entry.
    texts = [prompts.SeeSRPrompt.execute(line, s.prompt, s.added_prompt).result[0] for line in tags]
    encode = host_nodes.CLIPTextEncode().encode
    model, positive, negative = applied(
        nano["model"],
        [encode(nano["clip"], text)[0] for text in texts],
        encode(nano["clip"], s.negative_prompt)[0],
        nano["seesr_model"],
        soft_prompt,
        prepared,
    )
    (sigmas,) = latents.SeeSRScheduler.execute(nano["model"], s.steps, "leading", s.start_timestep).result
    noise, latent = latents.SeeSRLatentInit.execute(
        nano["model"], nano["vae"], prepared, sigmas, s.seed, s.start_timestep
    ).result
    sampler = comfy.samplers.sampler_object(s.sampler_name)
    sampled, _ = (
        plugin("nodes.tiled")
        .SeeSRTiledSampler.execute(
            model, positive, negative, noise, sampler, sigmas, latent, s.cfg, s.tile_size, s.overlap, 0
        )
        .result
    )
    (decoded,) = host_nodes.VAEDecode().decode(nano["vae"], sampled)
    return image_nodes.SeeSRFinishImage.execute(decoded, prepared, image, s.scale, s.color_fix).result[0], tags


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, {}),
        (2, {"cfg": 5.5, "sampler_name": "ddpm", "color_fix": "adain"}),
        (1, {"cfg": 3.0, "steps": 3, "start_timestep": 999, "tile_size": 64, "overlap": 16, "sampler_name": "ddpm"}),
    ],
)
def test_same_numbers_as_the_graph_of_small_nodes(nano: dict[str, Any], count: int, changes: dict[str, Any]) -> None:
    image = photos(count)
    found, tags = upscaled(nano, image, **changes)
    expected, expected_tags = graph(nano, image, **changes)
    assert torch.equal(found, expected)
    assert tags == expected_tags
    assert len(tags) == count
    assert found.std() > 0.01


def test_batch_is_single_runs_of_following_seeds(nano: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"sampler_name": "ddpm", "cfg": 3.0}
    image = photos(2)
    batch, _ = upscaled(nano, image, **settings)
    alone = [upscaled(nano, image[i : i + 1], **settings, seed=SETTINGS["seed"] + i)[0] for i in range(2)]
    # Rounding to 8 bits can fall either way.
    assert (batch - torch.cat(alone)).abs().max() <= 1.01 / 255
    assert not torch.equal(upscaled(nano, image[:1], **settings, seed=99)[0], alone[0])


@pytest.mark.parametrize(("height", "width", "scale"), [(17, 23, 4.0), (30, 19, 2.5)])
def test_result_has_exactly_the_photo_s_size_times_scale(
    nano: dict[str, Any], height: int, width: int, scale: float
) -> None:
    found, _ = upscaled(nano, photos(height=height, width=width), scale=scale)
    assert found.shape == (1, round(height * scale), round(width * scale), 3)


def test_every_setting_reaches_the_picture(nano: dict[str, Any]) -> None:
    image = photos()
    guided: dict[str, Any] = {"cfg": 3.0, "sampler_name": "ddpm"}
    plain, _ = upscaled(nano, image, **guided)
    others: list[dict[str, Any]] = [
        {"cfg": 5.5},
        {"seed": 4},
        {"steps": 8},
        {"start_timestep": 501},
        {"prompt": "by day"},
        {"added_prompt": ""},
        {"negative_prompt": "sharp"},
        {"sampler_name": "euler"},
        {"color_fix": "none"},
        {"tile_size": 64},
        {"tags": "house"},
        {"strength": 0.5},
        {"rca_strength": 0.5},
    ]
    for change in others:
        assert not torch.equal(upscaled(nano, image, **{**guided, **change})[0], plain), change


@pytest.mark.parametrize(
    ("preset", "same_as"),
    [
        (
            "from the model",
            {"steps": 10, "cfg": 1.0, "sampler_name": "ddim", "start_timestep": 99, "color_fix": "wavelet"},
        ),
        ("turbo", {"steps": 2, "cfg": 1.0, "sampler_name": "ddpm", "start_timestep": 999, "color_fix": "adain"}),
    ],
)
def test_presets_decide_on_values_left_at_their_defaults(
    nano: dict[str, Any], preset: str, same_as: dict[str, Any]
) -> None:
    fresh = {"steps": 50, "cfg": 5.5, "sampler_name": "ddpm", "start_timestep": 999, "color_fix": "adain"}
    values = plugin("nodes.host.presets").sampling_values
    given = {"solver": fresh["sampler_name"], **{k: v for k, v in fresh.items() if k != "sampler_name"}}
    found = values(preset, nano["seesr_model"].defaults, {**given, "spacing": "leading"})
    assert found.pop("spacing") == "trailing", "as SD-turbo and the small model want it"
    assert found == {"solver": same_as["sampler_name"], **{k: v for k, v in same_as.items() if k != "sampler_name"}}
    if preset == "from the model":
        image = photos()
        assert torch.equal(
            upscaled(nano, image, **fresh, preset=preset)[0],
            upscaled(nano, image, **same_as, preset="from the model")[0],
        )
        changed = values(preset, nano["seesr_model"].defaults, {**given, "spacing": "leading", "steps": 7})
        assert (changed["steps"], changed["start_timestep"]) == (7, 99)


def test_what_a_model_file_or_a_preset_saves_reaches_the_sampler(nano: dict[str, Any]) -> None:
    """Guidance from the middle on (timesteps 751, 501 without, 251 and 1 with it), a ControlNet for two steps."""
    defaults = {"steps": 4, "cfg": 2.0, "cfg_start": 0.5, "control_reuse": 2, "spacing": "leading", "solver": "ddpm"}
    seesr_model = replace(nano["seesr_model"], defaults=defaults)
    networks = {"unet": nano["model"].model.diffusion_model, "control": seesr_model.control.control_model}
    seen: dict[str, list[int]] = {name: [] for name in networks}
    hooks = [
        net.register_forward_pre_hook(
            lambda _, args, kwargs, into=seen[name]: into.append(len(args[0] if args else kwargs["x"])),
            with_kwargs=True,
        )
        for name, net in networks.items()
    ]
    fresh = {"steps": 50, "cfg": 5.5, "sampler_name": "ddpm", "start_timestep": 999, "color_fix": "adain"}
    upscaled({**nano, "seesr_model": seesr_model}, photos(1), **fresh, preset="from the model")
    for hook in hooks:
        hook.remove()
    assert seen == {"unet": [1, 1, 2, 2], "control": [1, 2]}


def test_another_colour_fix_of_the_same_run_samples_nothing(nano: dict[str, Any]) -> None:
    image = photos()
    upscaled(nano, image)
    calls: list[Any] = []
    hook = nano["model"].model.diffusion_model.register_forward_pre_hook(lambda *call: calls.append(call))
    try:
        found, _ = upscaled(nano, image, color_fix="adain")
        assert not calls
        upscaled(nano, image, seed=77)
        assert calls
        calls.clear()
        upscaled(nano, image.clone(), seed=77)
        assert calls, "another photo"
    finally:
        hook.remove()
    plugin("nodes.upscale")._last.clear()
    assert torch.equal(found, upscaled(nano, image, color_fix="adain")[0])


def test_tags_can_be_given_and_left_out(nano: dict[str, Any]) -> None:
    image = cup()
    read, tags = upscaled(nano, image)
    assert upscaled(nano, image, tags="a red house")[1] == ["a red house"]
    same, _ = upscaled(nano, image, tags=tags[0])
    assert torch.equal(same, read)
    first = tags[0].split(", ")[0]
    assert first not in upscaled(nano, image, exclude=first)[1][0].split(", ")


def test_transparency_and_a_wished_size(nano: dict[str, Any]) -> None:
    image = torch.cat([photos(), photos(seed=5)[..., :1]], dim=-1)
    assert upscaled(nano, image, to="60x60 crop")[0].shape == (1, 60, 60, 4)
    assert upscaled(nano, image, to="52")[0].shape == (1, 36, 52, 4)


def test_the_node_tells_its_phases_and_the_tags(nano: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(plugin("nodes.host.report"), "_show", shown.append)
    _, tags = upscaled(nano, photos(seed=8))
    for phase in ("1 of 4: reading the tags", "2 of 4: encoding", "3 of 4: sampling", "4 of 4: decoding"):
        assert any(phase in text for text in shown)
    assert f"tags: {tags[0]}" in shown[-1]
    assert "26×18 to 104×72" in shown[-1]
    assert "2 steps of 1 tiles" in shown[-1]


def test_model_is_left_as_it_was(nano: dict[str, Any]) -> None:
    before = {key: value.clone() for key, value in nano["model"].model.diffusion_model.state_dict().items()}
    first, _ = upscaled(nano, photos())
    again, _ = upscaled(nano, photos())
    assert torch.equal(first, again)
    assert not nano["model"].wrappers
    assert not nano["model"].additional_models
    after = nano["model"].model.diffusion_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_values_that_the_model_was_not_tuned_for_are_named_in_the_log(
    nano: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    log_other_defaults = plugin("nodes.upscale").log_other_defaults
    model = SimpleNamespace(name="a.safetensors", defaults={"solver": "ddim", "steps": 4, "cfg": 1.0, "vae_tile": 512})
    with caplog.at_level(logging.INFO):
        log_other_defaults(model, {"sampler_name": "ddim", "steps": 4, "cfg": 1.0})
        assert not caplog.text
        log_other_defaults(model, {"sampler_name": "ddpm", "steps": 50, "cfg": 1.0})
    assert "a.safetensors was tuned for sampler_name ddim, steps 4; the node runs sampler_name ddpm, steps 50" in (
        caplog.text
    )


@pytest.fixture
def unsampled(nano: dict[str, Any]) -> Any:
    """Fails if the U-Net runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the U-Net ran")

    hook = nano["model"].model.diffusion_model.register_forward_pre_hook(refuse)
    yield
    hook.remove()


class OtherVAE:
    """An autoencoder of another family."""

    latent_channels, latent_dim = LATENT_CHANNELS + 1, 2

    def spacial_compression_encode(self) -> int:
        """Pixels a cell, as the host asks for them."""
        return 8


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.full((1, 18, 26, 3), float("nan"))}, "photo holds values that are no numbers"),
        ({"image": torch.zeros(0, 18, 26, 3)}, "The IMAGE is empty"),
        ({"vae": OtherVAE()}, f"8 times smaller with {LATENT_CHANNELS} channels.*{LATENT_CHANNELS + 1} channels"),
        ({"tile_size": 100}, "tile_size must be a multiple of 8"),
        ({"overlap": 768}, "overlap .* must be less than tile_size"),
        ({"start_timestep": 0}, "no timestep"),
    ],
)
def test_wrong_plugs_are_refused_before_sampling(nano: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    given = {"image": photos(), **nano, **changes}
    with pytest.raises(plugin("seesr_core.errors").SeeSRError, match=message):
        upscaled(given, given.pop("image"), **{key: value for key, value in changes.items() if key in SETTINGS})


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Another small base model, with a text encoder of another width."""
    path = tmp_path_factory.mktemp("base") / "other.safetensors"
    write_small_base(path)
    return load_checkpoint(path)


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize(("part", "message"), [("clip", "text encoder of width 64"), ("model", "32 channels")])
def test_parts_of_another_checkpoint_are_refused(
    nano: dict[str, Any], other_base: dict[str, Any], part: str, message: str
) -> None:
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=message):
        upscaled({**nano, part: other_base[part]}, photos())


@pytest.mark.usefixtures("unsampled")
def test_another_tagger_is_refused(nano: dict[str, Any]) -> None:
    from .test_dape_nodes import network, vocabulary

    dape = plugin("nodes.host.dape").wrap_dape(network(), vocabulary(), device=torch.device("cpu"))
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match="choose the DAPE that belongs to it"):
        upscaled({**nano, "dape": dape}, photos())


@pytest.mark.parametrize("local", ["tags", "soft prompt", "both"])
def test_local_prompts_act_where_there_are_tiles(nano: dict[str, Any], local: str) -> None:
    image = cup()
    whole, _ = upscaled(nano, image)
    assert torch.equal(upscaled(nano, image, local_prompts=local)[0], whole)
    tiles = {"tile_size": 64, "overlap": 16}
    plain, tags = upscaled(nano, image, **tiles)
    found, same = upscaled(nano, image, **tiles, local_prompts=local)
    assert not torch.equal(found, plain)
    assert same == tags


def test_fidelity_keeps_the_result_nearer_to_the_photo(nano: dict[str, Any]) -> None:
    image = photos()
    plain = torch.nn.functional.interpolate(image.movedim(-1, 1), scale_factor=4, mode="bicubic").movedim(1, -1)
    free, faithful = (upscaled(nano, image, fidelity=fidelity, color_fix="none")[0] for fidelity in (0.0, 1.0))
    assert (faithful - plain).square().mean() < (free - plain).square().mean()

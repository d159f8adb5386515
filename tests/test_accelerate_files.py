"""The configuration files for accelerate's launcher: accelerate reads them and would start what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from seesr_core.errors import SettingsError
from trainer.engine.distribution import make_accelerator
from trainer.engine.loop_config import LoopConfig
from trainer.engine.needs import check_needs
from trainer.engine.processes import is_zero
from trainer.engine.zero import configure

from .golden import ROOT
from .ranks import TOY

FILES = sorted((ROOT / "trainer" / "accelerate").glob("*.yaml"))
EXPECTED = {
    "cpu": ("MULTI_GPU", 1, 2),
    "ddp": ("MULTI_GPU", 1, 8),
    "ddp-nodes": ("MULTI_GPU", 4, 32),
    "fsdp2": ("FSDP", 1, 8),
    "fsdp2-keep": ("FSDP", 1, 8),
    "zero2": ("DEEPSPEED", 1, 8),
}


def launched(path: Path) -> Any:
    """What the launcher makes of a file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "trainer.stage2"])
    return _validate_launch_command(arguments)[0]


def test_every_file_is_expected() -> None:
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(path))
    assert (str(config.distributed_type.value), config.num_machines, config.num_processes) == EXPECTED[path.stem]
    assert config.mixed_precision == "no"
    arguments = launched(path)
    assert arguments.num_processes == EXPECTED[path.stem][2]
    assert bool(arguments.use_fsdp) == path.stem.startswith("fsdp2")
    assert bool(arguments.use_deepspeed) == path.stem.startswith("zero")


@pytest.mark.parametrize(("name", "reshards"), [("fsdp2", True), ("fsdp2-keep", False)])
def test_it_shards_by_blocks_that_the_networks_have(name: str, reshards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    from .stage2_nets import small_networks

    arguments = launched(ROOT / "trainer" / "accelerate" / f"{name}.yaml")
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key not in os.environ:
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is reshards
    nets = small_networks()
    plugin.set_auto_wrap_policy(nets.unet)
    assert plugin.auto_wrap_policy is not None
    kinds = {type(module).__name__ for net in (nets.unet, nets.controlnet) for module in net.modules()}
    assert set(plugin.transformer_cls_names_to_wrap or ()) <= kinds


def zero(monkeypatch: pytest.MonkeyPatch, stage: int = 2) -> Any:
    """What accelerate makes of zero2.yaml; it needs no DeepSpeed for that."""
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    arguments = launched(ROOT / "trainer" / "accelerate" / "zero2.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""
    arguments.main_process_port = 0  # any
    for key, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        if key not in os.environ:
            monkeypatch.setenv(key, value)
    assert is_zero()
    plugin = DeepSpeedPlugin(zero_stage=None if stage == 2 else stage)
    return SimpleNamespace(deepspeed_plugin=plugin, mixed_precision="no")


def test_deepspeed_gets_the_settings_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = zero(monkeypatch)
    configure(asked, nn.Linear(1, 1), replace(TOY, accumulation=2, max_grad_norm=0.5))
    settings = asked.deepspeed_plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_under_deepspeed_the_precision_is_the_recipes(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(1, 1)
    configure(zero(monkeypatch), module, replace(TOY, precision=precision))
    assert module(torch.ones(1, 1)).dtype == dtype
    assert module.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("stage", "half", "recipe", "sentence"),
    [
        (3, "no", {}, r"got ZeRO-3 .*fsdp2\.yaml shards the same"),
        (2, "bf16", {}, "leave it to the recipe"),
        (2, "no", {"optimizer": "adamw-8bit"}, r"got fp32 and adamw-8bit.*ddp\.yaml"),
        (2, "no", {"precision": "fp16"}, r"got fp16 and adamw; .*ddp\.yaml"),
    ],
)
def test_what_deepspeed_is_not_used_for_is_refused_in_one_sentence(
    stage: int, half: str, recipe: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = zero(monkeypatch, stage)
    asked.mixed_precision = half
    with pytest.raises(SettingsError, match=sentence):
        configure(asked, nn.Linear(1, 1), replace(TOY, **recipe))


def test_without_deepspeed_installed_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    with pytest.raises(SettingsError, match="pip install 'deepspeed>="):
        make_accelerator(TOY)


def test_two_processes_on_the_cpu_are_two(tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text("import os, pathlib; pathlib.Path(__file__).with_name(os.environ['RANK']).touch()", "utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "trainer/accelerate/cpu.yaml"),
    ]
    subprocess.run([*command, "--main_process_port", "0", str(script)], check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"who.py", "0", "1"}


def test_a_process_that_should_not_be_alone_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoopConfig(steps=1, batch_size=1, learning_rate=1.0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_needs(config)
    assert caplog.text == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_needs(config)
    assert "asked for several processes and started this one alone" in caplog.text

"""The configuration files for accelerate's launcher: accelerate reads them and would start what they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from seesr_core.errors import SettingsError
from trainer.distribution import make_accelerator

from .golden import ROOT
from .ranks import TOY

FILES = sorted((ROOT / "trainer" / "accelerate").glob("*.yaml"))
EXPECTED = {
    "cpu": ("MULTI_CPU", 1, 2),
    "ddp": ("MULTI_GPU", 1, 8),
    "ddp-nodes": ("MULTI_GPU", 4, 32),
    "fsdp2": ("FSDP", 1, 8),
    "fsdp2-keep": ("FSDP", 1, 8),
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


def test_deepspeed_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(SettingsError, match=r"no run resumed exactly; trainer/accelerate/fsdp2\.yaml shards the same"):
        make_accelerator(TOY)

"""What a run needs beside its data, looked at before anything is read."""

from __future__ import annotations

import importlib.util
import logging
import sys

from seesr_core.errors import SettingsError

from .loop_config import LoopConfig
from .optimizers import check_optimizer
from .processes import is_alone_against_its_config

log = logging.getLogger(__name__)


def check_needs(config: LoopConfig) -> None:
    """Refuse a run that would fail once it is under way, and say if it has fewer processes than it was meant to have.

    Raises:
        SettingsError: as `check_packages`.
    """
    check_packages(config)
    if is_alone_against_its_config():
        log.warning(
            "The launcher was asked for several processes and started this one alone; accelerate does so with "
            "MULTI_CPU. Launch with trainer/accelerate/cpu.yaml or torchrun."
        )


def check_packages(config: LoopConfig) -> None:
    """Refuse settings whose packages are missing.

    Raises:
        SettingsError: a package is not installed; the message has its name.
    """
    if config.optimizer == "adamw-8bit":
        require_package("bitsandbytes", "The optimizer 'adamw-8bit'", "choose 'adamw-fused'")
    check_optimizer(config.optimizer)
    if config.wandb:
        require_package("wandb", f"Logging to the Weights & Biases project {config.wandb!r}", "leave `wandb` empty")


def require_package(name: str, what: str, instead: str) -> None:
    """Refuse a setting whose package is missing.

    Raises:
        SettingsError: `name` is not installed.
    """
    if not (sys.modules.get(name) or importlib.util.find_spec(name)):
        raise SettingsError(
            f"{what} needs the package {name}: install it by `pip install {name}` (it is in the extra train-extras), "
            f"or {instead}."
        )

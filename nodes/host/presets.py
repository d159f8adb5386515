"""Named ways to sample, and what a model file says of itself, in the host's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...seesr_core.settings import PRESETS, SAMPLING, UpscaleSettings

FROM_MODEL, CUSTOM = "from the model", "custom"
ATTACHMENT = "seesr_defaults"
"""Under which a MODEL from SeeSR Apply carries the values that its file brings."""
_HOST_SOLVERS = {"unipc": "uni_pc"}
"""Solvers that the host calls otherwise."""


def preset_input(names: str, *, default: str = FROM_MODEL) -> io.Combo.Input:
    """Which preset decides on the inputs called `names`."""
    return io.Combo.Input(
        "preset",
        options=[FROM_MODEL, *PRESETS, CUSTOM],
        default=default,
        optional=True,
        tooltip=f"Who decides on {names}. from the model: those left at their defaults follow the SeeSR model's file. "
        "paper: as published. fast: 10 steps. turbo: 2 steps, for SD-turbo. custom: the values as they stand.",
    )


def sampling_values(preset: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of some settings of `SAMPLING` that a run takes, `solver` by the host's name of it.

    Args:
        preset: one of `preset_input`'s options.
        defaults: what the model's file brings.
        given: the inputs' values, by the settings' names.

    Raises:
        SettingsError: no such preset.
    """
    if preset == CUSTOM:
        return dict(given)
    if preset == FROM_MODEL:
        published = UpscaleSettings.preset("paper")
        values = {name: defaults.get(name, value) for name, value in given.items() if value == published[name]}
    else:
        values = {name: value for name, value in UpscaleSettings.preset(preset).items() if name in given}
    solver = {"solver": _HOST_SOLVERS.get(values["solver"], values["solver"])} if "solver" in values else {}
    return {**given, **values, **solver}


def model_defaults(model: Any) -> Mapping[str, Any]:
    """What the file of a MODEL from SeeSR Apply brings of `SAMPLING`; nothing for another MODEL."""
    found = getattr(model, "attachments", {}).get(ATTACHMENT, {})
    return {name: value for name, value in found.items() if name in SAMPLING}

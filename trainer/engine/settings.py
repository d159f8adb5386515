"""Recipes overridden by a TOML file: every key must exist, and its value must be of the kind that is there."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from seesr_core.errors import SettingsError
from seesr_core.formats.schema import MalformedError, read
from seesr_core.runtime.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")
_MOST_BYTES = 1 << 20


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        SettingsError: missing, or no TOML.
    """
    try:
        return tomllib.loads(read_text(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path} cannot be read as TOML settings ({error}); expected lines like `crop = 256`."
        ) from error


def overridden(config: Config, settings: Mapping[str, Any], source: Path, prefix: str = "") -> Config:
    """A configuration with the `settings` of a file over its own; nested configurations are tables.

    Raises:
        SettingsError: an unknown key, with the nearest one; a value of another kind, or one that cannot work.
    """
    changes: dict[str, Any] = {}
    hints = get_type_hints(type(config), include_extras=True)
    for key, value in settings.items():
        name = _known(key.replace("-", "_"), config, source, prefix)
        old = getattr(config, name)
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise SettingsError(f"{source}: {prefix}{name} is a table ([{prefix}{name}]), found {value!r}.")
            changes[name] = overridden(old, value, source, f"{prefix}{name}.")
        else:
            changes[name] = _of_kind(hints[name], value, f"{source}: {prefix}{name}")
    return replace(config, **changes)  # type: ignore[type-var]


def _known(name: str, config: Any, source: Path, prefix: str) -> str:
    names = [field.name for field in fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise SettingsError(
            f"{source}: there is no setting {prefix}{name}. Did you mean {prefix}{near[0] if near else names[0]}?"
        )
    return name


def _of_kind(kind: Any, value: Any, name: str) -> Any:
    try:
        return read(kind, value, name)
    except MalformedError as error:
        raise SettingsError(f"{error}. Correct it in the file.") from error

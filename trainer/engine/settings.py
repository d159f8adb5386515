"""Recipes overridden by a TOML file: every key must exist, and its value must be of the kind that is there."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from seesr_core.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        SettingsError: missing, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read as TOML settings ({error}); expected lines like `crop = 256`."
        ) from error


def overridden(config: Config, settings: Mapping[str, Any], source: Path, prefix: str = "") -> Config:
    """A configuration with the `settings` of a file over its own; nested configurations are tables.

    Raises:
        SettingsError: an unknown key, with the nearest one; a value of another kind, or one that cannot work.
    """
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        name = _known(key.replace("-", "_"), config, source, prefix)
        old = getattr(config, name)
        if is_dataclass(old):
            if not isinstance(value, Mapping):
                raise SettingsError(f"{source}: {prefix}{name} is a table ([{prefix}{name}]), found {value!r}.")
            changes[name] = overridden(old, value, source, f"{prefix}{name}.")
        else:
            changes[name] = _of_the_same_kind(old, value, f"{source}: {prefix}{name}")
    return replace(config, **changes)  # type: ignore[type-var]


def _known(name: str, config: Any, source: Path, prefix: str) -> str:
    names = [field.name for field in fields(config)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise SettingsError(
            f"{source}: there is no setting {prefix}{name}. Did you mean {prefix}{near[0] if near else names[0]}?"
        )
    return name


def _of_the_same_kind(old: Any, value: Any, name: str) -> Any:
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if old is not None and type(old) is not type(value):
        raise SettingsError(f"{name} is a {_kind(old)}, found {value!r}. Correct it in the file.")
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "truth value", int: "whole number", float: "number", str: "text in quotes", tuple: "list"}
    return kinds.get(type(value), type(value).__name__)

"""Short texts by which a run knows its networks, photos and settings again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import nn

from .photos import Photo


def fingerprint(module: nn.Module) -> str:
    """A short text that differs when any weight does."""
    state = module.state_dict()
    return digest(state[name].detach().float().cpu().numpy().tobytes() for name in sorted(state))


def digest(parts: Iterable[bytes]) -> str:
    """A short text that differs when any part does."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def same_photos(photos: Sequence[Photo]) -> str:
    """A short text for a run's settings: two lists of photos have the same if their names and tags are equal."""
    names = ("\0".join((photo.path.name, *photo.tags)).encode() for photo in photos)
    return f"{len(photos)} ({digest(names)})"

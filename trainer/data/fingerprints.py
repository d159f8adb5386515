"""Short texts by which a run knows its networks, photos and settings again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

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


def listed(paths: Iterable[Path | None]) -> str:
    """How many files there are, and a short text that differs when any of their names does."""
    found = [path.name if path else "" for path in paths]
    return f"{len(found)} ({digest(name.encode() for name in found)})"


def drawn_from(photos: Sequence[Photo]) -> dict[str, str]:
    """Short texts for a run's settings that tell apart all that is drawn from photos, beside their names: tags, given
    LR, and the weights of their sources."""
    sources = {photo.source for photo in photos if photo.source}
    shares = sorted(f"{source.name} {source.weight}" for source in sources)
    return {
        "tags": digest("\0".join(photo.tags).encode() for photo in photos),
        "lr": listed(photo.lr for photo in photos) if any(photo.lr for photo in photos) else "made",
        "mixture": ", ".join(shares),
    }


def same_photos(photos: Sequence[Photo]) -> str:
    """A short text for a run's settings: two lists of photos have the same if their names and tags are equal."""
    names = ("\0".join((photo.path.name, *photo.tags)).encode() for photo in photos)
    return f"{len(photos)} ({digest(names)})"

"""Folders of pictures, and what belongs together in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.pictures.reading import read_photo

from ..data.photos import SUFFIXES

Item = TypeVar("Item")


def list_pictures(folder: Path) -> dict[str, Path]:
    """The pictures right in `folder`, sorted, by their name without suffix: a result may have another format.

    Raises:
        DataError: no folder, no picture in it, or two pictures of one name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a folder of pictures.")
    pictures: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in pictures:
                raise DataError(f"{folder} holds {pictures[path.stem].name} and {path.name}; leave one of them there.")
            pictures[path.stem] = path
    if not pictures:
        raise DataError(f"No pictures in {folder}; expected some of {', '.join(sorted(SUFFIXES))}.")
    return pictures


def unmatched(folders: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Names by folder that some other folder lacks; folders where nothing is to be told are left out."""
    common = set.intersection(*(set(names) for names in folders.values()))
    lonely = {kind: sorted(set(names) - common) for kind, names in folders.items()}
    return {kind: names for kind, names in lonely.items() if names}


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """Take at most `limit` items, evenly from all over the list; all of them for 0."""
    count = min(limit, len(items)) or len(items)
    return [items[index * len(items) // count] for index in range(count)]


def read_picture(path: Path) -> Tensor:
    """A picture as uint8 RGB (3, H, W), upright.

    Raises:
        ImageError: it cannot be read.
    """
    return as_tensor(read_photo(path).rgb)


def as_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def as_picture(image_3HW: Tensor) -> Image.Image:
    """The inverse of `as_tensor`."""
    return Image.fromarray(image_3HW.permute(1, 2, 0).contiguous().numpy())


def enlarge(picture: Image.Image, like_3HW: Tensor) -> Image.Image:
    """`picture` in the size of `like`, by PIL's bicubic on 8 bits."""
    return picture.resize((like_3HW.shape[2], like_3HW.shape[1]), Image.Resampling.BICUBIC)

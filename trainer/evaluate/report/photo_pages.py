"""`python -m trainer.evaluate sheet`: one picture per photo, its versions side by side, for the eye.

The first line shows the whole photo, small, with the places of the crops marked. The lines below show these places at
1:1. A place is a square of `--crop` pixels; candidates lie half a square apart; the one with the largest mean gradient
of the luma comes first, then the next largest that overlaps none before it (of equals the topmost, then the leftmost).
The luma is HR's, or where there is no HR that of LR enlarged by bicubic, so that no result chooses its own places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.pictures.reading import read_photo
from seesr_core.pictures.writing import save_picture
from seesr_core.runtime.files import atomic_write

from ..pictures import as_tensor, enlarge, list_pictures, spread
from ..quality.fidelity import full_luma
from .sheet import contact_sheet
from .tables import show

LR, BICUBIC, HR = "LR, nearest", "bicubic", "HR"
_MARK = (224, 138, 0)
Versions = dict[str, Image.Image]


@dataclass(kw_only=True, slots=True)
class Options:
    """Write OUT/NAME.png for every photo, and OUT/index.html that shows them all.

    Pictures of several folders belong together by name, whatever their suffix. Places of the crops: the squares with
    the largest mean gradient of HR's luma (without HR: of the enlarged LR's) that do not overlap.
    """

    lr: Path
    """Folder of the photos that were upscaled."""
    sr: Path
    """Folder of results."""
    out: Path
    """Folder to write."""
    hr: Path | None = None
    """Folder of originals."""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another folder of results as NAME=DIR; may be given several times."""
    name: str = "result"
    """Label of the results."""
    crop: int = 192
    """Side of a crop in pixels of the result."""
    crops: int = 3
    """Most crops to show of a photo."""
    limit: int = 0
    """Most photos to show, spread over all; 0 shows all."""

    def __post_init__(self) -> None:
        if self.crop < 16 or self.crops < 0 or self.limit < 0:
            raise SettingsError("--crop must be at least 16, --crops and --limit at least 0.")
        names = [self.name, LR, BICUBIC, HR, *named_folders(self.beside)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"Several versions are called {', '.join(twice)}; choose other names.")


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Folders by name from words such as `teacher=results/teacher`.

    Raises:
        SettingsError: a word is not NAME=DIR, or a name stands twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise SettingsError(f"--beside wants NAME=DIR, such as teacher=results/teacher, not {word!r}.")
        if name in found:
            raise SettingsError(f"--beside names {name} twice; choose different names.")
        found[name] = Path(folder)
    return found


def write_pages(options: Options) -> list[str]:
    """Write every page and the index; returns the names of the photos.

    Raises:
        SeeSRError: a folder or picture cannot be used, or sizes differ.
    """
    folders = {BICUBIC: options.lr, **named_folders(options.beside), options.name: options.sr}
    if options.hr is not None:
        folders[HR] = options.hr
    files = {title: list_pictures(folder) for title, folder in folders.items()}
    names = spread([name for name in files[options.name] if name in files[BICUBIC]], options.limit)
    if not names:
        raise DataError(f"No name is in both {options.sr} and {options.lr}.")
    for name in names:
        versions = _versions({title: paths[name] for title, paths in files.items() if name in paths}, options.name)
        save_picture(options.out / f"{name}.png", page(name, versions, options))
    with atomic_write(options.out / "index.html") as temporary:
        temporary.write_text(_index(names), "utf-8")
    return names


def _versions(paths: Mapping[str, Path], result: str) -> Versions:
    """Every version at the size of the result."""
    pictures = {title: read_photo(path).rgb for title, path in paths.items()}
    like = pictures[result]
    for title, picture in pictures.items():
        if title != BICUBIC and picture.size != like.size:
            sizes = f"{picture.width}×{picture.height}, the result has {like.width}×{like.height}"
            raise DataError(f"{paths[title]} has {sizes} pixels; only pictures of one size can be shown together.")
    lr = pictures[BICUBIC]
    pictures[BICUBIC] = enlarge(lr, as_tensor(like))
    return {LR: lr.resize(like.size, Image.Resampling.NEAREST), **pictures}


def page(name: str, versions: Versions, options: Options) -> Image.Image:
    """The page of one photo from its versions, all of one size."""
    places = detailed_places(as_tensor(versions.get(HR, versions[BICUBIC])), options.crop, options.crops)
    side = min(options.crop, *next(iter(versions.values())).size)
    boxes = [(left, top, left + side, top + side) for left, top in places]
    rows = [(name, {title: _small(picture, boxes, options.crop) for title, picture in versions.items()})]
    for number, box in enumerate(boxes, 1):
        crops = {title: picture.crop(box) for title, picture in versions.items()}
        rows.append((f"{number}: 1:1 at {box[0]}, {box[1]}", crops))
    return contact_sheet(rows, cell=options.crop)


def detailed_places(image_3HW: Tensor, side: int, count: int) -> list[tuple[int, int]]:
    """Left and top of at most `count` squares with the most detail that do not overlap; see the head of this file.

    Args:
        image_3HW: uint8 RGB picture.
        side: of a square; cut to the picture's shorter side.
        count: how many at most.
    """
    luma = full_luma(image_3HW)
    side = min(side, *luma.shape)
    across, down = F.pad(luma.diff(dim=1).abs(), (0, 1)), F.pad(luma.diff(dim=0).abs(), (0, 0, 0, 1))
    detail = F.avg_pool2d((across + down)[None, None], side, stride=max(side // 2, 1))[0, 0]
    step, columns = max(side // 2, 1), detail.shape[1]
    chosen: list[tuple[int, int]] = []
    for index in torch.argsort(detail.flatten(), descending=True, stable=True).tolist():
        left, top = index % columns * step, index // columns * step
        if len(chosen) < count and all(abs(left - x) >= side or abs(top - y) >= side for x, y in chosen):
            chosen.append((left, top))
    return chosen


def _small(picture: Image.Image, boxes: Sequence[tuple[int, int, int, int]], side: int) -> Image.Image:
    """The whole picture within `side`², on white of that width, the boxes marked."""
    factor = min(side / max(picture.size), 1.0)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    for number, box in enumerate(boxes, 1):
        left, top, right, bottom = (round(edge * factor) for edge in box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_MARK)
        draw.text((left + 2, top), str(number), fill=_MARK)
    cell = Image.new("RGB", (side, size[1]), "white")
    cell.paste(small, (0, 0))
    return cell


def _index(names: Sequence[str]) -> str:
    return "".join(_index_lines(names))


def _index_lines(names: Sequence[str]) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Sheets</title>\n'
    yield "<style>body { font-family: system-ui, sans-serif; } img { display: block; margin-bottom: 2rem; }</style>\n"
    yield f"</head>\n<body>\n<h1>{len(names)} photos</h1>\n"
    for name in names:
        yield f'<h2 id="{escape(name)}">{escape(name)}</h2>\n<img src="{quote(name)}.png" alt="{escape(name)}">\n'
    yield "</body>\n</html>\n"


def command(options: Options) -> None:
    """Write the pages and say where they are."""
    names = write_pages(options)
    show(f"{len(names)} pages: {options.out / 'index.html'}\n")

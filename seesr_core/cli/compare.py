"""`compare A B -o PAGE`: two pictures, or those of two folders, on one page with a slider between them."""

from __future__ import annotations

import argparse
import base64
import html
import io
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ImageError, SettingsError
from ..pictures.opening import open_picture
from ..pictures.reading import InputPhoto, read_photo
from ..pictures.writing import check_writable
from ..runtime.files import write_text
from .console import say
from .jobs import list_photos

log = logging.getLogger(__name__)

_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "AVIF": "image/avif"}
"""Formats that every browser shows; pictures of others are written as WebP."""
_QUALITY = 95
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 1200px; padding: 0 1rem; background: #181818; color: #ddd;
  font: 16px/1.5 system-ui, sans-serif; }}
figure {{ margin: 0 0 3rem; }}
.pair {{ position: relative; overflow: hidden; --at: 50%; max-width: calc(90vh * var(--ratio));
  aspect-ratio: var(--ratio); }}
.pair:has(:focus-visible) {{ outline: 2px solid #7ab8ff; }}
.pair img {{ display: block; width: 100%; }}
.pair .before {{ position: absolute; inset: 0; height: 100%; clip-path: inset(0 calc(100% - var(--at)) 0 0); }}
.pair::after {{ content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; pointer-events: none; }}
.pair input {{ position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }}
figcaption {{ color: #999; }}
</style>
<h1>{title}</h1>
{figures}
<script>
for (const slider of document.querySelectorAll("input"))
  slider.addEventListener("input", () => slider.parentElement.style.setProperty("--at", slider.value + "%"));
</script>
</html>
"""
_FIGURE = """<figure>
<div class="pair" style="--ratio: {width} / {height}">
<img class="after" src="{after}" alt="{after_name}">
<img class="before" src="{before}" alt="{before_name}">
<input type="range" min="0" max="100" step="0.1" value="50" aria-label="How much of {before_name} shows">
</div>
<figcaption>{before_name}, {before_size} | {after_name}, {after_size}</figcaption>
</figure>"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = (
        "Write one page, which needs no other file, with a slider between A and B: two pictures, or the pictures of "
        "two folders that have the same name (B's may have more at its end, such as photo_4x.png)."
    )
    parser.add_argument("before", metavar="A", type=Path, help="picture or folder, shown left of the slider")
    parser.add_argument("after", metavar="B", type=Path, help="picture or folder, shown right of it")
    parser.add_argument("-o", "--output", metavar="PAGE", type=Path, required=True, help="the page, *.html")


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    if arguments.output.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"The page must be named *.html, not {arguments.output}.")
    pairs = pair_up(arguments.before, arguments.after)
    check_writable(arguments.output)
    figures = "\n".join(_figure(before, after) for before, after in pairs)
    title = html.escape(f"{arguments.before.name} | {arguments.after.name}")
    write_text(arguments.output, _PAGE.format(title=title, figures=figures))
    say(f"{arguments.output}: {len(pairs)} pair{'s' if len(pairs) > 1 else ''}")
    return 0


def pair_up(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Which picture belongs to which; those without a partner are told of.

    Raises:
        ImageError: nothing to read, or no pair.
        SettingsError: a folder and a file.
    """
    if before.is_dir() != after.is_dir():
        raise SettingsError(f"{before} and {after} are a folder and a file: compare two files or two folders.")
    if not before.is_dir():
        return [(before, after)]
    first, second = list_photos(before)[0], list_photos(after)[0]
    pairs = [(path, partner) for path in first if (partner := _partner(path, second)) is not None]
    alone = {*first, *second} - {path for pair in pairs for path in pair}
    if not pairs:
        raise ImageError(f"No picture in {after} has the name of one in {before}: expected such as a.jpg and a.png.")
    if alone:
        log.warning("left out, without a partner: %s", ", ".join(sorted(str(path) for path in alone)))
    return pairs


def _partner(path: Path, others: list[Path]) -> Path | None:
    """The picture of the same name; else of the same stem; else the one whose stem only adds to it."""
    for same in (
        [other for other in others if other.name == path.name],
        [other for other in others if other.stem in (path.stem, path.name)],
        [other for other in others if other.stem.startswith(f"{path.stem}_")],
    ):
        if same:
            return same[0]
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """A picture on the page."""

    address: str
    size: tuple[int, int]


def _figure(before: Path, after: Path) -> str:
    left, right = _shown(before), _shown(after)
    return _FIGURE.format(
        width=right.size[0],
        height=right.size[1],
        before=left.address,
        after=right.address,
        before_name=html.escape(before.name),
        after_name=html.escape(after.name),
        before_size=f"{left.size[0]}×{left.size[1]}",
        after_size=f"{right.size[0]}×{right.size[1]}",
    )


def _shown(path: Path) -> _Shown:
    photo = read_photo(path, frame=0)
    with open_picture(path) as image:
        kind = image.format
    if kind in _AS_THEY_ARE:
        return _Shown(address=_address(_AS_THEY_ARE[kind], path.read_bytes()), size=photo.size)
    return _Shown(address=_address("image/webp", _as_webp(photo)), size=photo.size)


def _as_webp(photo: InputPhoto) -> bytes:
    file = io.BytesIO()
    picture: Image.Image = photo.rgb
    picture.save(file, "WEBP", quality=_QUALITY, **({"icc_profile": photo.icc} if photo.icc else {}))
    return file.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

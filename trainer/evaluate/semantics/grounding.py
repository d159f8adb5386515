"""`python -m trainer.evaluate grounding`: does the tagger know where a tag is?

Collages: two photos that share no tag, as squares side by side and one above the other, each in both orders. Asked are
the tags that the tagger finds both in the photo alone and in the collage. A tag is in its place if more than half of
its map's mass lies in its own photo's half, and it points there if the map's peak does; chance is 50 %. Intervals are
95 % bootstrap over pairs of photos.

Boxes: photos with COCO annotations. Asked are the categories that the tagger finds and knows by name. A tag points
right if its map's peak lies in one of its boxes (the pointing game); mass is the share of the map in them, and area,
the boxes' share of the photo, is what chance would give. Intervals are over photos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.dape import DAPE, Tag, Vocabulary, tagger_input
from seesr_core.dape.grounding import METHODS, Method, enlarge, ground_tokens
from seesr_core.errors import DataError, SettingsError
from seesr_core.pictures.sizes import from_u8

from ...data.order import Stream, seeded
from ...data.photos import Photo, load_rgb, read_photos
from ...stage1.networks import read_teacher
from ..report.intervals import Estimate, resamples
from ..report.tables import Column, markdown, show, write_json
from .boxes import Annotations, Boxes, read_annotations


@dataclass(kw_only=True, slots=True)
class Options:
    """Measure where a tagger sees its tags: on collages of two photos, and on photos with boxes."""

    tagger: Path
    """The tagger: `dape*.safetensors` format, or RAM's file with --tag-lists."""
    photos: Path
    """Photos for the collages, or those of `boxes`: a folder or .jsonl list."""
    json: Path
    """Report to write."""
    boxes: Path | None = None
    """COCO "instances" file of `photos`; with it there are no collages."""
    tag_lists: Path | None = None
    """Folder with RAM's tag lists, for RAM's published file."""
    methods: tuple[Method, ...] = METHODS
    """Ways of grounding to compare."""
    threshold: float = 1.0
    """Factor on every tag's own threshold."""
    partners: int = 2
    """With how many others each photo makes collages."""
    seed: int = 0
    """What the choice of partners and the bootstrap derive from."""
    resamples: int = 1000
    """Bootstrap resamples."""
    limit: int = 0
    """At most so many photos; 0 takes all."""

    def __post_init__(self) -> None:
        if min(self.partners, self.resamples) < 1 or self.limit < 0 or not self.methods:
            raise SettingsError("partners and resamples must be at least 1, limit at least 0, methods at least one.")


@dataclass(kw_only=True, slots=True)
class Tally:
    """What was asked of one pair of photos, or of one photo with boxes."""

    right: int = 0
    """Tags with more than half of their mass in their place."""
    pointed: int = 0
    """Tags whose peak lies in their place."""
    mass: float = 0.0
    """Sum of the shares of mass in place."""
    area: float = 0.0
    """Sum of the places' shares of the picture."""
    tags: int = 0
    """Tags asked."""

    def add(self, map_HW: Tensor, place_HW: Tensor) -> None:
        """Ask one tag: its map, and where it belongs (boolean)."""
        share = float(map_HW[place_HW].sum() / map_HW.sum())
        self.right += share > 0.5
        self.pointed += bool(place_HW.flatten()[map_HW.argmax()])
        self.mass += share
        self.area += float(place_HW.float().mean())
        self.tags += 1


Tallies = dict[Method, list[Tally]]


@dataclass(kw_only=True, slots=True)
class _Asked:
    """A tagger that is asked where its tags are."""

    tagger: DAPE
    vocabulary: Vocabulary
    options: Options
    _alone: dict[Path, list[Tag]] = field(default_factory=dict)

    def look(self, picture_3HW: Tensor) -> tuple[Tensor, list[Tag]]:
        """Soft prompt and tags of a picture, [0, 1]."""
        size = self.tagger.config.image_size
        tokens, logits = self.tagger(tagger_input(picture_3HW[None], size))
        (tags,) = self.vocabulary.select(logits, threshold=self.options.threshold)
        return tokens, tags

    def alone(self, photo: Photo) -> list[Tag]:
        """Tags of a photo, looked up once."""
        if photo.path not in self._alone:
            self._alone[photo.path] = self.look(from_u8(load_rgb(photo.path)))[1]
        return self._alone[photo.path]

    def ask(self, tallies: dict[Method, Tally], tokens: Tensor, places: Sequence[tuple[Tag, Tensor]]) -> None:
        """Add the maps of tags, each with its place (boolean, of the picture's size), to the tallies."""
        for method in self.options.methods if places else ():
            maps = ground_tokens(self.tagger, tokens, [tag.index for tag, _ in places], method=method)
            for map_GG, (_, place_HW) in zip(maps, places, strict=True):
                tallies[method].add(enlarge(map_GG[None], *place_HW.shape)[0], place_HW)


@torch.no_grad()
def evaluate(options: Options) -> dict[str, Any]:
    """All figures; writes and returns the report.

    Raises:
        SeeSRError: files that cannot be used, or photos in which nothing can be asked.
    """
    tagger, vocabulary = read_teacher(options.tagger, options.tag_lists)
    asked = _Asked(tagger=tagger, vocabulary=vocabulary, options=options)
    photos = read_photos(options.photos)[: options.limit or None]
    tallies = collages(asked, photos) if options.boxes is None else boxed(asked, photos, options.boxes)
    report = {
        "settings": {"seed": options.seed, "resamples": options.resamples, "threshold": options.threshold},
        "what": "collages" if options.boxes is None else "boxes",
        "rows": {method: figures(rows, options) for method, rows in tallies.items()},
    }
    write_json(options.json, report)
    return report


def figures(tallies: Sequence[Tally], options: Options) -> dict[str, Any]:
    """Shares in percent with their intervals, over groups that belong together.

    Raises:
        DataError: nothing was asked.
    """
    counts = torch.tensor([[t.right, t.pointed, t.mass, t.area, t.tags] for t in tallies], dtype=torch.float64)
    if not len(counts) or not counts[:, -1].any():
        raise DataError("The tagger finds no tag that could be asked; give more photos, or a lower --threshold.")
    draws = seeded(options.seed, Stream.GROUNDING, 1)
    weights = resamples(len(counts), options.resamples, draws).double()
    whole, drawn = counts.sum(0), weights @ counts
    found = {
        name: Estimate.of(100 * whole[i] / whole[-1], 100 * drawn[:, i] / drawn[:, -1], least=0.0, most=100.0)._asdict()
        for i, name in enumerate(("right", "pointed", "mass", "area"))
    }
    return {**found, "groups": len(counts), "tags": int(whole[-1])}


class Layout(NamedTuple):
    """How two squares make a collage."""

    below: bool
    """One above the other, or side by side."""
    swapped: bool
    """The second photo comes first."""


LAYOUTS = tuple(Layout(*flags) for flags in product((False, True), repeat=2))


def collage(first_3HW: Tensor, second_3HW: Tensor, layout: Layout, side: int) -> tuple[Tensor, Tensor]:
    """Two photos as squares of `side` pixels in one picture, and where the first of them is (boolean)."""
    squares = [
        F.interpolate(photo[None], (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)
        for photo in (first_3HW, second_3HW)
    ]
    places = [torch.ones(side, side, dtype=torch.bool), torch.zeros(side, side, dtype=torch.bool)]
    axis, step = -2 if layout.below else -1, -1 if layout.swapped else 1
    return torch.cat(squares[::step], axis), torch.cat(places[::step], axis)


def collages(asked: _Asked, photos: Sequence[Photo]) -> Tallies:
    """One tally for each pair of photos."""
    found: Tallies = {method: [] for method in asked.options.methods}
    side = asked.tagger.config.image_size
    for first, second in _pairs(asked, photos):
        pair = {method: Tally() for method in found}
        left, right = (from_u8(load_rgb(photo.path)) for photo in (first, second))
        for layout in LAYOUTS:
            picture, place = collage(left, right, layout, side)
            tokens, tags = asked.look(picture)
            own = [{tag.index for tag in asked.alone(photo)} for photo in (first, second)]
            places = [(tag, place) for tag in tags if tag.index in own[0]]
            places += [(tag, ~place) for tag in tags if tag.index in own[1]]
            asked.ask(pair, tokens, places)
        for method, tally in pair.items():
            found[method].append(tally)
    return found


def _pairs(asked: _Asked, photos: Sequence[Photo]) -> Iterator[tuple[Photo, Photo]]:
    """Each photo with some others that share no tag with it, drawn by its number."""
    for number, photo in enumerate(photos):
        own, order = (
            _names(asked, photo),
            torch.randperm(len(photos), generator=seeded(asked.options.seed, Stream.GROUNDING, 2, number)),
        )
        others = (photos[i] for i in order.tolist())
        fitting = (other for other in others if (names := _names(asked, other)) and not own & names)
        for _, other in zip(range(asked.options.partners if own else 0), fitting, strict=False):
            yield photo, other


def _names(asked: _Asked, photo: Photo) -> set[str]:
    return {tag.name for tag in asked.alone(photo)}


def boxed(asked: _Asked, photos: Sequence[Photo], path: Path) -> Tallies:
    """One tally for each photo with boxes."""
    annotations = read_annotations(path)
    found: Tallies = {method: [] for method in asked.options.methods}
    for photo in photos:
        if photo.path.stem not in annotations.sizes:
            continue
        picture = from_u8(load_rgb(photo.path))
        tokens, tags = asked.look(picture)
        one = {method: Tally() for method in found}
        asked.ask(one, tokens, list(_boxed_tags(annotations, photo.path.stem, tags, picture)))
        for method, tally in one.items():
            found[method].append(tally)
    return found


def _boxed_tags(
    annotations: Annotations, name: str, tags: Sequence[Tag], picture_3HW: Tensor
) -> Iterator[tuple[Tag, Tensor]]:
    """The tags whose word is a category with boxes in the picture, and where these are."""
    known = {word.casefold(): number for number, word in annotations.categories.items()}
    height, width = picture_3HW.shape[-2:]
    annotated_width, annotated_height = annotations.sizes[name]
    for tag in tags:
        boxes = annotations.boxes.get((name, known.get(tag.name.casefold(), -1)))
        if boxes is not None:
            yield tag, box_mask(boxes, height, width, height / annotated_height, width / annotated_width)


def box_mask(boxes_G4: Boxes, height: int, width: int, tall: float, wide: float) -> Tensor:
    """Where any of the boxes is, (height, width) boolean; `tall` and `wide` scale them to the picture."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes_G4.tolist():
        rows = slice(int(top * tall), max(round(bottom * tall), int(top * tall) + 1))
        mask[rows, int(left * wide) : max(round(right * wide), int(left * wide) + 1)] = True
    return mask


_COLUMNS = (
    Column(key="right", title="in place, % ↑"),
    Column(key="pointed", title="pointing, % ↑"),
    Column(key="mass", title="mass in place, % ↑"),
    Column(key="area", title="chance, %"),
)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    first = next(iter(report["rows"].values()))
    rows = {
        method: {key: Estimate(**value).text(1) for key, value in row.items() if isinstance(value, dict)}
        for method, row in report["rows"].items()
    }
    groups = "pairs" if report["what"] == "collages" else "photos"
    return markdown(f"{report['what']}: {first['tags']} tags, {first['groups']} {groups}", rows, _COLUMNS)


def command(options: Options) -> None:
    """The command's action."""
    show(table(evaluate(options)))

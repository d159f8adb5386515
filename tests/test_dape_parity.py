"""The tagger against numbers of the published implementation."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from .golden import golden_dir
from .parity.groups import dape


def test_preparation_meets_the_published_pixels() -> None:
    root = golden_dir() / "dape"
    inputs = load_file(root / "inputs.safetensors")
    lines = list(dape.preparation(inputs))
    for meta_file in root.glob("*_meta.json"):
        variant = meta_file.name.removesuffix("_meta.json")
        outputs = load_file(root / f"{variant}_outputs.safetensors")
        lines += dape.shrinking(variant, json.loads(meta_file.read_text()), inputs["img_big_u8"], outputs)
    assert {line.quantity for line in lines} >= {
        "img0.prepared",
        "big_aa_slice",
        "big_noaa_slice",
        "big_trainbicubic_slice",
    }
    assert [line.line() for line in lines if not line.ok] == []


@pytest.mark.slow
def test_every_case_is_within_tolerance() -> None:
    lines = list(dape.cases(golden_dir(), full=True))
    assert any("logits" in line.quantity for line in lines)
    assert [line.line() for line in lines if not line.ok] == []

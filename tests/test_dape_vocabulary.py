"""Tag names, thresholds, selection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesr_core.dape import Vocabulary
from seesr_core.errors import SettingsError, WeightsError

TAGS = Vocabulary(
    tags=("bird", "blue sky", "car", "Dog"),
    tags_zh=("鸟", "蓝天", "汽车", "狗"),
    thresholds=torch.tensor([0.5, 0.6, 0.7, 0.8]),
)


def logits(*scores: list[float]) -> Tensor:
    return torch.tensor(scores).logit()


def names(found: list[list]) -> list[list[str]]:
    return [[tag.name for tag in tags] for tags in found]


def test_a_tag_passes_strictly_above_its_own_threshold() -> None:
    found = TAGS.select(logits([0.55, 0.55, 0.75, 0.75], [0.4, 0.65, 0.65, 0.9]))
    assert names(found) == [["bird", "car"], ["blue sky", "Dog"]]
    assert [tag.index for tag in found[1]] == [1, 3]
    assert found[0][0].score == pytest.approx(0.55)
    equal = Vocabulary(tags=("a",), thresholds=torch.tensor([0.5])).select(torch.zeros(1, 1))
    assert equal == [[]]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, ["bird", "blue sky", "car", "Dog"]), (1.0, ["bird"]), (1.3, [])]
)
def test_threshold_scales_every_tags_own(threshold: float, expected: list[str]) -> None:
    assert names(TAGS.select(logits([0.6, 0.5, 0.5, 0.5]), threshold=threshold)) == [expected]


def test_excluded_names_match_in_both_languages_and_any_case() -> None:
    everything = logits([0.9, 0.9, 0.9, 0.9])
    assert names(TAGS.select(everything, exclude=[" dog ", "BLUE SKY"])) == [["bird", "car"]]
    assert names(TAGS.select(everything, exclude=["汽车", "unknown"], language="zh")) == [["鸟", "蓝天", "狗"]]


def test_the_strongest_stay_in_vocabulary_order() -> None:
    assert names(TAGS.select(logits([0.8, 0.7, 0.95, 0.9]), max_tags=2)) == [["car", "Dog"]]
    assert names(TAGS.select(logits([0.8, 0.7, 0.95, 0.9]), max_tags=0)) == [[]]


def test_prompts_join_with_comma_and_blank() -> None:
    two = logits([0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1])
    assert TAGS.prompt_tags(two) == ["bird, blue sky", ""]
    assert TAGS.prompt_tags(two, language="zh")[0] == "鸟, 蓝天"


def test_half_precision_logits_are_accepted() -> None:
    assert names(TAGS.select(logits([0.9, 0.1, 0.1, 0.1]).bfloat16())) == [["bird"]]


def test_wrong_requests_say_what_is_wrong() -> None:
    with pytest.raises(SettingsError, match=r"\(B, 4\) fit this vocabulary; found \(1, 5\)"):
        TAGS.select(torch.zeros(1, 5))
    with pytest.raises(SettingsError, match="negative"):
        TAGS.select(torch.zeros(1, 4), threshold=-1.0)
    with pytest.raises(SettingsError, match="'fr' was asked for"):
        TAGS.select(torch.zeros(1, 4), language="fr")  # type: ignore[arg-type]
    english = Vocabulary(tags=("a",), thresholds=torch.tensor([0.5]))
    with pytest.raises(SettingsError, match="no Chinese"):
        english.select(torch.zeros(1, 1), language="zh")


@pytest.mark.parametrize(
    "fields",
    [
        {"tags": (), "thresholds": torch.zeros(0)},
        {"tags": ("a", "b"), "thresholds": torch.zeros(1)},
        {"tags": ("a", "b"), "thresholds": torch.zeros(2), "tags_zh": ("一",)},
    ],
)
def test_lists_of_unequal_length_are_refused(fields: dict) -> None:
    with pytest.raises(SettingsError, match="one threshold per tag"):
        Vocabulary(**fields)


def test_metadata_gives_the_same_vocabulary_back() -> None:
    metadata = TAGS.to_metadata()
    assert metadata["thresholds"] == "[0.5, 0.6, 0.7, 0.8]"
    again = Vocabulary.from_metadata(metadata)
    assert (again.tags, again.tags_zh) == (TAGS.tags, TAGS.tags_zh)
    assert torch.equal(again.thresholds, TAGS.thresholds)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tags": "[", "thresholds": "[]"},
        {"tags": '["a"]', "thresholds": "[1, 2]"},
        {"tags": '["a"]', "thresholds": '["x"]'},
    ],
)
def test_unreadable_metadata_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(WeightsError, match="Convert the model again"):
        Vocabulary.from_metadata(metadata)


def test_public_text_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("bird\nblue sky", encoding="utf-8")
    (tmp_path / "zh.txt").write_text("鸟 \n蓝天\n", encoding="utf-8")
    (tmp_path / "threshold.txt").write_text("0.65\n0.7\n", encoding="utf-8")
    vocabulary = Vocabulary.from_text_files(tmp_path / "en.txt", tmp_path / "threshold.txt", tmp_path / "zh.txt")
    assert (vocabulary.tags, vocabulary.tags_zh) == (("bird", "blue sky"), ("鸟", "蓝天"))
    assert torch.equal(vocabulary.thresholds, torch.tensor([0.65, 0.7]))
    assert Vocabulary.from_text_files(tmp_path / "en.txt", 0.5).thresholds.tolist() == [0.5, 0.5]


def test_unreadable_text_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.txt"):
        Vocabulary.from_text_files(tmp_path / "absent.txt", 0.5)
    (tmp_path / "en.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="UTF-8"):
        Vocabulary.from_text_files(tmp_path / "en.txt", 0.5)
    (tmp_path / "words.txt").write_text("half", encoding="utf-8")
    with pytest.raises(SettingsError, match="found 'half'"):
        Vocabulary.from_text_files(tmp_path / "words.txt", tmp_path / "words.txt")

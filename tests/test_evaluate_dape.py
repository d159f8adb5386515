"""Tagger against DAPE on degraded photos, and against human words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesr_core.dape import DAPE, DAPEOutput, Vocabulary
from seesr_core.errors import DataError
from seesr_core.formats.ram import write_dape
from trainer.data.photos import read_photos
from trainer.evaluate.commands import main
from trainer.evaluate.semantics.dape import (
    Looks,
    Options,
    degraded_labels,
    evaluate,
    labels,
    look,
    photos_to_show,
    robustness,
    run_tagger,
    table,
)
from trainer.nano.tagger import targets

from .dape_nets import CONFIG, images, tiny_dape
from .tiny_model import photo

WORDS = tuple(f"word {i}" for i in range(CONFIG.num_tags))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(tags=WORDS, thresholds=torch.full((len(WORDS),), 0.5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of eight photos: word 0 on every second, word 1 on the first six, an unknown word on the last."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i in range(8):
        photo(64, 48, i).save(folder / f"{i}.png")
        tags = [WORDS[0]] * (i % 2) + [WORDS[1]] * (i < 6) + ["never heard"] * (i == 7)
        lines.append(json.dumps({"file": f"{i}.png", "tags": tags}))
    (folder / "list.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "list.jsonl"


def options(photos: Path, **changes) -> Options:
    paths = {name: Path(name) for name in ("tagger", "dape", "json")}
    return Options(photos=photos, **{"repeats": 2, "resamples": 50, "min_photos": 1, **paths, **changes})


def blinder(dape: DAPE, amount: float) -> DAPE:
    """The tagger with noise on its last projection of the image."""
    other = DAPE.from_state_dict({key: value.clone() for key, value in dape.state_dict().items()}, dape.config)
    noise = torch.randn(other.image_proj.weight.shape, generator=torch.Generator().manual_seed(0))
    other.image_proj.weight.data += amount * noise
    return other


def test_a_tagger_equals_itself_and_beats_a_spoilt_one(photos: Path, vocabulary: Vocabulary) -> None:
    tagger = tiny_dape()
    same, spoilt = (
        robustness(look(tagger, dape, read_photos(photos), options(photos)), vocabulary, options(photos))
        for dape in (tagger, blinder(tagger, 1.0))
    )
    assert same["rows"]["difference"]["map_tags"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert same["rows"]["tagger"] == same["rows"]["DAPE"] == spoilt["rows"]["tagger"]
    for key in ("map_tags", "map_photos"):
        assert spoilt["rows"]["difference"][key]["value"] < 0
    assert spoilt["rows"]["DAPE"]["soft_prompt_mse"] > 2 * spoilt["rows"]["tagger"]["soft_prompt_mse"]


def seen_alike(output: DAPEOutput, repeats: int, **others: Tensor) -> Looks:
    """A tagger to which a degraded photo looks as a clean one, and rivals with logits of their own."""
    tokens, logits = (torch.cat([part] * repeats) for part in output)
    rivals = {name: DAPEOutput(tokens, torch.cat([other] * repeats)) for name, other in others.items()}
    return Looks(clean=output, degraded={"tagger": DAPEOutput(tokens, logits), **rivals})


def test_without_degradation_the_tagger_finds_all_its_words(photos: Path, vocabulary: Vocabulary) -> None:
    uneven = replace(vocabulary, thresholds=torch.linspace(0.3, 0.7, len(WORDS)))
    with torch.no_grad():
        output = tiny_dape()(images(6))
    found = robustness(seen_alike(output, 2, DAPE=-output.logits_BN), uneven, options(photos))["rows"]
    assert found["tagger"]["soft_prompt_mse"] == 0
    for key in ("map_tags", "map_photos"):
        assert found["tagger"][key]["value"] == pytest.approx(100)
        assert found["DAPE"][key]["value"] < 90


def test_a_tagger_that_always_says_the_same_is_refused(photos: Path, vocabulary: Vocabulary) -> None:
    constant = replace(vocabulary, thresholds=torch.zeros(len(WORDS)))
    with pytest.raises(DataError, match="says the same of all"):
        robustness(look(tiny_dape(), tiny_dape(), read_photos(photos), options(photos)), constant, options(photos))


def test_frequency_baseline(photos: Path, vocabulary: Vocabulary) -> None:
    found = labels(tiny_dape(), vocabulary, read_photos(photos), [], options(photos))
    assert (found["photos"], found["tags"]) == (7, 2)
    baseline = found["rows"]["tag frequency"]
    # Over tags: the words' shares among the seven photos with words that the tagger knows. Over photos: word 1 is the
    # more frequent, so it comes first; photo 7 has word 0 alone, on place two.
    assert baseline["map_tags"]["value"] == pytest.approx(100 * (4 / 7 + 6 / 7) / 2)
    assert baseline["map_photos"]["value"] == pytest.approx(100 * (6 * 1 + 1 / 2) / 7)
    rare = labels(tiny_dape(), vocabulary, read_photos(photos), [], options(photos, min_photos=5))
    assert rare["tags"] == 1
    unknown = replace(vocabulary, tags=("x",) * 11)
    assert "absent" in labels(tiny_dape(), unknown, read_photos(photos), [], options(photos))


def test_human_words_on_degraded_photos(photos: Path, vocabulary: Vocabulary) -> None:
    listed = read_photos(photos)
    right = targets(listed, WORDS)
    looks = seen_alike(DAPEOutput(torch.zeros(8, 1, 1), right), 2, DAPE=-right)
    found = degraded_labels(looks, vocabulary, listed, options(photos))
    # Seven photos carry words that the tagger knows. Reversed, all of a word rank last: their share, as for a constant.
    assert (found["photos"], found["tags"]) == (7, 2)
    for key in ("map_tags", "map_photos"):
        assert found["rows"]["tagger"][key]["value"] == pytest.approx(100)
    assert found["rows"]["DAPE"]["map_tags"]["value"] == pytest.approx(100 * (4 / 7 + 6 / 7) / 2)
    unknown = replace(vocabulary, tags=("x",) * 11)
    assert "absent" in degraded_labels(looks, unknown, listed, options(photos))


def test_photos_kept_out_of_training_join_and_the_others_give_frequencies(photos: Path, vocabulary: Vocabulary) -> None:
    with_training = options(photos, train_photos=photos, holdout_every=3)
    shown, training = photos_to_show(with_training)
    # Of the seven photos with words every third is kept out: two more than the list itself has.
    assert (len(shown), len(training)) == (len(read_photos(photos)) + 2, 5)
    found = labels(tiny_dape(), vocabulary, shown[-2:], training, with_training)
    assert found["photos"] == 2
    assert found["frequencies_of"] == "training photos"


def test_command_line(photos: Path, vocabulary: Vocabulary, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, dape in {"tagger": tiny_dape(), "dape": blinder(tiny_dape(), 0.3)}.items():
        write_dape(tmp_path / f"{name}.safetensors", dape, vocabulary, dtype=torch.float32)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("tagger", "dape")}
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    more = ["--photos", str(photos), "--json", str(tmp_path / "r.json"), "--resamples", "20", "--repeats", "1"]
    assert main(["dape", *flags, *more, "--min-photos", "1"]) == 0
    report = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert capsys.readouterr().out == table(report)
    assert report == evaluate(options(photos, **paths, json=tmp_path / "again.json", resamples=20, repeats=1)), (
        "the same seed gives the same figures"
    )
    write_dape(paths["dape"], tiny_dape(), replace(vocabulary, tags=WORDS[::-1]))
    with pytest.raises(DataError, match="different words"):
        evaluate(options(photos, **paths))


def test_batches_do_not_matter() -> None:
    inputs = list(images(5).split(1))
    with torch.no_grad():
        one, all_ = run_tagger(tiny_dape(), inputs, batch=2), run_tagger(tiny_dape(), inputs, batch=5)
    assert torch.allclose(one.logits_BN, all_.logits_BN, atol=1e-5)

"""Stage 1: what is trained and what is not, the run from the command line, its files, and refusals."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from seesr_core.dape import DAPE, Vocabulary, merge_published_lora
from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.ram import read_adapter, read_dape, write_dape
from trainer.data.photos import Photo, read_photos
from trainer.degradation.ops import resize
from trainer.engine import command
from trainer.engine.command import get_recipe
from trainer.engine.journal import Figures, RunningMeans
from trainer.engine.loop import train
from trainer.stage1 import command as stage1
from trainer.stage1.networks import add_lora, export, read_teacher
from trainer.stage1.recipes import STAGE1_RECIPES, Stage1Config
from trainer.stage1.task import Stage1Task
from trainer.stage1.validation import hold_out
from trainer.stage2.recipes import STAGE2_RECIPES

from .dape_nets import CONFIG, images, seeded, tiny_dape

VOCABULARY = Vocabulary(tags=tuple(f"tag {i}" for i in range(CONFIG.num_tags)), thresholds=torch.full((11,), 0.5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of coloured blobs."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(4):
        blobs = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "tagger.safetensors"
    write_dape(path, tiny_dape(), VOCABULARY, dtype=torch.float32)
    return path


def debug(**loop: Any) -> Stage1Config:
    config = get_recipe(STAGE1_RECIPES, "debug")
    return replace(config, loop=replace(config.loop, **loop), export="fp32")


def make_task(photos: Path, config: Stage1Config | None = None, *, teacher: DAPE | None = None) -> Stage1Task:
    return Stage1Task(config or debug(), teacher or tiny_dape(), VOCABULARY, read_photos(photos))


def losses_of_one_batch(task: Stage1Task, learning_rate: float) -> list[float]:
    """The loss of the first batch before each of twelve steps on it."""
    task.trained.eval()
    optimizer = torch.optim.AdamW([p for p in task.trained.parameters() if p.requires_grad], lr=learning_rate)
    figures = []
    for _ in range(12):
        loss, _ = task.loss(0)
        figures.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return figures


def require_exact_resume(make: Callable[[], Stage1Task], folder: Path) -> dict[str, torch.Tensor]:
    """Train whole and in two parts, which must give the same weights; returns them."""
    expected = train(make(), debug().loop, folder / "whole")
    train(make(), debug(steps=3).loop, folder / "cut")
    resumed = train(make(), debug().loop, folder / "cut")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    return expected


def arguments(teacher: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return ["--recipe", "debug", "--teacher", str(teacher), "--data", str(photos), "--out", str(out), *more]


def test_the_student_starts_as_the_teacher_and_only_adapters_are_trained() -> None:
    teacher = tiny_dape().requires_grad_(False)
    student = add_lora(copy.deepcopy(teacher), debug(), seeded()).eval()
    torch.testing.assert_close(student(images()).logits_BN, teacher(images()).logits_BN, rtol=0, atol=1e-6)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    # q and v of four blocks, query and key of two layers, A and B of each.
    assert len(trained) == (4 * 2 + 2 * 2) * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_adapters_are_not_trained_sharded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match=r"ddp\.yaml"):
        make_task(photos)


def test_adapters_start_from_the_given_generator_and_leave_the_global_one_alone() -> None:
    taggers = [(tiny_dape(), seed) for seed in (0, 0, 1)]
    before = torch.get_rng_state()
    one, same, other = (add_lora(tagger, debug(), seeded(seed)).state_dict() for tagger, seed in taggers)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    name = next(key for key in one if ".lora_A." in key)
    assert not torch.equal(one[name], other[name])
    bound = one[name].shape[1] ** -0.5
    assert 0.8 * bound < one[name].abs().max() <= bound


def test_a_step_sends_gradients_to_the_adapters_and_repeats_itself(photos: Path) -> None:
    task = make_task(photos)
    losses = []
    for step in (0, 0, 1):
        torch.manual_seed(0)
        loss, figures = task.loss(step)
        losses.append(loss.item())
        means = read(figures)
        assert loss.item() == pytest.approx(means["tokens"] + means["logits"], rel=1e-6)
    loss.backward()
    reached = [p.grad is not None and bool(p.grad.any()) for n, p in task.trained.named_parameters() if "lora_B" in n]
    assert len(reached) == 12
    assert all(reached)
    assert losses[0] == losses[1] != losses[2]


def test_a_pool_draws_its_batches_again_as_they_were(photos: Path, tmp_path: Path) -> None:
    degradation = replace(debug().degradation, quantize=True)
    kept, fresh = (replace(debug(), degradation=degradation, pool=pool) for pool in (2, 0))
    task = Stage1Task(kept, tiny_dape(), VOCABULARY, read_photos(photos), pool_folder=tmp_path)
    first, again, other = (task._batch(step) for step in (1, 3, 2))
    assert len(list(tmp_path.iterdir())) == 2
    for pooled, made, later, different in zip(first, make_task(photos, fresh)._batch(1), again, other, strict=True):
        torch.testing.assert_close(pooled, made, rtol=0, atol=1e-6)
        assert torch.equal(pooled, later)
        assert not torch.equal(pooled, different)


def test_the_student_can_look_at_the_small_photo_as_in_use(photos: Path) -> None:
    small, enlarged = (make_task(photos, replace(debug(), student_input=kind)) for kind in ("small", "upsampled"))
    (lr, hr), (upsampled, same) = small._batch(0), enlarged._batch(0)
    assert lr.shape[-1] * 4 == hr.shape[-1] == upsampled.shape[-1]
    assert torch.equal(hr, same)
    torch.testing.assert_close(
        upsampled, resize(lr, "bicubic", size=hr.shape[-2:]).clamp(0, 1), rtol=0, atol=1 / 255 + 1e-6
    )
    assert small.loss(0)[0].item() != enlarged.loss(0)[0].item()
    assert small._pool_key() != enlarged._pool_key()


def test_a_pool_needs_degradation_rounded_to_8_bits() -> None:
    with pytest.raises(SettingsError, match="quantize"):
        replace(debug(), pool=2)


def test_dropout_is_active_in_the_student_and_not_in_the_teacher(photos: Path) -> None:
    task = make_task(photos)
    assert task.trained.training
    assert not task.teacher.training
    losses = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.add(task.loss(0)[0].item())
    assert len(losses) == 2


def read(figures: Figures) -> dict[str, float]:
    means = RunningMeans()
    means.add(figures)
    return means.means()


def test_the_weight_of_the_logits_is_lambda(photos: Path) -> None:
    task = make_task(photos, replace(debug(), logits_weight=3.0))
    loss, figures = task.loss(0)
    means = read(figures)
    assert loss.item() == pytest.approx(means["tokens"] + 3 * means["logits"], rel=1e-6)


def test_training_on_one_batch_brings_the_student_nearer_to_the_teacher(photos: Path) -> None:
    figures = losses_of_one_batch(make_task(photos), 0.02)
    assert figures[-1] < 0.9 * figures[0]


def test_the_command_trains_and_writes_everything(
    teacher_file: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stage1.main(arguments(teacher_file, photos, tmp_path, "--export", "fp32", "--loop.steps", "3")) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {"loss", "tokens", "logits", "grad_norm", "lr", "seconds"} <= lines[0].keys()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"{step:07d}.{kind}" for step in (2, 3) for kind in ("json", "png")
    ]
    report = json.loads((tmp_path / "samples" / "0000003.json").read_text("utf-8"))
    assert report["photos"][0].keys() == {"photo", "teacher_on_hr", "plain_on_lr", "dape_on_lr"}
    assert report["loss_plain"] != report["loss_dape"]
    with Image.open(tmp_path / "samples" / "0000003.png") as picture:
        assert picture.height == 64
        labels = np.asarray(picture)[:, : picture.width - 32]
    assert max(labels[:32].min(), labels[32:].min()) < 64
    assert not np.array_equal(labels[:32], labels[32:])
    with safe_open(tmp_path / "dape.safetensors", "pt") as file:
        assert file.metadata()["source"] == (
            f"stage 1, recipe debug, teacher tagger.safetensors, photos {photos.name}, 3 steps"
        )


def test_adapter_and_merged_file_are_one_model(teacher_file: Path, photos: Path, tmp_path: Path) -> None:
    task = make_task(photos, debug(learning_rate=0.05))
    tensors = train(task, task.config.loop, tmp_path)
    task.trained.load_state_dict(tensors, strict=False)
    expected = task.trained.eval()(images()).logits_BN
    merged, vocabulary = read_dape(export(task.trained, tensors, task.config, VOCABULARY, tmp_path, source="test"))
    assert vocabulary.tags == VOCABULARY.tags
    torch.testing.assert_close(merged(images()).logits_BN, expected, rtol=0, atol=1e-5)
    adapter, scaling = read_adapter(tmp_path / "dape-lora.safetensors")
    teacher, _ = read_dape(teacher_file)
    again = DAPE.from_state_dict(merge_published_lora(teacher.state_dict(), adapter, scaling=scaling), CONFIG)
    torch.testing.assert_close(again(images()).logits_BN, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(teacher(images()).logits_BN, expected, atol=1e-3)


def test_a_resumed_run_equals_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    require_exact_resume(lambda: make_task(photos), tmp_path)


def test_a_folder_of_another_run_is_refused(
    teacher_file: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stage1.main(arguments(teacher_file, photos, tmp_path, "--loop.steps", "1")) == 0
    with caplog.at_level(logging.ERROR):
        assert stage1.main(arguments(teacher_file, photos, tmp_path, "--degradation.sharpen.weight", "0.2")) == 1
    assert "other settings (degradation.sharpen.weight: 0.5 -> 0.2)" in caplog.text


def test_the_identity_tells_teachers_and_photos_apart(photos: Path) -> None:
    task = make_task(photos)
    other_teacher = Stage1Task(debug(), tiny_dape(seed=1), VOCABULARY, read_photos(photos))
    fewer_photos = Stage1Task(debug(), tiny_dape(), VOCABULARY, read_photos(photos)[:3])
    differing = [
        {name for name, value in task.identity().items() if other.identity()[name] != value}
        for other in (other_teacher, fewer_photos)
    ]
    assert differing == [{"teacher"}, {"photos"}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--crop", "3"), "crop must be at least the 14 pixels the degradation needs, found 3"),
        (("--rank", "0"), "rank, alpha and samples must be at least 1, found 0"),
        (("--min-scale", "2"), r"min_scale must lie in \[0, 1\], found 2"),
        (("--logits-weight", "-1"), "logits_weight must not be negative"),
        (("--recipe", "debgu"), "There is no recipe 'debgu'; there are paper, nano, debug. Did you mean 'debug'?"),
        (("--data", "/nowhere"), "/nowhere is no file or folder here; expected a folder of photos"),
        (("--teacher", "/nowhere.safetensors"), "/nowhere.safetensors"),
        (("--samples", "4"), "4 photos are too few: 4 are kept out to be shown"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_status_1(
    teacher_file: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    more: tuple[str, str],
    message: str,
) -> None:
    with caplog.at_level(logging.ERROR):
        assert stage1.main(arguments(teacher_file, photos, tmp_path, *more)) == 1
    [record] = caplog.records
    assert message.replace("\\", "") in record.getMessage()
    assert "\n" not in record.getMessage()


def test_ctrl_c_is_exit_status_130() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert command.run(interrupted) == 130


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["paper: The published DAPE", "--degradation.first.jpeg-quality", "--loop.steps"]),
        (["--recipe", "debug", "--help"], ["Hardware: any CPU; seconds.", "--teacher PATH", "default: 32"]),
    ],
)
def test_help_shows_recipes_and_every_setting(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        stage1.main(arguments)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert [text for text in expected if text not in shown] == []


def test_the_photos_shown_are_not_trained_on() -> None:
    listed = [Photo(Path(f"{index}.png")) for index in range(10)]
    training, shown = hold_out(listed, 3)
    assert [photo.path.stem for photo in shown] == ["0", "3", "6"]
    assert [photo for photo in listed if photo not in shown] == training
    with pytest.raises(DataError, match="3 photos are too few: 3 are kept out"):
        hold_out(listed[:3], 3)


def test_the_published_tagger_needs_its_lists_of_tags(tmp_path: Path) -> None:
    path, lists = tmp_path / "ram.safetensors", tmp_path / "lists"
    save_file(tiny_dape().state_dict(), path)
    with pytest.raises(SettingsError, match=r"holds no tag names: give the folder of ram_tag_list\.txt"):
        read_teacher(path)
    lists.mkdir()
    for name, word in (("ram_tag_list", "word"), ("ram_tag_list_chinese", "词"), ("ram_tag_list_threshold", "0.6")):
        (lists / f"{name}.txt").write_text("\n".join([word] * CONFIG.num_tags), "utf-8")
    teacher, vocabulary = read_teacher(path, lists)
    assert teacher.config.num_tags == len(vocabulary) == 11
    assert vocabulary.tags_zh == ("词",) * 11
    for text in lists.iterdir():
        text.write_text(text.read_text("utf-8") + "\n0.5", "utf-8")
    with pytest.raises(WeightsError, match=r"lists has 12 tags, .* has 11: use the lists of that model"):
        read_teacher(path, lists)


def test_the_paper_recipe_has_the_published_values() -> None:
    config = get_recipe(STAGE1_RECIPES, "paper")
    loop = config.loop
    assert (loop.steps, loop.batch_size, loop.learning_rate, loop.weight_decay) == (20_000, 32, 1e-4, 0.0)
    assert (loop.warmup, loop.milestones, loop.ema, loop.decay) == (50, (20_000, 30_000), 0.0, "constant")
    assert (config.crop, config.rank, config.alpha, config.logits_weight) == (512, 8, 1, 1.0)
    assert (config.antialias, config.degradation.scale, config.degradation.quantize) == (False, 4, True)


@pytest.mark.parametrize("table", [STAGE1_RECIPES, STAGE2_RECIPES], ids=["stage1", "stage2"])
def test_every_recipe_says_what_it_is_for_and_is_made_afresh(table) -> None:
    assert {"paper", "nano", "debug"} <= set(table)
    for name, recipe in table.items():
        for topic in ("Reproduces:", "Expected:", "Hardware:", "Command: python -m trainer."):
            assert topic in recipe.__doc__, (name, topic)
        one, other = get_recipe(table, name), get_recipe(table, name)
        one.loop.steps += 1
        assert asdict(one) != asdict(other)

"""Stage 1: a tagger learns to see through degradation (paper §3.2, equation 1).

    python -m trainer.stage1 --recipe NAME --teacher FILE --data PATH --out DIR [--loop.steps N …]

The teacher looks at the HR photo, the student (the same weights with a low-rank adapter) at its degraded version, as
published enlarged to the same size; both prompts of the student are pulled to the teacher's. Out come the adapter and
the merged DAPE.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr_core.dape import DAPE, DAPEOutput, Vocabulary, prepare
from seesr_core.dape.lora import fuse_qkv, lora_target_modules, unfuse_qkv
from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.detect import Kind, detect
from seesr_core.formats.ram import read_dape, read_ram, write_adapter, write_dape
from seesr_core.method.losses import PromptLoss, prompt_loss
from seesr_core.runtime.files import atomic_write

from ..capacity.dry_run import dry_run, show
from ..data.cache import FrozenCache, network_key
from ..data.crops import write_skipped
from ..data.fingerprints import digest, fingerprint, same_photos
from ..data.order import Stream, by_image, seeded
from ..data.pairs import check_groups, check_returns, given_pairs, make_crops, make_pairs
from ..data.photos import Photo, read_photos
from ..data.pool import Pool, PreparedPair
from ..engine import command
from ..engine.loop import flat, train
from ..engine.processes import is_main_process, refuse_sharded_adapters
from ..engine.samples import save_grid
from .recipes import STAGE1_RECIPES, Stage1Config

if TYPE_CHECKING:
    from peft import PeftModel

    from ..degradation import Pair

log = logging.getLogger(__name__)

SHOWN_TAGS = 10


@dataclass(kw_only=True)
class Stage1Command(command.StageCommand):
    """Train DAPE. The same command again resumes; single settings of the recipe are overridden by the flags below."""

    teacher: Path
    """The tagger: `dape*.safetensors`, or the published `ram_swin_large_14m.pth` together with --tag-lists."""
    data: str
    """HR photos: a folder, a .jsonl list, webdataset shards (.tar, also at an address), or a mixture (.toml)."""
    config: Annotated[Stage1Config, command.SETTINGS]
    """Settings that override the recipe's."""
    tag_lists: Path | None = None
    """Folder with `ram_tag_list.txt`, `ram_tag_list_threshold.txt` and maybe `ram_tag_list_chinese.txt`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(command.parse(Stage1Command, STAGE1_RECIPES, argv, prog="python -m trainer.stage1")))


def run(options: Stage1Command) -> Path | None:
    """Read what the command names and train; returns the merged file."""
    teacher, vocabulary = read_teacher(options.teacher, options.tag_lists)
    photos = read_photos(options.data)
    if options.dry_run:
        show(dry_run(Stage1Task(options.config, teacher, vocabulary, photos), options.config.loop))
        return None
    source = f"stage 1, recipe {options.recipe}, teacher {options.teacher.name}, photos {Path(options.data).name}"
    return train_dape(options.config, teacher, vocabulary, photos, options.out, source=source)


def read_teacher(path: Path, tag_lists: Path | None = None) -> tuple[DAPE, Vocabulary]:
    """A tagger with the names of its tags; the published file has none, so they come from `tag_lists`.

    Raises:
        WeightsError: no tagger.
        SettingsError: the published file without its tag lists, or with lists of another length.
    """
    if detect(path).kind is not Kind.RAM:
        return read_dape(path)
    if tag_lists is None:
        raise SettingsError(
            f"{path} holds no tag names: give the folder of ram_tag_list.txt and ram_tag_list_threshold.txt "
            "(data/ of the recognize-anything repository) by --tag-lists, or convert the file first."
        )
    chinese = tag_lists / "ram_tag_list_chinese.txt"
    vocabulary = Vocabulary.from_text_files(
        tag_lists / "ram_tag_list.txt",
        tag_lists / "ram_tag_list_threshold.txt",
        chinese if chinese.is_file() else None,
    )
    teacher = read_ram(path)
    if len(vocabulary) != teacher.config.num_tags:
        raise SettingsError(f"{path} knows {teacher.config.num_tags} tags, but {tag_lists} names {len(vocabulary)}.")
    return teacher, vocabulary


def train_dape(
    config: Stage1Config,
    teacher: DAPE,
    vocabulary: Vocabulary,
    photos: Sequence[Photo],
    out: Path,
    *,
    source: str = "stage 1",
) -> Path:
    """Run or resume stage 1.

    Args:
        config: a recipe.
        teacher: the tagger; frozen in place and moved to the device.
        vocabulary: its tags.
        photos: HR photos.
        out: folder of the run; `dape.safetensors` and `dape-lora.safetensors` are written there at the end.
        source: where the result comes from, for its metadata.

    Returns:
        The path of `dape.safetensors`.

    Raises:
        DataError: too few photos, or `out` holds another run.
        SettingsError: the launcher shards the networks.
    """
    task = Stage1Task(config, teacher, vocabulary, photos, pool_folder=out / "pool", teacher_folder=out / "teacher")
    if is_main_process():
        write_skipped(task.crops, out)
    try:
        tensors = train(task, config.loop, out, identity=task.identity())
    finally:
        if task.seen is not None:
            task.seen.write()
    if not is_main_process():
        return out / "dape.safetensors"
    return export(task.trained, tensors, config, vocabulary, out, source=f"{source}, {config.loop.steps} steps")


class Stage1Task:
    """Equation 1 on degraded crops; `trained` is the student as a peft model whose adapter alone is trained."""

    def __init__(
        self,
        config: Stage1Config,
        teacher: DAPE,
        vocabulary: Vocabulary,
        photos: Sequence[Photo],
        *,
        pool_folder: Path | None = None,
        teacher_folder: Path | None = None,
    ) -> None:
        self.config, self.vocabulary = config, vocabulary
        refuse_sharded_adapters()
        check_groups(config.loop, config.degradation_group)
        self.device = config.loop.resolve_device()
        self.size = teacher.config.swin.image_size
        training, shown = hold_out(photos, config.samples)
        seed = config.loop.seed
        self.crops = make_crops(training, config)
        self.shown = make_crops(shown, config, workers=0)
        self.pool = Pool(config.pool * config.loop.parts, self._pool_key(), pool_folder, kind=PreparedPair)
        self.teacher = teacher.requires_grad_(False).eval().to(self.device)
        self.seen: FrozenCache | None = None
        if config.cache_teacher:
            if not config.pool:
                check_returns(self.crops, "cache_teacher")
            self.seen = FrozenCache(network_key(config.loop, self.teacher), teacher_folder, parts=2)
        student = add_lora(copy.deepcopy(self.teacher), config, seeded(seed, Stream.STAGE1_ADAPTER))
        self.trained = student.to(self.device).train()

    @property
    def frozen(self) -> list[nn.Module]:
        """Networks that are only looked through and not trained."""
        return [self.teacher]

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Equation 1 of one part of a batch, its terms as figures."""
        lr, hr = self._batch(step)
        loss = self._compare(self.trained(self._prepare(lr)), self._target(self._prepare(hr)))
        return loss.total, {"tokens": loss.tokens.item(), "logits": loss.logits.item()}

    @torch.no_grad()
    def _target(self, image_B3HW: Tensor) -> DAPEOutput:
        """What the teacher makes of its input, from the cache if it has seen it before."""
        if self.seen is None:
            return self.teacher(image_B3HW)
        found = self.seen.batch([image_B3HW], lambda: self.teacher(image_B3HW))
        return DAPEOutput(*(part.to(self.device) for part in found))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The degraded and the clean crops of a part of a batch, from the pool if there is one."""
        if not self.config.pool:
            return self._fresh(step)
        kept = self.pool.get(step, self._prepared)
        return kept.lr.to(self.device).float().div(255), kept.hr.to(self.device).float().div(255)

    def _fresh(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded anew, or as given with the photos."""
        count = self.config.loop.micro_batch
        if self.crops.paired:
            pair, _ = given_pairs(self.crops, number, count, device=self.device)
            return self._looked_at(pair), pair.hr_usm
        return self._pair(self.crops.batch(number, count)[0], number)

    def _prepared(self, number: int) -> PreparedPair:
        lr, hr = self._fresh(number)
        return PreparedPair(*(image.mul(255).round().to(torch.uint8).cpu() for image in (lr, hr)))

    def _pool_key(self) -> str:
        """Everything that a prepared batch depends on."""
        settings = asdict(self.config)
        parts = [settings[name] for name in ("crop", "min_scale", "degradation", "degradation_group", "student_input")]
        parts += ["by image", self.config.loop.seed, self.config.loop.micro_batch, same_photos(self.crops.photos)]
        if self.config.fixed_crops:
            parts.append("fixed crops")
        return digest(repr(part).encode() for part in parts)

    def _pair(self, hr_B3HW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Degraded crops as the student looks at them, and the clean ones."""
        numbers, first = (self.config.loop.seed, Stream.STAGE1_DEGRADATION), step * self.config.loop.micro_batch
        group = self.config.degradation_group
        pair = make_pairs(
            hr_B3HW, self.config.degradation, numbers=numbers, first=first, group=group, device=self.device
        )
        return self._looked_at(pair), pair.hr_usm

    def _looked_at(self, pair: Pair) -> Tensor:
        return pair.lr if self.config.student_input == "small" else pair.lr_upsampled

    def _prepare(self, image_B3HW: Tensor) -> Tensor:
        return prepare(image_B3HW, self.size, antialias=self.config.antialias)

    def _compare(self, output: DAPEOutput, target: DAPEOutput) -> PromptLoss:
        return prompt_loss(*output, *target, weight=self.config.logits_weight)

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Write the photos kept out: HR above degraded as a picture, and what each tagger sees in them as JSON.

        Returns equation 1 of these photos with and without the adapter.
        """
        draws = by_image(self.config.loop.seed, Stream.STAGE1_SHOWN, images=range(len(self.shown)))
        crops = [self.shown.crop(i, generator) for i, generator in enumerate(draws)]
        lr, hr = self._pair(torch.stack(crops), -1)
        self.trained.eval()
        seen = {
            "teacher_on_hr": self.teacher(self._prepare(hr)),
            "plain_on_lr": self.teacher(self._prepare(lr)),
            "dape_on_lr": self.trained(self._prepare(lr)),
        }
        self.trained.train()
        save_grid(folder / f"{step:07d}.png", [hr, F.interpolate(lr, hr.shape[-2:])])
        with atomic_write(folder / f"{step:07d}.json") as temporary:
            temporary.write_text(json.dumps(report := self._report(seen), indent=1, ensure_ascii=False), "utf-8")
        return {"val_loss": report["loss_dape"], "val_loss_plain": report["loss_plain"]}

    def _report(self, seen: Mapping[str, DAPEOutput]) -> dict[str, Any]:
        """Equation 1 without and with the adapter, and the strongest tags of each photo."""
        tags = {name: self.vocabulary.select(output.logits_BN, max_tags=SHOWN_TAGS) for name, output in seen.items()}
        photos = [
            {"photo": photo.path.name, **{name: [tag.name for tag in found[i]] for name, found in tags.items()}}
            for i, photo in enumerate(self.shown.photos)
        ]
        target = seen["teacher_on_hr"]
        plain, dape = (self._compare(seen[name], target).total.item() for name in ("plain_on_lr", "dape_on_lr"))
        return {"loss_plain": plain, "loss_dape": dape, "photos": photos}

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, beside the settings of the loop."""
        settings = asdict(self.config)
        kept = {name: settings[name] for name in settings.keys() - {"loop", "export", "cache_teacher"}}
        return {
            "stage": 1,
            **flat(kept),
            "photos": same_photos(self.crops.photos),
            "teacher": fingerprint(self.teacher),
        }


def hold_out(photos: Sequence[Photo], count: int) -> tuple[list[Photo], list[Photo]]:
    """The photos to train on, and `count` others taken evenly from all over the list.

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(photos) <= count:
        raise DataError(
            f"{len(photos)} photos are too few: {count} are kept out to be shown. Add photos or lower samples."
        )
    shown = {index * len(photos) // count for index in range(count)}
    return [p for i, p in enumerate(photos) if i not in shown], [p for i, p in enumerate(photos) if i in shown]


def add_lora(dape: DAPE, config: Stage1Config, generator: torch.Generator) -> PeftModel:
    """Make a frozen tagger trainable through an adapter on the published layers; its outputs are unchanged at first.

    Args:
        dape: changed in place: its projections are split and its layers wrapped.
        config: rank and alpha.
        generator: of the start values: A as LoRA's authors draw it, B zero.
    """
    from peft import LoraConfig, get_peft_model

    unfuse_qkv(dape)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=lora_target_modules(dape))
    # peft draws start values from the global generator: they are drawn again below, and its state is put back.
    with torch.random.fork_rng():
        student = get_peft_model(dape, lora)
    for name, parameter in student.named_parameters():
        if ".lora_A." in name:
            start = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.data.copy_(start)
    return student


def export(
    student: PeftModel,
    tensors: Mapping[str, Tensor],
    config: Stage1Config,
    vocabulary: Vocabulary,
    out: Path,
    *,
    source: str,
) -> Path:
    """Write the adapter and the merged tagger; consumes the student. Returns the path of the merged file."""
    from peft import get_peft_model_state_dict

    student.load_state_dict(dict(tensors), strict=False)
    student.cpu().eval()
    adapter = get_peft_model_state_dict(student, save_embedding_layers=False)
    write_adapter(
        out / "dape-lora.safetensors", adapter, _plain(student.peft_config["default"].to_dict()), source=source
    )
    merged = fuse_qkv(student.merge_and_unload())
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[config.export]
    write_dape(out / "dape.safetensors", merged, vocabulary, source=source, dtype=dtype)
    log.info("wrote %s and dape-lora.safetensors beside it", out / "dape.safetensors")
    return out / "dape.safetensors"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """peft's configuration as JSON types: it holds sets."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}

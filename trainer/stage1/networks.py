"""The networks of stage 1: teacher, student with its adapter, and the files that come of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seesr_core.dape import DAPE, Vocabulary
from seesr_core.dape.lora import fuse_qkv, lora_target_modules, unfuse_qkv
from seesr_core.errors import SettingsError
from seesr_core.formats.detect import Kind, detect
from seesr_core.formats.ram import read_dape, read_ram_with_lists, write_adapter, write_dape

from .recipes import Stage1Config

if TYPE_CHECKING:
    from peft import PeftModel


log = logging.getLogger(__name__)


def read_teacher(path: Path, tag_lists: Path | None = None) -> tuple[DAPE, Vocabulary]:
    """A tagger with the names of its tags; the published file has none, so they come from `tag_lists`.

    Raises:
        WeightsError: no tagger, or lists that are missing or of another length.
        SettingsError: the published file without its tag lists.
    """
    if detect(path).kind is not Kind.RAM:
        return read_dape(path)
    if tag_lists is None:
        raise SettingsError(
            f"{path} holds no tag names: give the folder of ram_tag_list.txt and ram_tag_list_threshold.txt "
            "(data/ of the recognize-anything repository) by --tag-lists, or convert the file first."
        )
    return read_ram_with_lists(path, None, tag_lists)


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

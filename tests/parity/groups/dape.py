"""The tagger: its prepared input, soft prompt, logits and tags, with and without the published kind of adapter."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seesr_core.dape import DAPE, Vocabulary, merge_published_lora, tagger_input
from seesr_core.dape.lora import PEFT_PREFIX, SCALING, published_lora_to_peft, unfuse_qkv

from ..compare import Comparison
from ..weights import rule_state_dict

GROUP = "dape"
# Encoders too large for the fast tests.
FULL_SIZE = ("swin_l",)
# An adapter of nets that tagging does not use, merged into tied weights by a side effect: not a behaviour to reproduce.
SKIPPED_RUNS = ("dape_allB_doublemerge",)
EMBEDS, LOGITS, PIXELS = 1e-4, 5e-4, 1e-5

Resampling = tuple[bool, Literal["bilinear", "bicubic"]]
RESAMPLING: dict[str, Resampling] = {
    "big_aa": (True, "bilinear"),
    "big_noaa": (False, "bilinear"),
    "big_trainbicubic": (False, "bicubic"),
}


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Every variant in `folder/dape`, recognised by its meta file."""
    root = folder / GROUP
    inputs = load_file(root / "inputs.safetensors")
    yield from preparation(inputs)
    for meta_file in sorted(root.glob("*_meta.json")):
        variant = meta_file.name.removesuffix("_meta.json")
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        outputs = load_file(root / f"{variant}_outputs.safetensors")
        yield from shrinking(variant, meta, inputs["img_big_u8"], outputs)
        if full or not variant.startswith(FULL_SIZE):
            yield from _runs(folder, variant, meta, inputs["ram_input"], outputs)


def preparation(inputs: dict[str, Tensor]) -> Iterator[Comparison]:
    """The photos against the network input made from them (without antialiasing, as the published environment)."""
    expected = inputs["ram_input"]
    for index in range(len(expected)):
        prepared = tagger_input(_picture(inputs[f"img{index}_u8"]), expected.shape[-1], antialias=False)
        yield Comparison.of(GROUP, "inputs", f"img{index}.prepared", prepared, expected[index : index + 1], PIXELS)


def shrinking(
    variant: str, meta: dict[str, Any], image_HW3: Tensor, outputs: dict[str, Tensor]
) -> Iterator[Comparison]:
    """A photo larger than the network's input, by every way of shrinking that the variant's meta file lists."""
    for name, (antialias, mode) in RESAMPLING.items():
        if name in meta:
            prepared = tagger_input(_picture(image_HW3), meta[name]["shape"][-1], antialias=antialias, mode=mode)
            sliced = prepared[_slices(meta[name]["slice"])]
            yield Comparison.of(GROUP, variant, f"{name}_slice", sliced, outputs[f"{name}_slice"], PIXELS)


def _runs(
    folder: Path, variant: str, meta: dict[str, Any], x_B3HW: Tensor, outputs: dict[str, Tensor]
) -> Iterator[Comparison]:
    root = folder / GROUP
    vocabulary = _vocabulary(folder, load_file(root / "class_threshold.safetensors")["class_threshold"])
    for run, facts in meta["runs"].items():
        if run not in SKIPPED_RUNS:
            tagger = _tagger(root, variant, meta.get("salt", ""), run)
            yield from _run(f"{variant}.{run}", tagger, x_B3HW, _expected(outputs, run), facts, vocabulary)


def _picture(image_HW3: Tensor) -> Tensor:
    return image_HW3.permute(2, 0, 1)[None].float() / 255


def _slices(text: str) -> tuple[slice, ...]:
    """`"[:,:,::6,::6]"` as slices."""
    steps = [re.fullmatch(r":(?::(\d+))?", part.strip()) for part in text.strip("[] ").split(",")]
    if None in steps:
        raise ValueError(f"a slice such as [:,:,::6,::6] was expected, this is {text}")
    return tuple(slice(None, None, int(step[1] or 1)) for step in steps if step)


def _expected(outputs: dict[str, Tensor], run: str) -> dict[str, Tensor]:
    """The run's own tensors; a run without them (adapter not merged) has to equal the one it is a variant of."""
    name = run if f"{run}.logits" in outputs else run.removesuffix("_unmerged")
    return {key.removeprefix(f"{name}."): value for key, value in outputs.items() if key.startswith(f"{name}.")}


@torch.inference_mode()
def _run(
    case: str, tagger: DAPE, x_B3HW: Tensor, expected: dict[str, Tensor], facts: dict[str, Any], vocabulary: Vocabulary
) -> Iterator[Comparison]:
    tokens, logits = tagger(x_B3HW)
    yield Comparison.of(GROUP, case, "image_embeds", tokens, expected["image_embeds"], EMBEDS)
    yield Comparison.of(GROUP, case, "logits", logits, expected["logits"], LOGITS)
    yield Comparison.of(GROUP, case, "sigmoid", logits.sigmoid(), expected["sigmoid"], LOGITS)
    found = vocabulary.select(logits)
    quantities: dict[str, object] = {
        "n_tags": [len(tags) for tags in found],
        "tag_index": [[tag.index for tag in tags] for tags in found],
    }
    if vocabulary.tags[0] != _placeholder(0):
        quantities["tag_string"] = vocabulary.prompt_tags(logits)
    for quantity, value in quantities.items():
        if quantity in facts:
            yield Comparison.equal(GROUP, case, quantity, value, facts[quantity])


def _vocabulary(folder: Path, thresholds: Tensor) -> Vocabulary:
    """The public tag names where they lie beside the golden numbers, else placeholders that are not compared."""
    names = folder.parent / "data" / "tags" / "ram_tag_list.txt"
    if names.is_file():
        public = Vocabulary.from_text_files(names, 1.0)
        if len(public) == len(thresholds):
            return Vocabulary(tags=public.tags, thresholds=thresholds)
    return Vocabulary(tags=tuple(_placeholder(i) for i in range(len(thresholds))), thresholds=thresholds)


def _placeholder(index: int) -> str:
    return f"tag-{index}"


def _tagger(root: Path, variant: str, salt: str, run: str) -> DAPE:
    """Plain RAM for the runs called `ram…`, else with the adapter, merged or (for `…_unmerged`) beside the weights."""
    keys = _key_list(root / f"{variant}_ram_pth_keys.json.gz")
    needed = {key: entry["shape"] for key, entry in keys.items() if entry["used_for_tagging_and_embeds"]}
    state = rule_state_dict(needed, salt)
    if run.startswith("ram"):
        return DAPE.from_state_dict(state)
    adapter = _adapter(root / f"{variant}_dape_pth_keys.json.gz", salt)
    if run.endswith("_unmerged"):
        return attach_adapter(DAPE.from_state_dict(state), adapter)
    return DAPE.from_state_dict(merge_published_lora(state, adapter))


def _adapter(key_list: Path, salt: str) -> dict[str, Tensor]:
    keys = _key_list(key_list)
    made = rule_state_dict({key: entry["shape"] for key, entry in keys.items()}, salt)
    return {key: made[key] * (not entry["zero_in_fixture"]) for key, entry in keys.items()}


def _key_list(path: Path) -> dict[str, dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return json.load(handle)


class AdaptedLinear(nn.Module):
    """A linear layer with its low-rank adapter kept apart: y = Wx + b + s · B(Ax)."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, a, b

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        return self.linear(x) + SCALING * (x @ self.a.T @ self.b.T)


def attach_adapter(tagger: DAPE, adapter: dict[str, Tensor]) -> DAPE:
    """Hang a published adapter beside the weights of an unfused tagger, as in training."""
    parts = published_lora_to_peft(adapter)
    unfuse_qkv(tagger)
    for stem in sorted({key.removesuffix(".lora_A.weight") for key in parts if key.endswith(".lora_A.weight")}):
        parent, _, child = stem.removeprefix(PEFT_PREFIX).rpartition(".")
        owner = tagger.get_submodule(parent)
        adapted = AdaptedLinear(getattr(owner, child), parts[f"{stem}.lora_A.weight"], parts[f"{stem}.lora_B.weight"])
        setattr(owner, child, adapted)
    return tagger

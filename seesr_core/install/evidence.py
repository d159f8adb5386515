"""What tells relatives of Stable Diffusion 2 apart, whose files have the same keys and shapes.

2-base, 2.1-base, SD-turbo (all predict ε) and the v-predicting 2.0 and 2.1 cannot be told by shapes. What remains is
what somebody wrote down (a scheduler's config, metadata, a yaml beside the file) and one statistic of the weights that
ComfyUI goes by, too. Each is reported as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..formats import configs
from ..formats.border import one_sentence
from ..formats.schema import MalformedError, read_json
from ..formats.tensorfile import Header, load_tensors
from ..runtime.files import read_text

EPSILON, V = "epsilon", "v"
_STATED = re.compile(r"parameterization:\s*[\"']?(v|eps)")
_NORM_BIAS = (
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
_V_SPREAD = 0.09
"""ComfyUI takes a model for a v-predicting one if that bias spreads more than this."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One hint, read by a person and by the program."""

    text: str
    """The hint as a clause."""
    prediction: str = ""
    """What it speaks for: "epsilon" or "v"; empty if it says nothing of that."""
    turbo: bool = False
    """Whether the hint speaks for SD-turbo."""
    stated: bool = True
    """Whether somebody wrote it down, as against a statistic."""


def evidence_for(header: Header) -> list[Evidence]:
    """Everything that can be found out about a file with a Stable Diffusion 2 U-Net, the firmest first."""
    path = header.path
    return [*_scheduler(path), *_metadata(header.metadata), *_yaml(path), *_statistic(header)]


def prediction(evidence: list[Evidence]) -> str:
    """What the firmest hint says: "epsilon", "v", or "" if there is none."""
    return next((item.prediction for item in evidence if item.prediction), "")


def is_stated(evidence: list[Evidence]) -> bool:
    """Whether that rests on more than a statistic."""
    return next((item.stated for item in evidence if item.prediction), False)


def is_turbo(evidence: list[Evidence]) -> bool:
    """Whether anything speaks for SD-turbo."""
    return any(item.turbo for item in evidence)


def _scheduler(path: Path) -> Iterator[Evidence]:
    """`…/unet/diffusion_pytorch_model.safetensors` has `…/scheduler/scheduler_config.json` beside its folder."""
    config = path.parent.parent / "scheduler" / "scheduler_config.json"
    try:
        values = configs.taken(configs.Scheduler, read_json(config))
    except (OSError, MalformedError):
        return
    kind, spacing = values.get("prediction_type", "epsilon"), values.get("timestep_spacing", "leading")
    turbo = spacing == "trailing"
    text = f"its scheduler's config says prediction_type {kind}, timestep_spacing {spacing}"
    yield Evidence(f"{text}{' (as of SD-turbo)' if turbo else ''}", V if kind.startswith("v") else EPSILON, turbo)


def _metadata(entries: Mapping[str, str]) -> Iterator[Evidence]:
    stated = entries.get("modelspec.prediction_type") or entries.get("modelspec.predict_key") or ""
    if stated:
        yield Evidence(f"its metadata says prediction type {stated}", V if stated.startswith("v") else EPSILON)
    title = " ".join(entries.get(f"modelspec.{name}", "") for name in ("title", "architecture")).strip()
    if title:
        yield Evidence(f"its metadata calls it {title!r}", turbo="turbo" in title.lower())


def _yaml(path: Path) -> Iterator[Evidence]:
    beside = path.with_suffix(".yaml")
    try:
        found = _STATED.search(read_text(beside, 1 << 20))
    except OSError:
        return
    if found:
        yield Evidence(f"{beside.name} beside it says parameterization {found[1]}", V if found[1] == "v" else EPSILON)


def _statistic(header: Header) -> Iterator[Evidence]:
    key = next((key for name in _NORM_BIAS for key in header.tensors if key.endswith(name)), None)
    if key is None:
        return
    with one_sentence(header.path):
        spread = float(load_tensors(header.path, lambda name: name == key)[key].float().std(correction=0))
    side = "above" if spread > _V_SPREAD else "up to"
    kind = V if spread > _V_SPREAD else EPSILON
    yield Evidence(
        f"its last norm's bias spreads by {spread:.3f}, {side} {_V_SPREAD} (ComfyUI's rule of thumb for {kind})",
        kind,
        stated=False,
    )

"""The rule that makes weights from key names, so that full-size networks can be compared without any weights file.

A weight depends on its key in the published state dict, its shape and a salt: standard normal numbers of PCG64
seeded by the first 8 bytes (little endian) of sha256(salt + key), times 0.02 for biases, 1 + 0.02·w for norm
weights, w for the RAM label embedding, and w / sqrt(fan_in) for the rest (times 4 for RAM's `fc.weight`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NATURAL = ("relative_position_index", "attn_mask", "position_ids")


def rule_weight(key: str, shape: Sequence[int], salt: str = "") -> Tensor:
    """The rule's float32 tensor for `key`."""
    seed = int.from_bytes(hashlib.sha256((salt + key).encode()).digest()[:8], "little")
    count = math.prod(shape)
    w = np.random.Generator(np.random.PCG64(seed)).standard_normal(count, dtype=np.float32).reshape(tuple(shape))
    if key.endswith("bias"):
        return torch.from_numpy(w * np.float32(0.02))
    if len(shape) == 1 and key.endswith("weight"):
        return torch.from_numpy(np.float32(1.0) + np.float32(0.02) * w)
    if key == "label_embed":
        return torch.from_numpy(w)
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    gain = 4.0 if key == "fc.weight" else 1.0
    return torch.from_numpy(w * np.float32(gain / math.sqrt(fan_in)))


def rule_state_dict(shapes: Mapping[str, Sequence[int]], salt: str = "") -> dict[str, Tensor]:
    """Rule-made weights for every key that the rule covers (computed buffers are left out)."""
    return {key: rule_weight(key, shape, salt) for key, shape in shapes.items() if is_ruled(key)}


def is_ruled(key: str) -> bool:
    """Whether the rule covers a key; computed buffers have their natural values."""
    return not key.endswith(_NATURAL)


def read_key_shapes(path: Path) -> dict[str, list[int]]:
    """A `*_keys.json.gz` list: state-dict key -> shape."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return _as_shapes(json.load(handle))


def _as_shapes(data: object) -> dict[str, list[int]]:
    if isinstance(data, dict):
        return {key: list(value["shape"] if isinstance(value, dict) else value) for key, value in data.items()}
    raise ValueError(f"a key list should be an object of key -> shape, this is a {type(data).__name__}")

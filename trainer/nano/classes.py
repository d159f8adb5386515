"""RAM's words for ImageNet's classes: what a classifier sees, said in the words that a tagger is asked for.

`imagenet_words.tsv` names for each class the words that are always true of it: its own name where RAM has it, the kinds
it belongs to (a moped is a motorcycle and a vehicle), and what such pictures hardly ever lack (a person in a gown).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..deep_features import CLASSES

_TABLE = Path(__file__).with_name("imagenet_words.tsv")


def class_words() -> list[tuple[str, ...]]:
    """The words of every class, in the classifier's order; none where no word of RAM's is true of it."""
    words: list[tuple[str, ...]] = [()] * CLASSES
    with _TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            words[int(row["class"])] = tuple(row["words"].split(", "))
    return words


def membership(words: Sequence[str]) -> Tensor:
    """1 where a word is true of a class: float (classes, words)."""
    return torch.tensor([[float(word in true) for word in words] for true in class_words()])


def word_probabilities(logits_BK: Tensor, membership_KN: Tensor) -> Tensor:
    """The probability of each word, that of all the classes it is true of: (B, K) and (K, N) to (B, N) in [0, 1]."""
    return (logits_BK.float().softmax(1) @ membership_KN).clamp(max=1.0)

"""The tags a tagger knows, their names in two languages, and the scores above which they are believed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SettingsError, WeightsError
from ..formats.schema import MalformedError, Number, parse_json, read
from ..runtime.files import read_text

Language = Literal["en", "zh"]
SEPARATOR = ", "
_MOST_BYTES = 1 << 24
"""Of a tag list; RAM's have some ten thousand."""


def split_words(text: str) -> list[str]:
    """The words of a list separated by commas, Chinese ones too; empty ones are passed over."""
    return [word.strip() for word in text.replace("，", ",").split(",") if word.strip()]


@dataclass(slots=True, frozen=True)
class Tag:
    """A tag found in an image."""

    name: str
    """The tag in the language asked for."""
    score: float
    """Sigmoid of the logit, in (0, 1)."""
    index: int
    """Position in the vocabulary."""


@dataclass(kw_only=True, slots=True, frozen=True, eq=False)
class Vocabulary:
    """Tag names and thresholds, in the order of a tagger's logits."""

    tags: tuple[str, ...]
    """English names."""
    thresholds: Tensor
    """(N,) float32: the score a tag must exceed, 0 to 1."""
    tags_zh: tuple[str, ...] = ()
    """Chinese names; empty if there are none."""

    def __post_init__(self) -> None:
        count = len(self.tags)
        if not count or self.thresholds.shape != (count,) or len(self.tags_zh) not in (0, count):
            raise SettingsError(
                f"A vocabulary needs one threshold per tag and as many Chinese names or none; found {count} tags, "
                f"thresholds of shape {tuple(self.thresholds.shape)} and {len(self.tags_zh)} Chinese names."
            )

    def __len__(self) -> int:
        return len(self.tags)

    def names(self, language: Language = "en") -> tuple[str, ...]:
        """All names in one language.

        Raises:
            SettingsError: another language than "en" and "zh", or a vocabulary without Chinese names.
        """
        if language not in ("en", "zh"):
            raise SettingsError(f"Tags are known in 'en' and 'zh'; '{language}' was asked for.")
        if language == "zh" and not self.tags_zh:
            raise SettingsError("This model has no Chinese tag names; ask for language 'en'.")
        return self.tags if language == "en" else self.tags_zh

    def select(
        self,
        logits_BN: Tensor,
        *,
        threshold: float = 1.0,
        exclude: Iterable[str] = (),
        language: Language = "en",
        max_tags: int | None = None,
    ) -> list[list[Tag]]:
        """The tags of each image, in vocabulary order as in the published implementation.

        Args:
            logits_BN: the tagger's logits.
            threshold: factor on every tag's own threshold; a tag passes when its score is strictly above the product.
            exclude: names never returned, in either language, whatever their case.
            language: of the returned names.
            max_tags: at most so many per image, those with the highest scores; None for all.

        Raises:
            SettingsError: logits of another vocabulary, an unknown language or a negative number.
        """
        names = self.names(language)
        self._check(logits_BN, threshold, max_tags)
        scores_BN = logits_BN.detach().float().cpu().sigmoid()
        passed_BN = scores_BN > self.thresholds * threshold
        passed_BN[:, self._positions(exclude)] = False
        kept = [_strongest(scores, passed, max_tags) for scores, passed in zip(scores_BN, passed_BN, strict=True)]
        return [
            [Tag(names[i], scores[i].item(), i) for i in indices]
            for scores, indices in zip(scores_BN, kept, strict=True)
        ]

    def prompt_tags(self, logits_BN: Tensor, **how: Any) -> list[str]:
        """The tags of each image joined by ", "; `how` and errors as those of `select`."""
        return [SEPARATOR.join(tag.name for tag in tags) for tags in self.select(logits_BN, **how)]

    def to_metadata(self) -> dict[str, str]:
        """The entries `tags`, `tags_zh` and `thresholds` of a file's metadata, as JSON."""
        # numpy prints the shortest decimal that gives the same float32 back.
        thresholds = [float(str(value)) for value in self.thresholds.float().numpy()]
        entries = {"tags": list(self.tags), "tags_zh": list(self.tags_zh), "thresholds": thresholds}
        return {key: json.dumps(value, ensure_ascii=False) for key, value in entries.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Vocabulary:
        """Inverse of `to_metadata`.

        Raises:
            WeightsError: an entry is missing or is not JSON of the right kind.
        """
        try:
            tags, chinese = (
                read(tuple[str, ...], parse_json(metadata.get(name, "[]")), name) for name in ("tags", "tags_zh")
            )
            thresholds = read(list[Number], parse_json(metadata["thresholds"]), "thresholds")
            return cls(tags=tags, tags_zh=chinese, thresholds=torch.tensor(thresholds, dtype=torch.float32))
        except (KeyError, MalformedError, SettingsError) as error:
            raise WeightsError(
                f"The tag list in the file's metadata cannot be read ({error}); it should hold tags and thresholds as "
                "JSON lists of one length. Convert the model again."
            ) from error

    @classmethod
    def from_text_files(
        cls,
        tags: str | os.PathLike[str],
        thresholds: str | os.PathLike[str] | float,
        tags_zh: str | os.PathLike[str] | None = None,
    ) -> Vocabulary:
        """Read the lists of the public recognize-anything repository, one entry a line.

        Args:
            tags: `ram_tag_list.txt`.
            thresholds: `ram_tag_list_threshold.txt`, or one threshold for all tags.
            tags_zh: `ram_tag_list_chinese.txt`.

        Raises:
            SettingsError: a file is missing, is not text, or the lists differ in length.
        """
        names = _read_lines(tags)
        if isinstance(thresholds, float):
            values = [thresholds] * len(names)
        else:
            values = [_as_threshold(line, thresholds) for line in _read_lines(thresholds)]
        chinese = () if tags_zh is None else _read_lines(tags_zh)
        return cls(tags=names, tags_zh=chinese, thresholds=torch.tensor(values, dtype=torch.float32))

    def _check(self, logits_BN: Tensor, threshold: float, max_tags: int | None) -> None:
        if logits_BN.ndim != 2 or logits_BN.shape[1] != len(self):
            raise SettingsError(
                f"Logits of shape (B, {len(self)}) fit this vocabulary; found {tuple(logits_BN.shape)}. "
                "Use the tag list that belongs to the model."
            )
        if threshold < 0 or (max_tags is not None and max_tags < 0):
            raise SettingsError(f"Threshold and number of tags cannot be negative; found {threshold} and {max_tags}.")

    def _positions(self, exclude: Iterable[str]) -> list[int]:
        unwanted = {name.strip().casefold() for name in exclude}
        pairs = zip(self.tags, self.tags_zh or self.tags, strict=True)
        return [i for i, pair in enumerate(pairs) if unwanted & {name.casefold() for name in pair}]


def _strongest(scores_N: Tensor, passed_N: Tensor, max_tags: int | None) -> list[int]:
    indices = passed_N.nonzero().flatten()
    if max_tags is not None and len(indices) > max_tags:
        best = scores_N[indices].argsort(descending=True, stable=True)[:max_tags]
        indices = indices[best].sort().values
    return indices.tolist()


def _read_lines(path: str | os.PathLike[str]) -> tuple[str, ...]:
    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        raise SettingsError(
            f"The tag list {path} cannot be read ({error}); expected a UTF-8 text file with one entry a line."
        ) from error
    return tuple(line.strip() for line in text.splitlines())


def _as_threshold(line: str, path: str | os.PathLike[str]) -> float:
    try:
        return read(Number, float(line), "a threshold")
    except ValueError as error:
        raise SettingsError(f"The thresholds {path} should be one number a line; found '{line}'.") from error

"""Texts in the host: CONDITIONING of one, and which of its tokens stand where."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any


def encode_text(clip: Any, text: str) -> Any:
    """CONDITIONING of a text, as CLIP Text Encode gives it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """The tokens of texts, start, end and padding not counted."""

    clip: Any
    """The host's CLIP."""

    def __call__(self, text: str) -> int:
        """How many a text has."""
        return len(self.places(text)) if text else 0

    def places(self, text: str) -> list[int]:
        """Where they stand in the encoded text; long ones come in several windows, one behind the other."""
        windows = next(iter(self.clip.tokenize(text, return_word_ids=True).values()))
        # The host numbers the words from 1 on; 0 marks what it added itself.
        return [place for place, token in enumerate(chain.from_iterable(windows)) if token[2]]


def token_counter(clip: Any) -> TokenCounter:
    """A counter for the text encoder."""
    return TokenCounter(clip)

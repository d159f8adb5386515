"""Prompts: how tags become text, and how text becomes the states that the U-Net reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..dape.vocabulary import SEPARATOR


def compose_prompt(tags: Sequence[str], prompt: str, added_prompt: str) -> str:
    """Tags, the user's words and the words that always follow, joined as in the published implementation."""
    return f"{SEPARATOR.join(tags)}, {prompt},{added_prompt}"


def training_text(tags: Sequence[str]) -> str:
    """The text of a training photo in the published form "a, b,"; empty without tags."""
    return f"{SEPARATOR.join(tags)}," if tags else ""


def encode_prompts(prompts: Sequence[str], tokenizer: Any, text_encoder: Any) -> Tensor:
    """Text states (N, L, D) in float32 of N prompts, padded or cut to the encoder's length L (77 for CLIP).

    `tokenizer` is a `CLIPTokenizer`, `text_encoder` a `CLIPTextModel`; the states are its normed last layer's.
    """
    length = text_length(tokenizer, text_encoder)
    ids = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    states: Tensor = text_encoder(ids.to(text_encoder.device))[0]
    return states.float()


def text_length(tokenizer: Any, text_encoder: Any) -> int:
    """Tokens that a text is padded or cut to, start and end included."""
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def count_tokens(text: str, tokenizer: Any) -> int:
    """Tokens of a text, start and end not counted, however many the encoder takes."""
    return len(tokenizer(text, add_special_tokens=False, truncation=False).input_ids)

"""The small model's text encoder (CLIP's architecture) and its byte-pair tokenizer, made from a list of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import nn

from seesr_core.formats.base import build_tokenizer
from seesr_core.formats.sd import TokenizerFiles

from ..data.order import Stream, scoped_seed

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
PROMPT_WORDS = (
    "clean, high-resolution, 8k",
    "dotted, noise, blur, lowres, smooth",
    "a photo of",
    "in the of and on with",
)


def train_tokenizer(words: Iterable[str], *, vocab_size: int = 2048) -> TokenizerFiles:
    """A CLIP byte-pair vocabulary: 256 bytes, the same at a word's end, merges by frequency, two special tokens.

    Id 0 is "!", which pads as in SD-2; the special tokens come last. The same words give the same vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet(), key=_clip_order)
    counts = Counter(word for text in (*words, *PROMPT_WORDS) for word in text.lower().replace(",", " ").split())
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    merges = _merges(counts, vocab_size - len(tokens) - 2)
    tokens += ["".join(pair) for pair in merges] + [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PAD, "model_max_length": 77}
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return TokenizerFiles(vocab=vocab, merges=[" ".join(pair) for pair in merges], config=special)


def _clip_order(symbol: str) -> tuple[bool, str]:
    """Printable ASCII first, so that "!" has id 0."""
    return (not "!" <= symbol <= "~", symbol)


def _merges(counts: Counter[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair merges by falling frequency (Sennrich et al. 2016); ties go to the pair that sorts first."""
    split = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts if word.isascii()}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merged(parts, best) for word, parts in split.items()}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def build_text_encoder(files: TokenizerFiles, *, width: int, layers: int, seed: int = 0) -> tuple[nn.Module, Any]:
    """A fresh `CLIPTextModel` for the vocabulary, and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(files.vocab),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="gelu",
        bos_token_id=files.vocab[START],
        eos_token_id=files.vocab[END],
        pad_token_id=files.vocab[PAD],
    )
    with scoped_seed(seed, Stream.NANO_TEXT_ENCODER):
        return CLIPTextModel(config), build_tokenizer(files)

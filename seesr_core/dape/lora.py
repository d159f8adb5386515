"""Low-rank adapters of the tagger: merging the published `DAPE.pth`, and the layout in which stage 1 trains its own.

The published adapter has rank 8 and alpha 1, hence W + (1/8) · BA, on two kinds of layers:

* every `attn.qkv` of the encoder, one pair for the fused layer: A is (16, C), B is (2C, 8); the first halves belong to
  the query, the second to the value, and the key carries none;
* `query` and `key` of the tagging head's cross-attention, an ordinary pair each.

An encoder of convolutions has none of the former: a pair (A (r, C, 1, 1), B (C', r, 1, 1), as peft has them) is on each
of its 1×1 convolutions instead, which hold nearly all of its weights.

peft adapts whole linear layers, so `unfuse_qkv` splits each fused layer into three while training and `fuse_qkv` undoes
it: files always hold the fused weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from .encoder import WindowAttention
from .model import DAPE

RANK = 8
ALPHA = 1
SCALING = ALPHA / RANK

# Adapters of nets that tagging does not use; nothing trained them, so their B is zero in the published file.
BALLAST = ("tag_encoder.", "text_decoder.")
PEFT_PREFIX = "base_model.model."

_QKV = ".attn.qkv"
_ADAPTED = (
    ".crossattention.self.query",
    ".crossattention.self.key",
    "._expand_conv",
    "._project_conv",
    "._conv_head",
)
"""Ends of the names of layers that carry an ordinary pair: those of the tagging head and those of `LiteEncoder`."""


class SplitQKV(nn.Module):
    """The fused projection as three layers, with the same input and output."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
        layers = [_linear(weight, bias) for weight, bias in zip(fused.weight.chunk(3), biases, strict=True)]
        self.q, self.k, self.v = (layer.requires_grad_(fused.weight.requires_grad) for layer in layers)
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, 3C): queries, keys, values."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fuse(self) -> nn.Linear:
        """Back to one layer.

        Raises:
            SettingsError: an adapter is still attached to one of the three.
        """
        parts: list[nn.Linear] = []
        for layer in (self.q, self.k, self.v):
            if type(layer) is not nn.Linear:
                raise SettingsError("An adapter is still attached to the encoder: call peft's merge_and_unload first.")
            parts.append(layer)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        fused = _linear(torch.cat([part.weight for part in parts]), bias)
        return fused.requires_grad_(parts[0].weight.requires_grad).train(self.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def unfuse_qkv(dape: DAPE) -> DAPE:
    """Replace every fused projection of the encoder by three layers, in place, so that peft can adapt q and v alone."""
    for attention in _attentions(dape):
        if isinstance(attention.qkv, nn.Linear):
            attention.qkv = SplitQKV(attention.qkv)
    return dape


def fuse_qkv(dape: DAPE) -> DAPE:
    """Undo `unfuse_qkv` in place: the state dict has canonical keys again.

    Raises:
        SettingsError: an adapter has not been merged yet.
    """
    for attention in _attentions(dape):
        if isinstance(attention.qkv, SplitQKV):
            attention.qkv = attention.qkv.fuse()
    return dape


def _attentions(dape: DAPE) -> Iterator[WindowAttention]:
    return (module for module in dape.modules() if isinstance(module, WindowAttention))


def lora_target_modules(dape: DAPE) -> list[str]:
    """Full names of the layers stage 1 adapts (peft's `target_modules`), after `unfuse_qkv`: the published choice.

    Of an encoder of convolutions, which the published choice does not know, all 1×1 convolutions.

    Raises:
        SettingsError: the projections are still fused.
    """
    names = [name for name, _ in dape.named_modules() if name.endswith(_ADAPTED)]
    for name, module in dape.named_modules():
        if name.endswith(_QKV) and not isinstance(module, SplitQKV):
            raise SettingsError(
                "The tagger's query, key and value layers are fused: call unfuse_qkv before adding LoRA."
            )
        if isinstance(module, SplitQKV):
            names += [f"{name}.q", f"{name}.v"]
    return names


def merge_published_lora(
    state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], *, scaling: float = SCALING
) -> dict[str, Tensor]:
    """Canonical RAM weights with an adapter in the layout of `DAPE.pth` added: the weights of DAPE.

    Args:
        state: canonical weights; they are not changed, and layers without an adapter are shared with the result.
        adapter: flat dict of `<layer>.lora_A` and `<layer>.lora_B`; entries of the unused text nets are skipped.
        scaling: alpha / rank of the adapter.

    Returns:
        A new state dict; sums are made in float32 and rounded to each weight's own dtype.

    Raises:
        WeightsError: an entry without its partner, for an unknown layer or of a shape that does not fit.
    """
    merged = dict(state)
    for layer, (a, b) in _pairs(adapter).items():
        weight = state.get(f"{layer}.weight")
        if weight is None:
            raise WeightsError(f"The adapter changes '{layer}', which this tagger lacks; it belongs to another model.")
        delta = _delta(layer, a.float(), b.float(), weight)
        merged[f"{layer}.weight"] = (weight.float() + scaling * delta).to(weight.dtype)
    return merged


def _pairs(adapter: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's layers with their A and B, without ballast."""
    wanted = [key for key in adapter if not key.startswith(BALLAST)]
    layers = dict.fromkeys(key.rpartition(".")[0] for key in wanted)
    expected = {f"{layer}.{half}" for layer in layers for half in ("lora_A", "lora_B")}
    if not wanted or expected != set(wanted):
        odd = sorted(expected ^ set(wanted))[:3]
        raise WeightsError(
            "This is no DAPE adapter, which holds 'lora_A' and 'lora_B' of layers of the tagger; "
            f"keys without partner: {odd}."
        )
    return {layer: (adapter[f"{layer}.lora_A"], adapter[f"{layer}.lora_B"]) for layer in layers}


def _delta(layer: str, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """BA for one layer, the key's third of a fused one left at zero."""
    fused, rank = layer.endswith(_QKV), b.shape[1] if b.ndim > 1 else 0
    rows, columns, *window = weight.shape if weight.ndim > 1 else (0, 0)
    shapes = ((2 * rank, columns), (rows // 3 * 2, rank)) if fused else ((rank, columns), (rows, rank))
    if window not in ([], [1, 1]) or (a.shape, b.shape) != tuple((*shape, *window) for shape in shapes):
        raise WeightsError(
            f"The adapter of '{layer}' has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit its weight "
            f"{tuple(weight.shape)}; adapter and tagger are of different sizes."
        )
    if not fused:
        return (b.flatten(1) @ a.flatten(1)).view_as(weight)
    (a_q, a_v), (b_q, b_v) = a.chunk(2), b.chunk(2)
    return torch.cat([b_q @ a_q, a.new_zeros(rows // 3, columns), b_v @ a_v])


def published_lora_to_peft(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout of `DAPE.pth` to that of a peft adapter file for an unfused tagger: same values, ballast left out.

    Raises:
        WeightsError: not an adapter of a tagger.
    """
    result: dict[str, Tensor] = {}
    for layer, (a, b) in _pairs(adapter).items():
        split = layer.endswith(_QKV)
        parts = zip((".q", ".v"), a.chunk(2), b.chunk(2), strict=True) if split else [("", a, b)]
        for suffix, part_a, part_b in parts:
            result[f"{PEFT_PREFIX}{layer}{suffix}.lora_A.weight"] = part_a.contiguous()
            result[f"{PEFT_PREFIX}{layer}{suffix}.lora_B.weight"] = part_b.contiguous()
    return result


def peft_lora_to_published(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `published_lora_to_peft`.

    Raises:
        WeightsError: keys that such an adapter does not have, or q without v, or v without q.
    """
    tensors = {_plain_key(key): tensor for key, tensor in adapter.items()}
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, half = key.rpartition(".")
        fused = layer.removesuffix(".q")
        if layer.endswith(_ADAPTED):
            result[key] = tensor
        elif layer.endswith(f"{_QKV}.q") and f"{fused}.v.{half}" in tensors:
            result[f"{fused}.{half}"] = torch.cat([tensor, tensors[f"{fused}.v.{half}"]])
    lost = tensors.keys() - {_plain_key(key) for key in published_lora_to_peft(result)}
    if lost:
        raise WeightsError(
            f"A stage-1 adapter holds lora_A and lora_B of q and v together, of query and of key; "
            f"these do not belong: {sorted(lost)[:3]}."
        )
    return result


def _plain_key(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX).removesuffix(".weight")

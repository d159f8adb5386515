"""Dropout whose masks belong to the images, not to the batch that they happen to be computed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..data.order import seeded


class DropoutByImage(TorchFunctionMode):
    """Within the block, `F.dropout` and the dropout of attention draw the rows of their masks image by image.

    The n-th mask of a pass derives from torch's own CPU generator, which the caller seeds by the step, and from the
    number of the image; so it is the same in whichever part of the batch, on whichever process, the image is computed.
    Recomputing activations works, too, since it restores that generator. A tensor whose first dimension does not
    consist of the images gets torch's own dropout.

    Args:
        images: the numbers of the images of the pass, in the order of the batch.
    """

    def __init__(self, images: Sequence[int]) -> None:
        super().__init__()
        self.images = images

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        if len(x) % len(self.images):
            return torch.dropout(x, p, training)
        dropped = x * self._keep(x.shape, p, x.device).to(x.dtype) / (1 - p)
        return x.copy_(dropped) if inplace else dropped

    def _keep(self, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
        """1 where a value stays."""
        mask_number = int(torch.randint(2**31, ()))
        rows = (len(self.images), shape[0] // len(self.images), *shape[1:])
        draws = [self._draw(rows[1:], seeded(mask_number, image).initial_seed(), device) for image in self.images]
        return (torch.stack(draws) >= p).reshape(tuple(shape))

    @staticmethod
    def _draw(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
        return torch.rand(tuple(shape), generator=torch.Generator(device).manual_seed(seed), device=device)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, **options: Any) -> Tensor:
        """softmax(q·kᵀ/√d + mask)·v with dropout of the weights; the fused kernels draw from a generator of theirs."""
        if _masked_or_causal(options) or len(q) % len(self.images):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, **options)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self._dropout(weights, dropout_p) @ v


def _masked_or_causal(options: Mapping[str, Any]) -> bool:
    return any(value is not None and value is not False for value in options.values())

"""Class maps as something that can be denoised: analog bits (Chen et al., "Analog Bits", 2022), or one channel a class.

Shape letters: B pictures, K classes, N channels of a label (⌈log2 K⌉ bits, or K), H W pixels, h w latent cells. Labels
are int64, `VOID` where nothing is known.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError

VOID = 255
"""Label of a pixel without class, as in ADE20K, COCO-Stuff and Cityscapes."""
MOST_CLASSES = 255
"""As many as a label picture of 8 bits can tell apart beside `VOID`."""
Embedding = Literal["bits", "one-hot"]
"""How a class is written: as the bits of its number, or as a channel of its own."""


def codes(classes: int, embedding: Embedding = "bits") -> Tensor:
    """What stands for every class, ±1 in each channel, (K, N); of bits the lowest comes first."""
    numbers = torch.arange(classes)[:, None]
    if embedding == "one-hot":
        return torch.eye(classes) * 2.0 - 1.0
    return ((numbers >> torch.arange(max(1, (classes - 1).bit_length()))) & 1) * 2.0 - 1.0


def check_labels(labels: Tensor, classes: int, where: str = "The label picture") -> None:
    """Refuse labels outside the list.

    Raises:
        DataError: a label is neither one of 0 … K − 1 nor `VOID`.
    """
    strange = labels[(labels != VOID) & ((labels < 0) | (labels >= classes))]
    if len(strange):
        raise DataError(
            f"{where} holds the label {int(strange[0])}; expected 0 to {classes - 1}, or {VOID} for pixels without "
            "class. Give the list of classes that belongs to it."
        )


def embed_labels(labels_BHW: Tensor, codes_KN: Tensor) -> Tensor:
    """s0, the code of each label and 0 for void, (B, N, H, W)."""
    table = torch.cat([codes_KN, torch.zeros_like(codes_KN[:1])]).to(labels_BHW.device)
    rows = torch.where(labels_BHW == VOID, len(codes_KN), labels_BHW)
    return table[rows].movedim(-1, 1)


def nearest_labels(s0_BNhw: Tensor, codes_KN: Tensor) -> Tensor:
    """The class whose code is nearest to an estimate, (B, h, w); always one of the list."""
    scores = torch.einsum("bnhw,kn->bkhw", s0_BNhw.float(), codes_KN.to(s0_BNhw.device))
    return scores.argmax(1)


def majority(labels_BHW: Tensor, height: int, width: int) -> Tensor:
    """The commonest label of each of height × width cells, void among them, (B, h, w); of equals the lowest."""
    present = labels_BHW.unique()
    shares = [F.interpolate((labels_BHW == label)[:, None].float(), (height, width), mode="area") for label in present]
    return present[torch.cat(shares, 1).argmax(1)]


def label_latent(labels_BHW: Tensor, codes_KN: Tensor, height: int, width: int) -> Tensor:
    """s0 of labels of any size, at the latent's resolution (B, N, h, w)."""
    return embed_labels(majority(labels_BHW, height, width), codes_KN)


def enlarge_labels(labels_Bhw: Tensor, height: int, width: int) -> Tensor:
    """Labels at another size, each the nearest cell's, (B, height, width)."""
    return F.interpolate(labels_Bhw[:, None].float(), (height, width), mode="nearest-exact")[:, 0].long()


def paint(labels_BHW: Tensor, palette: list[tuple[int, int, int]]) -> Tensor:
    """Labels in the colours of a palette (K entries), uint8 (B, 3, H, W); void is black."""
    table = torch.tensor([*palette, (0, 0, 0)], dtype=torch.uint8, device=labels_BHW.device)
    return table[torch.where(labels_BHW == VOID, len(palette), labels_BHW)].movedim(-1, 1)

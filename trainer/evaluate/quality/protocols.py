"""What exactly is measured: published tables mix crops and whole images, so a report names one protocol, and keeps it.

Protocol A: the LR photo's centre 128² was upscaled; the 512² result is compared with the centre 512² of the original.
Protocol B: whole images, whatever their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from seesr_core.errors import DataError

ProtocolName = Literal["A", "B"]

LR_SIDE, HR_SIDE, SCALE = 128, 512, 4
PROTOCOLS: Mapping[str, str] = {
    "A": f"centre crops, {LR_SIDE}² → {HR_SIDE}²; of larger originals and LR photos the centre is taken",
    "B": "whole images; nothing is cut off",
}
"""Every protocol in a sentence."""


def centre(image_3HW: Tensor, side: int, grid: int = 1) -> Tensor | None:
    """The central `side`² of a picture (3, H, W), its corner on multiples of `grid`; None where it is smaller.

    With `grid` = 4, side 512 of an original covers the pixels that side 128 of its quarter-size photo shows.
    """
    top, left = ((length // grid - side // grid) // 2 * grid for length in image_3HW.shape[1:])
    if min(image_3HW.shape[1:]) < side:
        return None
    return image_3HW[:, top : top + side, left : left + side]


def under(protocol: ProtocolName, kind: Literal["sr", "hr", "lr"], image_3HW: Tensor) -> Tensor:
    """The part of a picture (3, H, W) that the protocol looks at.

    Raises:
        DataError: the picture does not fit protocol A.
    """
    if protocol == "B":
        return image_3HW
    height, width = image_3HW.shape[1:]
    if kind == "sr":
        if (height, width) != (HR_SIDE, HR_SIDE):
            raise DataError(
                f"the result has {width}×{height} pixels, protocol A measures results of {LR_SIDE}² centre crops, "
                f"{HR_SIDE}² pixels; make crops by `python -m trainer.make_testset --lr …`, or choose --protocol B."
            )
        return image_3HW
    part = centre(image_3HW, HR_SIDE, SCALE) if kind == "hr" else centre(image_3HW, LR_SIDE)
    if part is None:
        side = HR_SIDE if kind == "hr" else LR_SIDE
        raise DataError(
            f"its {kind.upper()} picture has {width}×{height} pixels, protocol A needs at least {side} a side; "
            "choose --protocol B."
        )
    return part

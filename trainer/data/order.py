"""Random streams and orders that depend on numbers alone, whoever asks for them and when."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


class Stream:
    """The table of all random streams: what stands beside the seed in `seeded`, so that no two draws share numbers.

    The values are part of every run that exists: another value gives other draws, and a run would not go on exactly.
    A value that stands twice belongs to parts that never draw in one run.
    """

    EPOCH = 1
    """The order of the photos in an epoch."""
    CROP = 2
    """Where a photo is cropped and whether it is flipped, by image."""
    MIXTURE = 15
    """The order of the sources of a mixture, by cycle."""
    FIXED_CROP = 17
    """As `CROP`, by photo."""
    DROPOUT = 4
    """Dropout, by step (or by part of a batch)."""

    STAGE1_DEGRADATION = 3
    """How stage 1 degrades a crop, by image."""
    STAGE1_ADAPTER = 5
    """Start of the adapter."""
    STAGE1_SHOWN = 6
    """Crops of the photos that are kept out and shown, by photo."""

    STAGE2_WEIGHTS = 6
    """Start of RCA and of the image encoder."""
    STAGE2_DEGRADATION = 7
    """How stage 2 degrades a crop, by image."""
    POSTERIOR = 8
    """Latents drawn from the autoencoder's posterior, by image."""
    DENOISING = 10
    """Timestep, whether tags are dropped, and noise, by image."""
    VALIDATION = 14
    """Posterior and noise of validation, by pair."""
    STAGE2_ADAPTERS = 18
    """Start of the adapters."""

    SEGSR = 29
    """Step of the grid, whether an image comes there by itself, and noise of the segmentation, by image."""
    SEGSR_WEIGHTS = 30
    """Start of SegDM and bridge."""
    SCENES = 31
    """Drawn scenes, by seed and number."""
    SEGSR_INTERVAL = 32
    """Resampling of scenes in `trainer.segsr.proof`."""
    SEGSR_TRAININGS = 34
    """Resampling of trainings there."""

    FEW_STEPS = 28
    """Which steps are eq. 2's, noise, exact codes and kind of degradation of the few-step tuning."""

    DISTILL_FOLLOWER = 33
    """Start of the adapters that follow a student's results."""

    NANO_AUTOENCODER_VIEW = 3
    """Which crops are flat ones in the training of the small autoencoder, by image."""
    NANO_WEIGHTS = 5
    """Start of the small autoencoder and tagger, and of fitted ends."""
    NANO_TEXT_ENCODER = 8
    """Start of the small text encoder."""
    NANO_WORDS = 36
    """Which absent words the small tagger's step asks for."""
    NANO_IMAGINED = 37
    """Classes that the small tagger's pictures do not show, by image."""
    NANO_PRIOR = 9
    """Whether the prior's step shows text alone or leaves the soft prompt out, by step."""

    TEST_DEGRADATION = 20
    """How test photos are degraded, by name."""
    DAPE_INTERVAL = 21
    """Resampling of photos in `trainer.evaluate.dape`."""
    TEST_DENOISING = 22
    """Noise under which `trainer.evaluate` looks at a network, by name."""
    ABLATION_INTERVAL = 23
    """Resampling of photos in `trainer.evaluate.ablation`."""
    SUMMARY_INTERVAL = 24
    """Resampling of photos in tables."""
    TEST_CROP = 25
    """Where test photos are cropped, by name."""
    SEMANTICS_INTERVAL = 26
    """Resampling of photos in `trainer.evaluate.semantics`."""
    GROUNDING = 27
    """Partners and resampling of photos in `trainer.evaluate.grounding`, by use."""


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers such as (seed, stream, step); different tuples give unrelated streams."""
    # SeedSequence ignores zeros at the end, so the count goes in front.
    entropy = [len(numbers), *(number & 0xFFFFFFFF for number in numbers)]
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def by_image(*numbers: int, images: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, which depends on `numbers` and on the number of the image."""
    return [seeded(*numbers, image) for image in images]


@contextlib.contextmanager
def scoped_seed(*numbers: int) -> Iterator[None]:
    """Within the block torch's own generators (dropout, initialisation) derive from `numbers`; then they are as
    before."""
    with torch.random.fork_rng():
        torch.manual_seed(seeded(*numbers).initial_seed())
        yield


def epoch_order(number: int, count: int, seed: int) -> int:
    """Which of `count` items is drawn as number `number`: each once an epoch, every epoch in an order of its own."""
    epoch, position = divmod(number, count)
    return int(_epoch(count, seed, epoch)[position])


@functools.lru_cache(maxsize=8)
def _epoch(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, Stream.EPOCH, epoch))

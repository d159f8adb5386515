"""SegSR's labels as a segmenter's class maps, for the evaluation of semantics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seesr_core.errors import DataError
from seesr_core.models import Models, load_models, with_segsr
from seesr_core.pictures.reading import read_photo
from seesr_core.pipeline import SeeSRPipeline

from ..quality.compute import Case
from .panoptic import Ids


@dataclass(frozen=True, slots=True)
class JointLabels:
    """SegSR as a segmenter: the labels that it denoises beside its picture of LR."""

    models: Models
    """A SeeSR model with SegSR."""

    @classmethod
    def load(cls, path: Path, model: str, device: torch.device) -> JointLabels:
        """SegSR from a file, around a model.

        Raises:
            SeeSRError: either cannot be had, or they do not belong together.
        """
        return cls(with_segsr(load_models(model, device=str(device)), path))

    @property
    def names(self) -> dict[int, str]:
        """Names of its classes, in lower case."""
        assert self.models.segsr is not None
        return {number: name.lower() for number, name in enumerate(self.models.segsr.classes.names)}

    def __call__(self, case: Case, size: tuple[int, int]) -> Ids:
        """The class of each pixel of a case's result.

        Raises:
            DataError: the case has no LR, or LR does not become a picture of the `size` (width, height) annotated.
        """
        if case.lr is None:
            raise DataError(f"{case.name} has no LR, of which SegSR makes its labels: give --lr.")
        labels = SeeSRPipeline(models=self.models)(read_photo(case.lr).rgb).labels
        assert labels is not None
        if (found := (labels.shape[1], labels.shape[0])) != size:
            raise DataError(
                f"{case.lr} becomes {found[0]}×{found[1]} pixels by SegSR, its annotations are for "
                f"{size[0]}×{size[1]}; give LR photos and a model whose scale belong to them."
            )
        ids: Ids = labels.cpu().numpy().astype(np.int64)
        return ids

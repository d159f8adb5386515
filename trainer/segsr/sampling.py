"""Sampling of batches that are already prepared, by the core's own joint step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seesr_core.models import Models
from seesr_core.pictures.sizes import to_u8
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.settings import UpscaleSettings

from .batches import LabelledBatch


def sample_batch(
    models: Models, batch: LabelledBatch, text: Tensor, settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Clean latents (B, C, h, w) and labels (B, h, w) of a batch, with noise of fixed seeds and without guidance.

    Args:
        models: SeeSR with SegDM and bridge.
        batch: LR pictures, their latents and soft prompts.
        text: text states (B, L, D).
        settings: of sampling, by the names of `UpscaleSettings`.
    """
    pipeline, z_lr = SeeSRPipeline(models=models), batch.z_lr.cpu()
    chosen = UpscaleSettings.for_model({**settings, "cfg": 1.0})
    joint = pipeline.join(z_lr, batch.soft_prompt, chosen)
    assert joint is not None
    states = torch.cat([text[:1], text]).cpu()
    soft = None if batch.soft_prompt is None else batch.soft_prompt.cpu()
    z = pipeline.sample(to_u8(batch.condition).cpu(), z_lr, states, soft, chosen, None, joint)
    return z.to(models.device), joint.labels()

"""Tiles and memory: how many go at once, fewer after it ran out, and what the host is told to expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS
from .sampling import ddpm, function_model, latents, local, noise, sample_tiled, sigmas, tokens


def out_of_memory_above(rows: int, seen: list[int]) -> Any:
    import comfy.model_management

    def function(x: Tensor, c: dict[str, Any]) -> Tensor:
        seen.append(len(x))
        if len(x) > rows:
            raise comfy.model_management.OOM_EXCEPTION("CUDA out of memory (made up)")
        return local(x, c)

    return function


def test_fewer_tiles_go_at_once_after_memory_ran_out():
    seen: list[int] = []
    given = ([[tokens(1.0), {}]], [[tokens(0.3), {}]])
    model, latent = function_model(local), latents(1, 8, 40)
    levels = sigmas(model, steps=2)
    options = {"sampler": ddpm("euler"), "prompts": given, "overlap": 0, "tile_batch": 5}
    expected = sample_tiled(model, noise(), levels, latent, **options)
    limited = sample_tiled(function_model(out_of_memory_above(2, seen)), noise(), levels, latent, **options)
    assert torch.allclose(limited, expected, rtol=0, atol=1e-5)
    # Two conditionings a tile: 5 tiles, 2, then 1; and 1 from the start in the second step.
    assert seen == [10, 4] + [2] * 10


def test_a_single_tile_without_memory_is_the_hosts_error():
    import comfy.model_management

    model = function_model(out_of_memory_above(0, []))
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="made up"):
        sample_tiled(model, noise(), sigmas(model), latents(1, 8, 20))


def test_other_errors_are_not_tried_again():
    calls = []

    def broken(x: Tensor, c: dict[str, Any]) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = function_model(broken)
    with pytest.raises(RuntimeError, match="mat1"):
        sample_tiled(model, noise(), sigmas(model), latents(1, 8, 20), tile_batch=3)
    assert len(calls) == 1


def test_the_hosts_memory_estimate_is_for_tiles(monkeypatch):
    import comfy.sampler_helpers

    shapes = []
    estimate = comfy.sampler_helpers.estimate_memory

    def noting(model: Any, shape: Any, conds: Any) -> Any:
        shapes.append(list(shape))
        return estimate(model, shape, conds)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", noting)
    model = function_model(local)
    levels = sigmas(model, steps=1)
    for options in ({}, {"tile_batch": 3}, {"tile_batch": 64}, {"tile_size": 512}):
        sample_tiled(model, noise(), levels, latents(2, 8, 40), overlap=0, **options)
    assert shapes == [[rows, LATENT_CHANNELS, 8, width] for rows, width in ((2, 8), (6, 8), (10, 8), (2, 40))]


class Memory:
    """A model that needs 100 bytes for every row of its input."""

    def memory_required(self, shape: list[int]) -> int:
        return 100 * shape[0]


@pytest.mark.parametrize(("free", "expected"), [(10_000, 4), (1600, 4), (1599, 2), (799, 1), (0, 1)])
def test_the_number_of_tiles_at_once_follows_free_memory(monkeypatch, free, expected):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free)
    choose = plugin("nodes.host.tiling.memory").choose_tile_batch
    assert choose(Memory(), [2, 4, 96, 96], torch.device("cuda")) == expected
    assert choose(Memory(), [2, 4, 96, 96], torch.device("cpu")) == 1

"""RAM's pickle and DAPE's adapter to one `dape*.safetensors` with what inference needs, in half precision or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..dape import DAPE, Vocabulary
from ..formats.quantized import SCALE, is_quantizable, quantize
from ..formats.ram import dape_metadata, read_ram_with_lists
from ..formats.stream import Slot, ordered, write_stream

Progress = Callable[[int, int], None]


@dataclass(kw_only=True, slots=True)
class TaggerJob:
    """One conversion."""

    weights: Path
    """RAM's published file."""
    adapter: Path | None
    """`DAPE.pth`, or an adapter of stage 1; None converts plain RAM."""
    tag_lists: Path
    """Folder with the three tag lists."""
    target: Path
    """`*.safetensors` to write."""
    dtype: torch.dtype = torch.float16
    """Precision of the written weights (those that `int8` leaves)."""
    int8: bool = False
    """Whether matrices are stored in 8 bits."""
    progress: Progress = field(default=lambda done, total: None)
    """Called with (done, total) tensors."""

    def run(self) -> tuple[DAPE, Vocabulary]:
        """Write; returns the tagger in float32, as it was before rounding, memory-mapped from its file.

        Raises:
            WeightsError: a file of another kind or size, damaged or unsafe.
            ResourceError: the disk has no room. SettingsError: weights that are not finite in `dtype`.
        """
        dape, vocabulary = read_ram_with_lists(self.weights, self.adapter, self.tag_lists)
        state = dape.state_dict()
        slots = self._slots(state)
        more = {"quantization": "int8 rows"} if self.int8 else {}
        fields = dape_metadata(dape, vocabulary, source=self._source(), **more)
        write_stream(self.target, slots, self._tensors(state, slots), fields)
        return dape, vocabulary

    def _source(self) -> str:
        return " with ".join(path.name for path in (self.weights, self.adapter) if path is not None)

    def _slots(self, state: Mapping[str, Tensor]) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for key, tensor in state.items():
            shape = tuple(tensor.shape)
            if self.int8 and is_quantizable(key, shape):
                slots[key] = Slot(shape, torch.int8)
                slots[f"{key}{SCALE}"] = Slot((shape[0], 1), torch.float32)
            else:
                slots[key] = Slot(shape, self.dtype)
        return ordered(slots)

    def _tensors(self, state: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> Iterator[tuple[str, Tensor]]:
        """In the order of `slots`: scales come first, so matrices are reduced twice rather than kept."""
        for done, (key, slot) in enumerate(slots.items(), 1):
            if key.endswith(SCALE):
                yield key, quantize(state[key.removesuffix(SCALE)])[1]
            else:
                yield key, quantize(state[key])[0] if slot.dtype is torch.int8 else state[key]
            self.progress(done, len(slots))

"""The tensors of a run that change while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr_core.errors import DataError

from .sharding import fill, like, whole


@dataclass(slots=True)
class State:
    """The tensors of a run: what is trained, its moving average, and the optimizer's moments."""

    parameters: Mapping[str, Tensor]
    """Trained parameters by name."""
    average: dict[str, Tensor]
    """Moving average of the parameters by name; empty without one."""
    optimizer: torch.optim.Optimizer
    """Optimizer of `parameters`."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it, complete and on the CPU; with sharded parameters every process has to ask."""
        found = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        found |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            moments = self.moments(parameter)
            found |= {f"{key}.{name}": _own(value, parameter) for key, value in moments.items() if value is not None}
        return {name: whole(tensor).cpu().contiguous() for name, tensor in found.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
        """Find the tensors of a checkpoint, by name, to be those of this run.

        Raises:
            DataError: some are missing, left over or of other shapes.
        """
        expected = {f"weights.{name}": tuple(p.shape) for name, p in self.parameters.items()}
        expected |= {f"average.{name}": tuple(tensor.shape) for name, tensor in self.average.items()}
        moments = {name for name in shapes if name.partition(".")[0] not in ("weights", "average")}
        odd = [name for name, shape in expected.items() if shapes.get(name) != shape]
        odd += sorted(shapes.keys() - expected.keys() - moments)
        odd += sorted(name for name in moments if name.partition(".")[2] not in self.parameters)
        if odd:
            raise DataError(
                f"{path} does not belong to this run: {len(odd)} of its tensors are missing, left over or of other "
                f"shapes, the first is {odd[0]}; use another folder, or the recipe that wrote it."
            )

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put back what `tensors` gave, one after the other."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        with torch.no_grad():
            for key, value in tensors:
                kind, name = key.split(".", 1)
                if kind == "weights":
                    fill(self.parameters[name], value)
                elif kind == "average":
                    self.average[name].copy_(like(value, self.average[name]))
                else:
                    moments[name][kind] = value
        self.put(moments)

    def moments(self, parameter: Tensor) -> Mapping[str, Any]:
        """What the optimizer keeps for a parameter."""
        found: Mapping[str, Any] = self.optimizer.state.get(parameter, {})
        return found

    def put(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give complete moments, by the names of their parameters, to the optimizer."""
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {k: self.placed(k, v, parameter) for k, v in moments[name].items()}

    def placed(self, key: str, value: Tensor, parameter: Tensor) -> Any:
        """A moment where its parameter is; AdamW keeps its step on the CPU unless it is fused, and the 8-bit one counts
        with a plain number."""
        if key != "step":
            return like(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
        if not value.is_floating_point():
            return int(value)
        return value.to(parameter.device) if self.optimizer.param_groups[0].get("fused") else value


def _own(value: Any, parameter: Tensor) -> Tensor:
    """A moment; optimizers in 8 bits let parameters share tables, which safetensors does not write."""
    moment = torch.as_tensor(value)
    return moment if moment.shape == parameter.shape else moment.clone()

"""Initial values of a dense model."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn


class InitialValues(Protocol):
    """Values of a dense model before training, the same on every process and independent of their number."""

    def parameter(self, name: str) -> Tensor:
        """The whole parameter, float32 on the CPU."""
        ...

    def std(self, name: str) -> float:
        """Standard deviation of the distribution that a weight is drawn from."""
        ...

    def buffer(self, name: str) -> Tensor:
        """A buffer, on the CPU."""
        ...


class ModelValues:
    """The values of a model that is there, whole and on the CPU.

    Args:
        model: with values.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(named_buffers(model))

    def parameter(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def std(self, name: str) -> float:
        """Root mean square of the weight."""
        return float(self._parameters[name].detach().float().square().mean().sqrt())

    def buffer(self, name: str) -> Tensor:
        return self._buffers[name].detach()


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of a model by name; those of a module that is used under several names under the first one only."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, buffer

"""Initial values of a dense model."""

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn


class InitialValues(Protocol):
    """Protocol for the initial values of a dense model. They are the same on any number of processes."""

    def parameter(self, name: str) -> Tensor:
        """Return the full parameter in float32 on the CPU."""
        ...

    def std(self, name: str) -> float:
        """Return the standard deviation of the distribution of a weight."""
        ...

    def buffer(self, name: str) -> Tensor:
        """Return a buffer on the CPU."""
        ...


class ModelValues:
    """The values of an existing, unsharded model on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(named_buffers(model))

    def parameter(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def std(self, name: str) -> float:
        """Return the root mean square of the weight."""
        return root_mean_square(self._parameters[name].detach())

    def buffer(self, name: str) -> Tensor:
        return self._buffers[name].detach()


class LoadedValues:
    """Initial values that a dense model provides by name.

    Args:
        weights: parameter name -> parameter.
        constructed: values of the same model from scratch, which provide the buffers.
    """

    def __init__(self, weights: Callable[[str], Tensor], constructed: InitialValues) -> None:
        self._weights, self._constructed = weights, constructed

    def parameter(self, name: str) -> Tensor:
        return self._weights(name).float()

    def std(self, name: str) -> float:
        """Return the root mean square of the weight."""
        return root_mean_square(self.parameter(name))

    def buffer(self, name: str) -> Tensor:
        return self._constructed.buffer(name)


def root_mean_square(weight: Tensor) -> float:
    """Return the root mean square of the elements, computed in float32."""
    return float(weight.float().square().mean().sqrt())


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each buffer. The buffers of a shared module appear under its first name only."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, buffer

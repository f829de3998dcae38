"""What an engine must know of a model: a description, so that no model has to be subclassed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ModelPlan:
    """Where the parts of a model are, by module name.

    Attributes:
        blocks: the repeated blocks: units of activation checkpointing, compilation and sharding.
        units: further modules that are sharded on their own, such as the embedding and the head.
        bottom: module in whose output a gradient that is not finite shows, such as the embedding; None: not observed.
        compiled: further modules that are compiled, such as the loss.
    """

    blocks: tuple[str, ...]
    units: tuple[str, ...] = ()
    bottom: str | None = None
    compiled: tuple[str, ...] = ()

    @staticmethod
    def infer(model: nn.Module) -> "ModelPlan":
        """The plan of any model: the blocks are the largest ``nn.ModuleList`` (or ``nn.Sequential``) by parameters, the
        units are embeddings and linear layers outside of it that hold a weight of their own.

        Args:
            model: may be on ``meta``.
        """
        lists = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        }
        blocks: tuple[str, ...] = ()
        if lists:
            largest = max(lists, key=lambda name: (lists[name], -len(name)))
            blocks = tuple(_join(largest, child) for child, _ in model.get_submodule(largest).named_children())
        bottom = None
        units: list[str] = []
        owners: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.Linear) and not _inside(name, blocks):
                owners.setdefault(id(module.weight), []).append(name)
                if isinstance(module, nn.Embedding) and bottom is None:
                    bottom = name
        for names in owners.values():
            if len(names) == 1:  # a tied weight belongs to the root
                units += names
        return ModelPlan(blocks, tuple(units), bottom)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model."""
        return [model.get_submodule(name) for name in self.blocks]


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _inside(name: str, blocks: tuple[str, ...]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


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
            yield _join(prefix, name), buffer

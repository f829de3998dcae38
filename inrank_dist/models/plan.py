"""What an engine must know of a model: a description, so that no model has to be subclassed."""

from dataclasses import dataclass

from torch import nn


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

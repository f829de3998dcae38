"""Description of a model for the engines, which makes subclassing unnecessary."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelPlan:
    """Names of the modules that engines treat separately.

    Attributes:
        blocks: the repeated blocks, which are checkpointed, compiled and sharded one by one.
        units: other modules to shard separately, such as the embedding and the head.
        bottom: the first module, such as the embedding. The gradient of its output is checked for values that are not
            finite. None disables the check.
        compiled: other modules to compile, such as the loss.
    """

    blocks: tuple[str, ...]
    units: tuple[str, ...] = ()
    bottom: str | None = None
    compiled: tuple[str, ...] = ()

    @staticmethod
    def infer(model: nn.Module) -> "ModelPlan":
        """Infer the plan of any model, which may be on ``meta``.

        The blocks are the children of the ``nn.ModuleList`` or ``nn.Sequential`` with the most parameters. The units
        are the embeddings and linear layers outside the blocks whose weight is not tied. The bottom is the first
        embedding outside the blocks.
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
            if len(names) == 1:  # a tied weight is sharded with the root module
                units += names
        return ModelPlan(blocks, tuple(units), bottom)

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the block modules of ``model``."""
        return [model.get_submodule(name) for name in self.blocks]


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _inside(name: str, blocks: tuple[str, ...]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)

"""What collectives carry, counted where they pass torch's dispatcher."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Counted = tuple[str, int]
"""An operation and the bytes of the tensors that it was given."""


class Collectives(TorchDispatchMode):
    """Every operation on a process group meanwhile, whoever calls it: they all pass torch's dispatcher.

    Attributes:
        seen: the operations in their order.
        sent: bytes that this process sent, as a ring of all processes sends them (``engine.cost``).
    """

    NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")
    SILENT = ("wait_tensor", "wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Counted] = []
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes back with what it does to its parts, collectives among it
        name = func.overloadpacket.__name__
        if func.namespace in self.NAMESPACES and name not in self.SILENT:
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            given = sum(tensor.nbytes for tensor in tensors)
            self.seen.append((name.strip("_"), given))
            N = dist.get_world_size()
            if name.strip("_").startswith(("allreduce", "all_reduce")):
                self.sent += 2 * given * (N - 1) / N
            elif name.startswith("alltoall_base"):
                _, parted, _, _, sizes = args[:5]
                sizes = sizes or [1] * N  # none given: equal parts
                self.sent += parted.nbytes * (1 - sizes[dist.get_rank()] / max(sum(sizes), 1))
            else:  # a gather or scatter: a whole and a part are given
                self.sent += given * N / (N + 1) * (N - 1) / N
        return func(*args, **(kwargs or {}))

"""Counts the traffic of collectives in torch's dispatcher."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Counted = tuple[str, int]
"""Name of an operation and the bytes of its tensor arguments."""


class Collectives(TorchDispatchMode):
    """Records every operation on a process group, whoever calls it, since all pass torch's dispatcher.

    Attributes:
        seen: the operations in order.
        sent: bytes that this process sent, assuming ring algorithms over all processes (see ``engine.cost``).
    """

    NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")
    IGNORED = ("wait_tensor", "wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Counted] = []
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor will call us again with its local tensors and collectives
        name = func.overloadpacket.__name__
        if func.namespace in self.NAMESPACES and name not in self.IGNORED:
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            nbytes = sum(tensor.nbytes for tensor in tensors)
            self.seen.append((name.strip("_"), nbytes))
            N = dist.get_world_size()
            if name.strip("_").startswith(("allreduce", "all_reduce")):
                self.sent += 2 * nbytes * (N - 1) / N
            elif name.startswith("alltoall_base"):
                _, parted, _, _, sizes = args[:5]
                sizes = sizes or [1] * N  # an empty list means equal parts
                self.sent += parted.nbytes * (1 - sizes[dist.get_rank()] / max(sum(sizes), 1))
            else:  # a gather or scatter: the arguments are a whole tensor and one part
                self.sent += nbytes * N / (N + 1) * (N - 1) / N
        return func(*args, **(kwargs or {}))

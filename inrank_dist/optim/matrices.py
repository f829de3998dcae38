"""Muon, Spectron and LoRA-Muon for parameters sharded by rows.

Factors are orthogonalised through their Gram matrices. Dense matrices are distributed over the processes, each of which
orthogonalises whole ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..lowrank.spectrum import Factors, gram_matrices
from .orthogonal import orthogonalise_matrix

FactorMaps = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function of the Gram matrices of ``U``, ``V`` and their momenta ``m_U``, ``m_V``. It returns ``A, B``, such that the
updates are ``m_U @ A`` and ``m_V @ B``. All matrices are float64 of shape ``(layers, R, R)``."""


@dataclass(frozen=True)
class HeldRows:
    """How one replica of the model is sharded by rows.

    Attributes:
        local: returns this process's rows of a parameter, gradient or moment, sharing its memory.
        sum: all-reduces a tensor in place over the processes that hold the shards of one replica.
        split: returns the number of rows in each shard, given the number of rows in total.
        index: index of this process's shard.
        group: process group of the shards of one replica. None if each process holds all rows.
    """

    local: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], None]
    split: Callable[[int], list[int]]
    index: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Pair:
    """The factors of one layer, ``U: (out, R)`` and ``V: (in, R)``."""

    U: nn.Parameter
    V: nn.Parameter


class MatrixOptimizer(torch.optim.Optimizer):
    """Orthogonalised updates for dense matrices and factors, AdamW for all other parameters.

    The momentum is an exponential moving average of the gradients, and the update uses its Nesterov form. The update of
    a matrix ``(out, in)`` is scaled by ``sqrt(max(1, out / in))``. Weight decay is decoupled. Each factor of a pair is
    multiplied by ``sqrt(1 - lr * weight_decay)``, so that their product decays at the rate of a dense matrix.

    A step communicates the following beside gradients:

    - Factors: one all-reduce of the upper triangles of four float64 Gram matrices per layer, ``16 R (R + 1)`` bytes.
    - Dense matrices: a matrix of ``n`` elements in ``S`` shards is sent to one process, orthogonalised there, and sent
      back, ``2 n (S - 1) / S^2`` elements of ``dtype`` per process. All-gathering it instead would send
      ``n (S - 1) / S`` elements per process and repeat the computation ``S`` times.

    Args:
        rest: parameter groups for AdamW, each with its ``weight_decay``.
        dense: parameter groups of matrices, each with its ``weight_decay``. The weight of a convolution is treated as a
            matrix ``(out_channels, in_channels * kh * kw)``.
        pairs: pairs of factors with their weight decay.
        rows: how the parameters are sharded.
        maps: update rule of the pairs. None if there are no pairs.
        lr: peak learning rate of AdamW.
        matrix_lr: peak learning rate of matrices and factors.
        momentum: decay rate of the momentum of matrices and factors.
        betas, eps: arguments of AdamW.
        dtype: dtype in which dense matrices are orthogonalised. ``torch.optim.Muon`` uses bfloat16.
    """

    def __init__(
        self,
        rest: Iterable[Mapping[str, Any]],
        dense: Iterable[Mapping[str, Any]],
        pairs: Iterable[tuple[Sequence[Pair], float]],
        rows: HeldRows,
        *,
        maps: FactorMaps | None,
        lr: float,
        matrix_lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.rows, self.maps, self.momentum, self.dtype = rows, maps, momentum, dtype
        scale = matrix_lr / lr
        groups: list[dict[str, Any]] = [{**group, "role": "adamw", "lr_scale": 1.0} for group in rest]
        groups += [{**group, "role": "dense", "lr_scale": scale} for group in dense]
        for layers, decay in pairs:
            params = [factor for pair in layers for factor in (pair.U, pair.V)]
            groups.append({"params": params, "weight_decay": decay, "role": "pairs", "lr_scale": scale})
        super().__init__([group for group in groups if group["params"]], {"lr": lr})
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
        adamw = [group for group in self.param_groups if group["role"] == "adamw"]
        self._adamw = torch.optim.AdamW(adamw, lr=lr, betas=betas, eps=eps, fused=True) if adamw else None
        if self._adamw is not None:
            # Share groups and state with AdamW, so that a learning rate or moment set on this optimizer applies to it.
            self._adamw.state = self.state
            for group, theirs in zip(adamw, self._adamw.param_groups, strict=True):
                group.update(theirs)
            self._adamw.param_groups = adamw

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Perform one optimizer step."""
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if group["role"] == "dense":
                self._step_dense(group)
            elif group["role"] == "pairs":
                self._step_pairs(group)

    def _mix(self, parameter: Tensor) -> Tensor:
        """Update the momentum and return this process's rows of its Nesterov form."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, buffer = self.rows.local(parameter.grad), self.rows.local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(buffer, self.momentum)

    def _step_dense(self, group: Mapping[str, Any]) -> None:
        parameters, lr = group["params"], group["lr"]
        count = 1 if self.rows.group is None else dist.get_world_size(self.rows.group)
        for first in range(0, len(parameters), count):
            batch = parameters[first : first + count]
            updates = self._orthogonalise([self._mix(parameter) for parameter in batch], batch)
            for parameter, update in zip(batch, updates, strict=True):
                rows = self.rows.local(parameter)
                rows.mul_(1 - lr * group["weight_decay"])
                rows.sub_(update.reshape(rows.shape).to(rows.dtype), alpha=lr * _stretch(*_matrix_shape(parameter)))

    def _orthogonalise(self, mixes: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's rows of the orthogonalised matrices.

        Process ``i`` of the group orthogonalises matrix ``i``, so there are at most as many matrices as processes.
        """
        group, mixes = self.rows.group, [mix.flatten(1) for mix in mixes]
        if group is None:
            return [orthogonalise_matrix(mix, self.dtype) for mix in mixes]
        index, shapes = self.rows.index, [_matrix_shape(parameter) for parameter in parameters]
        held = [self.rows.split(shape[0]) for shape in shapes]
        sizes = [rows[index] * shape[1] for rows, shape in zip(held, shapes, strict=True)]
        owns = index < len(shapes)
        whole = [rows * shapes[index][1] for rows in held[index]] if owns else []
        matrix = _exchange([mix.to(self.dtype) for mix in mixes], whole, group)
        update = orthogonalise_matrix(matrix.view(shapes[index]), self.dtype) if owns else matrix
        parts = _exchange(update.split(held[index]) if owns else [update], sizes, group).split(sizes)
        return [part.view(-1, shape[1]) for part, shape in zip(parts, shapes, strict=True)]

    def _step_pairs(self, group: Mapping[str, Any]) -> None:
        assert self.maps is not None
        lr, pairs = group["lr"], list(zip(group["params"][::2], group["params"][1::2], strict=True))
        mixes = [(self._mix(U), self._mix(V)) for U, V in pairs]
        rows: dict[str, Factors] = {}
        for index, (pair, momenta) in enumerate(zip(pairs, mixes, strict=True)):
            rows |= {
                f"{index}": Factors(self.rows.local(pair[0]), self.rows.local(pair[1])),
                f"{index} momentum": Factors(*momenta),
            }
        grams = gram_matrices(rows, self.rows.sum)
        shrink = math.sqrt(1 - lr * group["weight_decay"])
        by_modes: dict[int, list[int]] = {}
        for index, (U, _) in enumerate(pairs):
            by_modes.setdefault(U.shape[1], []).append(index)
        for indices in by_modes.values():  # batch the layers with the same number of modes
            of_factors = [grams[f"{index}"] for index in indices]
            of_momenta = [grams[f"{index} momentum"] for index in indices]
            maps = self.maps(
                torch.stack([gram.U for gram in of_factors]),
                torch.stack([gram.V for gram in of_factors]),
                torch.stack([gram.U for gram in of_momenta]),
                torch.stack([gram.V for gram in of_momenta]),
            )
            for index, *both in zip(indices, *maps, strict=True):
                # With the division by shrink, decay does not change the update of the product to first order.
                step = lr * _stretch(pairs[index][0].shape[0], pairs[index][1].shape[0]) / shrink
                for factor, mix, each in zip(pairs[index], mixes[index], both, strict=True):
                    self.rows.local(factor).mul_(shrink).sub_(mix @ each.to(mix.dtype), alpha=step)


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Return ``(out, in)``, for a convolution ``(out_channels, in_channels * kh * kw)``."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


def _stretch(out_features: int, in_features: int) -> float:
    return math.sqrt(max(1.0, out_features / in_features))


def _exchange(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``parts[i]`` to process ``i`` and return what is received, ``sizes[i]`` elements from process ``i``.

    Nothing is exchanged with processes beyond the end of a list. The result is flat, in the order of the processes.
    Elements are sent as bytes, because gloo does not support bfloat16.
    """
    count, dtype = dist.get_world_size(group), parts[0].dtype
    sent = [part.numel() * dtype.itemsize for part in parts] + [0] * (count - len(parts))
    received = [size * dtype.itemsize for size in sizes] + [0] * (count - len(sizes))
    outgoing = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return incoming.view(dtype)

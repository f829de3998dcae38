"""Muon, Spectron and LoRA-Muon on rows: factors from Grams, dense matrices divided among processes."""

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
"""Grams of ``U``, ``V`` and their momenta -> ``A, B``: the updates are ``m_U @ A`` and ``m_V @ B``; float64, in
batches."""


@dataclass(frozen=True)
class HeldRows:
    """How the processes that share one copy of the model hold it.

    Attributes:
        local: this process's rows of a parameter, gradient or moment; they share memory with it.
        sum: sums in place over the processes that hold different rows.
        split: how many of so many rows each of those processes holds.
        index: which of those processes this one is.
        group: those processes; None where each process holds every row.
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
    """Orthogonalised updates for matrices and factors, AdamW for the rest.

    The momentum of a matrix is an exponential mean of its gradients, mixed with the present one (Nesterov). The update
    of a matrix ``(out, in)`` is multiplied by ``sqrt(max(1, out / in))``. Weight decay is decoupled. Each factor of a
    pair shrinks by ``sqrt(1 - lr * decay)``, so that their product shrinks by ``1 - lr * decay`` as a dense matrix
    does.

    Two things travel in a step beside gradients. For factors it is one all-reduce of the upper triangles of four
    float64 Grams a layer, ``16 R (R + 1)`` bytes. A dense matrix of ``n`` elements that ``S`` processes hold goes to
    one of them, is orthogonalised there, and comes back: ``2 n (S - 1) / S^2`` elements of ``dtype`` a process. (To
    gather it in every process would send ``n (S - 1) / S`` and compute it ``S`` times.)

    Args:
        rest: parameters that AdamW trains, in groups with their ``weight_decay``.
        dense: matrices, in groups likewise; weights of convolutions count as matrices with a row a channel.
        pairs: factors, in groups likewise.
        rows: how they are held.
        maps: the rule of the pairs; None where there are none.
        lr: peak learning rate of the rest.
        matrix_lr: peak learning rate of matrices and factors.
        momentum: decay rate of their momentum.
        betas, eps: of AdamW.
        dtype: in which whole matrices are orthogonalised; ``torch.optim.Muon`` does it in bfloat16.
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
            # One set of groups and of moments for both: whoever sets a rate or a moment here sets it there.
            self._adamw.state = self.state
            for group, theirs in zip(adamw, self._adamw.param_groups, strict=True):
                group.update(theirs)
            self._adamw.param_groups = adamw

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that the parameters hold."""
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if group["role"] == "dense":
                self._step_dense(group)
            elif group["role"] == "pairs":
                self._step_pairs(group)

    def _mix(self, parameter: Tensor) -> Tensor:
        """Move the momentum on; this process's rows of the Nesterov mix of it and the gradient."""
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
        """This process's rows of the orthogonalised matrices; each is computed by one process."""
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
            rows |= {f"{index}": Factors(*map(self.rows.local, pair)), f"{index} momentum": Factors(*momenta)}
        grams = gram_matrices(rows, self.rows.sum)
        shrink = math.sqrt(1 - lr * group["weight_decay"])
        by_modes: dict[int, list[int]] = {}
        for index, (U, _) in enumerate(pairs):
            by_modes.setdefault(U.shape[1], []).append(index)
        for indices in by_modes.values():  # layers of one rank run as a batch
            of_factors = [grams[f"{index}"] for index in indices]
            of_momenta = [grams[f"{index} momentum"] for index in indices]
            maps = self.maps(
                torch.stack([gram.U for gram in of_factors]),
                torch.stack([gram.V for gram in of_factors]),
                torch.stack([gram.U for gram in of_momenta]),
                torch.stack([gram.V for gram in of_momenta]),
            )
            for index, *both in zip(indices, *maps, strict=True):
                step = lr * _stretch(pairs[index][0].shape[0], pairs[index][1].shape[0]) / shrink
                for factor, mix, each in zip(pairs[index], mixes[index], both, strict=True):
                    self.rows.local(factor).mul_(shrink).sub_(mix @ each.to(mix.dtype), alpha=step)


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """``(out, in)``; of a convolution ``(out_channels, in_channels * kh * kw)``."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


def _stretch(out_features: int, in_features: int) -> float:
    return math.sqrt(max(1.0, out_features / in_features))


def _exchange(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send part ``i`` to process ``i`` and receive ``sizes[i]`` elements from it, in one flat tensor.

    Processes beyond the end of a list take no part. Elements travel as bytes, because gloo knows no bfloat16.
    """
    count, dtype = dist.get_world_size(group), parts[0].dtype
    sent = [part.numel() * dtype.itemsize for part in parts] + [0] * (count - len(parts))
    received = [size * dtype.itemsize for size in sizes] + [0] * (count - len(sizes))
    outgoing = torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return incoming.view(dtype)

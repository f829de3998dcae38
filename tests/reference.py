"""The mathematics of ``inrank_dist.lowrank`` in a few obvious lines each: dense, float64, one process.

Nothing here is fast, sharded or clever; the real code must agree with it.
At the end, a stand-in for several processes: threads whose all-reduce really sums.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


def product(U: Tensor, V: Tensor) -> Tensor:
    """``U @ V.T`` in float64."""
    return U.detach().double() @ V.detach().double().T


def spectrum(U: Tensor, V: Tensor) -> Tensor:
    """``(R,)`` singular values of the dense product, padded with the zeros that it has no room for."""
    values = torch.linalg.svdvals(product(U, V))[: U.shape[1]]
    return torch.cat([values, values.new_zeros(U.shape[1] - len(values))])


def stable_rank(W: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm."""
    sigma = torch.linalg.svdvals(W.double())
    return float(sigma.square().sum() / sigma[0].square())


def explained(sigma: Tensor, q: int, dimension: int, criterion: str) -> float:
    """``g(q)``: all ``dimension`` values written out, the first ``q`` set to zero."""
    whole = torch.cat([sigma, sigma.new_zeros(dimension - len(sigma))])
    tail = whole.clone()
    tail[:q] = 0
    if criterion == "energy":
        return 1 - float(tail.square().sum() / whole.square().sum())
    return 1 - float(tail.var(unbiased=False) / whole.var(unbiased=False))


def scan(sigma: Tensor, rank: int, dimension: int, criterion: str, threshold: float, last: int) -> int:
    """The published rule: walk up from the present rank until enough is explained or the modes are used up."""
    q = rank
    while q < last and explained(sigma, q, dimension, criterion) < threshold:
        q += 1
    return q


def frozen(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best rank-``rank`` approximation, from an SVD of the product."""
    X, S, Yh = torch.linalg.svd(product(U, V), full_matrices=False)
    return X[:, :rank] * S[:rank].sqrt(), Yh[:rank].T * S[:rank].sqrt()


def second_moment(m: Tensor, v: Tensor, Q: Tensor, step: int, betas: tuple[float, float]) -> Tensor:
    """LDAdam's second moment under ``m -> m Q``, entry by entry, on moments without their bias."""
    m, v = m.double() / (1 - betas[0] ** step), v.double() / (1 - betas[1] ** step)
    mapped = torch.zeros(m.shape[0], Q.shape[1], dtype=torch.float64)
    for i in range(m.shape[0]):
        for k in range(Q.shape[1]):
            variance = sum((v[i, j] - m[i, j] ** 2) * Q[j, k] ** 2 for j in range(m.shape[1]))
            mean = sum(m[i, j] * Q[j, k] for j in range(m.shape[1]))
            mapped[i, k] = abs(variance + mean**2)
    return mapped * (1 - betas[1] ** step)


def gradients(U: Tensor, V: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of ``loss(U @ V.T)`` for both factors, by autograd."""
    U, V = (factor.detach().double().requires_grad_() for factor in (U, V))
    gradient_U, gradient_V = torch.autograd.grad(loss(U @ V.T), (U, V))
    return gradient_U, gradient_V


class Processes:
    """Threads in the place of processes. ``all_reduce`` waits for all of them, sums and gives every one the same bits.

    Attributes:
        calls: bytes that each collective moved, in order.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: list[int] = []
        self._slots: list[Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=30)

    def run(self, work: Callable[[int, Callable[[Tensor], None]], object]) -> list:
        """``work(index, all_reduce)`` in every process; its answers in order. The first error is raised again."""
        answers: list = [None] * self.count
        errors: list[BaseException] = []

        def process(index: int) -> None:
            try:
                answers[index] = work(index, lambda tensor: self._all_reduce(index, tensor))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=process, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert not self._barrier.broken, "the processes called a different number of collectives"
        return answers

    def _all_reduce(self, index: int, tensor: Tensor) -> None:
        self._slots[index] = tensor.clone()
        if self._barrier.wait() == 0:
            self.calls.append(tensor.numel() * tensor.element_size())
        assert {slot.shape for slot in self._slots} == {tensor.shape}, "the processes sum different things"
        tensor.copy_(torch.stack(self._slots).sum(0))
        self._barrier.wait()


def alone(tensor: Tensor) -> None:
    """The all-reduce of a single process."""


def cut(size: int, parts: int, seed: int) -> list[slice]:
    """Rows divided at random places: uneven, and often with empty parts."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, size + 1, (parts - 1,), generator=generator).sort().values.tolist()
    edges = [0, *inner, size]
    return [slice(edges[i], edges[i + 1]) for i in range(parts)]


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """Random orthonormal columns, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Independent normal entries, float32 as in training."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

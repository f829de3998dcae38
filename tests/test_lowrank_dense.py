"""Dense weights as trivial factors: both forms are truncated to the same best approximation, on uneven shards."""

from typing import Any

import pytest
import reference
import torch

from inrank_dist.lowrank.dense import DenseColumns, as_rows, dense_columns
from inrank_dist.lowrank.division import ALONE, Processes
from inrank_dist.lowrank.event import freeze_all, map_factors, orthogonalise
from inrank_dist.lowrank.spectrum import identity_rows, measure_spectra


@pytest.mark.parametrize(
    ("shape", "learned", "rank"), [((5, 19), 5, 3), ((5, 19), 2, 4), ((1, 7), 1, 1), ((6, 6), 6, 6)]
)
def test_a_wide_weight_becomes_its_best_approximation_on_three_uneven_shards(
    shape: tuple[int, int], learned: int, rank: int
) -> None:
    """Of rank ``learned``: modes beyond it are fresh. A Gram matrix has the size of the shorter side."""
    weight = (reference.normal(shape[0], learned, 1) @ reference.normal(shape[1], learned, 2).T).contiguous()
    out, in_ = (reference.cut(size, 3, seed) for size, seed in zip(shape, (3, 4), strict=True))
    Z = reference.normal(shape[1], shape[1], 5)

    def process(index: int, all_reduce: Any) -> tuple[torch.Tensor, torch.Tensor]:
        there = Processes(index, 3, all_reduce)
        mine, columns = out[index], in_[index]
        ranges = (mine.start, mine.stop), (columns.start, columns.stop)
        held = dense_columns(weight[mine], *ranges, shape, there)
        assert torch.equal(held.V, weight[:, columns].T) and held.modes == shape[0]
        spectra = measure_spectra({"a": held}, there)
        assert len(spectra.sigma["a"]) == shape[0]
        events = freeze_all(spectra, {"a": rank}, there)
        directions = {"a": Z[columns, : events["a"].fresh]} if events["a"].fresh else {}
        event = orthogonalise(events, {"a": held}, spectra, directions, there)["a"]
        assert event.fresh == max(rank - learned, 0)
        event = as_rows(event, held, columns.start, shape[1], there)
        identity = identity_rows(columns.start, columns.stop, shape[1], weight.device)
        found = map_factors(event, weight[mine], identity, Z[columns, : event.fresh] if event.fresh else None)
        return found.U, found.V

    processes = reference.Processes(3)
    pieces = processes.run(process)
    U, V = (torch.cat([each[place] for each in pieces]).double() for place in (0, 1))
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = min(rank, learned)
    best = (left[:, :kept] * sigma[:kept]) @ right[:kept]
    torch.testing.assert_close(U @ V.T, best, rtol=0, atol=1e-5 * float(sigma[0]))
    for factor in (U[:, :kept], V[:, :kept]):
        torch.testing.assert_close(factor.T @ factor, sigma[:kept].diag(), rtol=0, atol=1e-5 * float(sigma[0]))
    fresh = V[:, kept:]
    torch.testing.assert_close(fresh.T @ fresh, torch.eye(rank - kept, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        fresh.T @ V[:, :kept], torch.zeros(rank - kept, kept, dtype=torch.float64), rtol=0, atol=1e-4
    )
    assert not U[:, kept:].any()
    assert max(processes.calls) <= max(4 * shape[0] * shape[1], 8 * shape[1] * rank, 8 * shape[0] * (shape[0] + 1) * 2)


def test_alone_nothing_is_exchanged() -> None:
    weight = reference.normal(3, 8, 0)
    held = dense_columns(weight, (0, 3), (0, 8), (3, 8), ALONE)
    assert isinstance(held, DenseColumns) and torch.equal(held.U @ held.V.T, weight)

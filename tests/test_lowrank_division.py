"""Each small problem is solved in one process, and all hold its answer."""

import reference
import torch

from inrank_dist.lowrank.division import Processes, assign_owners, solve_once
from inrank_dist.lowrank.spectrum import Factors, measure_spectra


def test_owners_share_the_work() -> None:
    owner = assign_owners({f"layer{i}": 100 for i in range(12)} | {"large": 200}, 4)
    assert [sum(o == p for name, o in owner.items() if name != "large") for p in range(4) if p != owner["large"]] == [
        4
    ] * 3


def test_each_is_solved_once_and_all_get_the_same_bits() -> None:
    solved: list[tuple[int, str]] = []
    names = [f"layer{i}" for i in range(7)]
    owner = assign_owners(dict.fromkeys(names, 5), 3)
    simulated = reference.Processes(3)

    def process(index, all_reduce):
        def solve(name):
            solved.append((index, name))
            return [reference.normal(2, 3, int(name[5:])).double(), torch.full((1,), -0.0, dtype=torch.float64)]

        return solve_once({name: [(2, 3), (1,)] for name in names}, solve, owner, Processes(index, 3, all_reduce))

    answers = simulated.run(process)
    assert sorted(name for _, name in solved) == names
    assert all(owner[name] == index for index, name in solved)
    assert simulated.calls == [8 * 7 * 7]
    for answer in answers:
        for name in names:
            assert torch.equal(answer[name][0], reference.normal(2, 3, int(name[5:])).double())


def test_spectra_are_the_same_bits_everywhere_whoever_solves() -> None:
    """A process that solves a layer itself would otherwise hold other last digits than one that does not."""
    factors = {f"layer{i}": Factors(reference.normal(40, 6, i), reference.normal(30, 6, i + 50)) for i in range(5)}
    simulated = reference.Processes(3)

    def process(index, all_reduce):
        rows = {name: (layer.U[index::3], layer.V[index::3]) for name, layer in factors.items()}
        mine = {name: Factors(U, V) for name, (U, V) in rows.items()}
        return measure_spectra(mine, Processes(index, 3, all_reduce))

    spectra = simulated.run(process)
    for name, layer in factors.items():
        exact = torch.linalg.svdvals(layer.U.double() @ layer.V.double().T)[:6]
        assert torch.allclose(spectra[0].sigma[name], exact, rtol=1e-12)
        assert all(torch.equal(other.sigma[name], spectra[0].sigma[name]) for other in spectra)
        assert len({other.checksums[name] for other in spectra}) == 1
        assert [name in other.grams for other in spectra].count(True) == 1

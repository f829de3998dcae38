"""``base: none`` with ``measure: update``: the spectrum of what was learned, and what a decision costs."""

from pathlib import Path

import pytest
import reference
import torch
from runs import small_config, train

from inrank_dist.lowrank.division import ALONE
from inrank_dist.lowrank.spectrum import Factors, Learned, measure_spectra
from inrank_dist.method import controller
from inrank_dist.train.loop import Trainer

NO_BASE = {"lowrank__base": "none", "lowrank__measure": "update"}


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("grown", [0, 5])
def test_the_update_is_measured_to_rounding_however_small_it_is(size: float, grown: int) -> None:
    """In float32 factors of size one an update of 1e-6 is a few units in the last place, each of which counts."""
    U0, V0 = reference.normal(60, 8, 0), reference.normal(40, 8, 1)
    U = torch.cat([U0 + size * reference.normal(60, 8, 2), size * reference.normal(60, grown, 3)], dim=1)
    V = torch.cat([V0 + size * reference.normal(40, 8, 4), reference.normal(40, grown, 5)], dim=1)
    sigma = measure_spectra({"layer": Learned(Factors(U, V), Factors(U0, V0))}, ALONE).sigma["layer"]
    assert len(sigma) == 16 + grown
    # U V^T - U0 V0^T without the cancellation: the differences of float32 numbers are exact in float64.
    padded_U0, padded_V0 = (torch.nn.functional.pad(each.double(), (0, grown)) for each in (U0, V0))
    dense = (U.double() - padded_U0) @ V.double().T + padded_U0 @ (V.double() - padded_V0).T
    expected = torch.linalg.svdvals(dense)[: len(sigma)]
    assert torch.allclose(sigma, expected, rtol=1e-6, atol=1e-11 * float(expected[0]))


def test_nothing_learned_is_exactly_zero() -> None:
    start = Factors(reference.normal(60, 8, 0), reference.normal(40, 8, 1))
    sigma = measure_spectra({"layer": Learned(start, start)}, ALONE).sigma["layer"]
    assert torch.equal(sigma, torch.zeros(16, dtype=torch.float64))


def test_rows_of_the_start_may_lie_in_other_memory_and_precision() -> None:
    """They are kept in float32 on the CPU, whatever the model is in."""
    start = Factors(reference.normal(20, 4, 0), reference.normal(20, 4, 1))
    now = Factors(start.U.double() + 0.1, start.V.double())
    learned = Learned(now, start)
    assert learned.U.dtype == learned.V.dtype == torch.float64
    assert torch.allclose(learned.U @ learned.V.T, now.U @ now.V.T - start.U.double() @ start.V.double().T)


def test_a_decision_draws_no_factor_again_and_measures_only_products_that_change(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing them was a QR of every factor at every check, and cost more than all else together."""
    drawn: list[str] = []
    measured: list[tuple[bool, list[str]]] = []

    def measure(factors, processes):  # type: ignore[no-untyped-def]
        measured.append((isinstance(next(iter(factors.values()), None), Learned), list(factors)))
        return measure_spectra(factors, processes)

    def watch(trainer: Trainer) -> None:
        draw = trainer.ranks.values.factors
        trainer.ranks.values.factors = lambda layer: drawn.append(layer) or draw(layer)  # type: ignore[assignment, func-returns-value]
        rows.append(trainer.ranks._initial_rows)

    rows: list = []
    monkeypatch.setattr(controller, "measure_spectra", measure)
    recorder, table = train(small_config(corpus, **NO_BASE, lowrank__threshold=0.9), hook=watch)
    layers = list(table)
    assert sorted(drawn) == sorted(layers), "once each"
    assert rows[0].cache_info().currsize == 0, "let go at the freeze"
    checks = [record for record in recorder.records if record["kind"] == "rank_check"]
    events = {record["step"]: record for record in recorder.records if record["kind"] == "rank_event"}
    assert len(checks) == 3 and len(measured) == 6
    for check, update, product in zip(checks, measured[::2], measured[1::2], strict=True):
        assert update == (True, layers)
        event = events.get(check["step"], {"layers": {}})
        assert product == (False, [name for name in layers if name in event["layers"]])
    assert 0 < len(events[8]["layers"]) + len(events.get(16, {"layers": {}})["layers"]) < 2 * len(layers)

"""The page of a study and that of an experiment of the laboratory in a real browser."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import CHECKS, LANDSCAPE, PAPER, Browser
from cluster_tools import ROOT
from study_runs import pretend
from test_compare import HOSTILE
from test_theory import DUMMY, Sizes, dummy

from inrank_dist.study import Worker, read_study
from inrank_dist.study.page import write_results
from inrank_dist.study.results import compare
from inrank_dist.theory.experiment import Finished, Progress
from inrank_dist.theory.page import write_result

pytestmark = pytest.mark.slow


def study_page(folder: Path, names: list[str]) -> Path:
    """The page of a study whose runs are made up. The first variant is dense, and the control of all others."""
    dense = {"settings": {"lowrank.mode": "full", "optimizer.name": "muon"}, "tune": {"optimizer.lr": ["1e-3", "2e-3"]}}
    others = {
        name: {"control": names[0], "settings": {"lowrank.initial_rank": index + 1}}
        for index, name in enumerate(names[1:])
    }
    study: dict[str, Any] = {
        "base": str(ROOT / "configs/quickstart.yaml"), "dir": str(folder), "seeds": [1, 2, 3], "tuning_seeds": [7],
        "budget": {"tokens": 2**20, "flops": "control", "seconds": "control"}, "variants": {names[0]: dense} | others,
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    worker = Worker(read_study(file))
    draw = random.Random(0)
    costs = {name: draw.uniform(0.3, 0.8) for name in names[1:]}
    pretend(worker, lambda run: costs.get(run.variant.name, 1.0), lambda run: draw.uniform(2.6, 3.2))
    return write_results(worker.study, compare(worker))[0]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    finished = Finished("dummy", DUMMY, Sizes(), dummy(Sizes(), Progress()), 1.25, {"torch": "2"})
    return {
        "two": study_page(folder / "two", ["dense", "low rank"]),
        "many": study_page(folder / "many", ["dense", *(f"rank {rank}, layer crossing" for rank in range(1, 14))]),
        "hostile": study_page(folder / "hostile", ["dense", *HOSTILE]),
        "theory": write_result(finished, folder / "theory")[0],
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1400])
@pytest.mark.parametrize("name", ["two", "many", "hostile", "theory"])
def test_nothing_overlaps_is_cut_or_empty(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.errors.clear()
    browser.show(pages[name], width, dark=dark)
    assert browser.run(CHECKS) == []
    assert browser.errors == []


@pytest.mark.parametrize("name", ["two", "many", "hostile", "theory"])
def test_on_paper_nothing_overlaps_or_is_cut(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.show(pages[name], PAPER if name == "theory" else LANDSCAPE)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run(CHECKS) == []
    browser.call("Emulation.setEmulatedMedia", media="")


def test_every_seed_is_a_dot_that_says_what_it_is(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["two"], 1400)
    dots = "[...document.querySelectorAll('figure:nth-of-type({}) .wide circle title')].map(dot => dot.textContent)"
    parameters, operations = (browser.run(dots.format(index)) for index in (1, 2))
    # Equal tokens alone; then equal tokens, FLOPs and time of low rank, whose control has the same runs in all three.
    assert len(parameters) == 6 and len(operations) == 12
    assert parameters[0].startswith("dense, parameters 1e+06: ")
    assert sum(dot.startswith("low rank, TFLOPs of a run ") for dot in operations) == 9

"""The page of several runs in a real browser: on a phone, a tablet, a desktop and on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHECKS, PAPER, Browser
from test_compare import HOSTILE, make_run, unfinish

from inrank_dist.report.compare import write_comparison
from inrank_dist.report.comparison import Comparison

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    dense = {"lowrank__mode": "full", "optimizer__lr": 0.001}
    fixed = {"lowrank__mode": "fixed"}
    seeds = [
        make_run(folder / f"{name}-{seed}", seed, loss + seed / 10, **settings)
        for name, loss, settings in (("dense", 4.0, dense), ("inrank", 4.3, {}), ("fixed", 4.4, fixed))
        for seed in range(3)
    ]
    going = make_run(folder / "going", 3, 4.4)
    unfinish(going, 50)
    strange = [
        make_run(folder / "strange" / name.replace("/", "_"), lowrank__buffer=i + 1) for i, name in enumerate(HOSTILE)
    ]
    many = [make_run(folder / f"lr-{index}", optimizer__lr=0.001 * (index + 2)) for index in range(20)]
    sets = {"seeds": [*seeds, going], "hostile": strange, "many": many}
    return {name: write_comparison(Comparison(runs), folder / f"{name}.html") for name, runs in sets.items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1400])
@pytest.mark.parametrize("name", ["seeds", "hostile", "many"])
def test_nothing_overlaps_is_cut_or_empty(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.errors.clear()
    browser.show(pages[name], width, dark=dark)
    assert browser.run(CHECKS) == []
    for axis in ("tokens", "flops", "seconds"):
        browser.run(f"document.querySelector('[data-axis={axis}]').click()")
        assert browser.run(CHECKS) == [], axis
    assert browser.errors == []


@pytest.mark.parametrize("name", ["seeds", "hostile"])
def test_on_paper_nothing_overlaps_or_is_cut(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.show(pages[name], PAPER)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(CHECKS) == []
    browser.call("Emulation.setEmulatedMedia", media="")


def test_the_pointer_tells_every_config_with_its_value(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["seeds"], 1400)
    plots = browser.run("document.querySelectorAll('[data-chart]').length")
    assert plots == 8
    for index in range(plots):
        box = f"document.querySelectorAll('[data-chart]')[{index}]"
        browser.run(f"{box}.scrollIntoView({{block: 'center'}})")
        place = browser.run(f"{box}.getBoundingClientRect().toJSON()")
        browser.mouse("mouseMoved", place["left"] + 0.5 * place["width"], place["top"] + place["height"] / 2)
        tip = browser.run(f"{box}.querySelector('.tip').innerText")
        assert "dense" in tip or index == 3, "a full-rank run has no rank"
        assert "inrank" in tip and "NaN" not in tip
        browser.mouse("mouseMoved", 1, 1)


def test_each_axis_places_the_runs_by_their_own_cost(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["seeds"], 1400)
    ends = {}
    for axis in ("step", "tokens", "flops", "seconds"):
        browser.run(f"document.querySelector('[data-axis={axis}]').click()")
        ends[axis] = browser.run("document.querySelector('[data-chart=\"0\"] svg').textContent")
    assert len({*ends.values()}) == 4 and "floating-point operations" in ends["flops"]

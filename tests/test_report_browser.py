"""The report in a real browser: what is seen on a phone, a tablet, a desktop and on paper, and what reacts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import CHECKS, PAPER, Browser
from report_runs import HOSTILE, write_run
from runs import small_config

from inrank_dist.commands.main import main
from inrank_dist.report import write_report

pytestmark = pytest.mark.slow

WIDTHS = (390, 800, 1400)
TEXT = "document.querySelector('{}').innerText"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of runs that differ in what they have."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {
        "grown": write_run(folder / "grown", blocks=4, width=256),
        "resumed": write_run(folder / "resumed", resumed_at=100),
        "going": write_run(folder / "going", steps=30, checks=3, finished=False),
        "dense": write_run(folder / "dense", growing=False),
        "large": write_run(folder / "large", blocks=60, checks=40),
        "hostile": write_run(folder / "hostile", text=HOSTILE, resumed_at=100),
    }
    return {name: write_report(run) for name, run in runs.items()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["grown", "resumed", "going", "dense", "large", "hostile"])
def test_nothing_overlaps_is_cut_or_empty(
    browser: Browser, reports: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.errors.clear()
    browser.show(reports[name], width, dark=dark)
    assert browser.run(CHECKS) == []
    for axis in ("tokens", "flops", "seconds"):
        browser.run(f"document.querySelector('[data-axis={axis}]').click()")
        assert browser.run(CHECKS) == [], axis
    assert browser.errors == []
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("[...document.querySelectorAll('.tick')].slice(0, 2).map(t => t.setAttribute('y', 50))", "overlaps"),
        ("document.querySelector('.tile').style.width = '1200px'", "the page is"),
        ("document.querySelector('[data-chart] .tick').setAttribute('x', -30)", "is cut by its plot"),
        ("document.querySelector('[data-chart]').innerHTML = ''", "is empty"),
        ("document.querySelector('path.curve').setAttribute('d', 'MNaN 1L2 2')", "a number that is none"),
    ],
)
def test_the_checks_find_faults(browser: Browser, reports: dict[str, Path], fault: str, told: str) -> None:
    browser.show(reports["resumed"], 800)
    assert browser.run(CHECKS) == []
    browser.run(fault)
    assert any(told in found for found in browser.run(CHECKS))


@pytest.mark.parametrize("name", ["grown", "resumed", "going", "dense", "large", "hostile"])
def test_on_paper_nothing_overlaps_or_is_cut(
    browser: Browser, reports: dict[str, Path], name: str, tmp_path: Path
) -> None:
    browser.errors.clear()
    browser.show(reports[name], PAPER, dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(CHECKS) == []
    assert browser.run("getComputedStyle(document.body).color") == "rgb(22, 25, 29)"
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.show(reports[name], 390)
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and browser.errors == []


@pytest.mark.parametrize("width", [390, 1400])
def test_every_line_has_its_value_under_the_pointer(browser: Browser, reports: dict[str, Path], width: int) -> None:
    browser.show(reports["grown"], width)
    plots = browser.run("document.querySelectorAll('[data-chart], [data-part]').length")
    assert plots >= 10
    for index in range(plots):
        box = f"document.querySelectorAll('[data-chart], [data-part]')[{index}]"
        browser.run(f"{box}.scrollIntoView({{block: 'center'}})")
        place = browser.run(f"{box}.getBoundingClientRect().toJSON()")
        browser.mouse("mouseMoved", place["left"] + 0.5 * place["width"], place["top"] + place["height"] / 2)
        assert not browser.run(f"{box}.querySelector('.tip').hidden")
        curves = browser.run(f"{box}.querySelectorAll('path.curve').length")
        assert browser.run(f"{box}.querySelectorAll('.tip tr').length") == curves > 0
        tip = browser.run(f"{box}.querySelector('.tip').innerText")
        assert "NaN" not in tip and "undefined" not in tip
        inside = browser.run(
            f"(r => r.left >= 0 && r.right <= {width})({box}.querySelector('.tip').getBoundingClientRect())"
        )
        assert inside, tip
        browser.mouse("mouseMoved", 1, 1)
        assert browser.run(f"{box}.querySelector('.tip').hidden")


def test_the_pointer_tells_step_tokens_flops_and_time(browser: Browser, reports: dict[str, Path]) -> None:
    browser.show(reports["grown"], 1400)
    browser.run("document.querySelector('[data-chart=\"0\"]').focus()")
    for _ in range(100):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    tip = browser.run(TEXT.format('[data-chart="0"] .tip'))
    step = int(tip.split()[1].replace(",", ""))
    assert abs(step - 200) < 8
    seconds = round(step * 0.25)
    assert (
        f"step {step} · {step * 8192 / 1e6:.4g}M tokens · " in tip
        and f"0:{seconds // 60:02d}:{seconds % 60:02d}" in tip
    )
    assert "FLOPs" in tip and "train, smoothed" in tip and "validation" in tip
    cells = "[...document.querySelectorAll('[data-chart=\"0\"] .tip tr')].map(row => row.textContent)"
    validation = next(row for row in browser.run(cells) if row.startswith("validation"))
    found = re.fullmatch(r"validation(\d\.\d+)( at step 200)?", validation)
    assert found and 3 < float(found[1]) < 7


def test_an_event_is_told_where_it_is_marked(browser: Browser, reports: dict[str, Path]) -> None:
    browser.show(reports["resumed"], 1400)
    box = "document.querySelector('[data-chart=\"0\"]')"
    place = browser.run(f"{box}.querySelectorAll('.mark')[2].getBoundingClientRect().toJSON()")
    browser.run(f"{box}.scrollIntoView({{block: 'center'}})")
    place = browser.run(f"{box}.querySelectorAll('.mark')[2].getBoundingClientRect().toJSON()")
    browser.mouse("mouseMoved", place["left"], place["top"] + 50)
    assert "step 75: growth, 12 of 12 layers" in browser.run(TEXT.format('[data-chart="0"] .tip'))
    assert "resumed" in browser.run("JSON.stringify(page.runs[0].marks)")


def test_axes_marks_and_lines_can_be_chosen(browser: Browser, reports: dict[str, Path]) -> None:
    browser.show(reports["grown"], 800)
    label = "document.querySelector('[data-chart=\"0\"] svg').lastChild.parentElement.textContent"
    for axis, shown in (
        ("tokens", "tokens"),
        ("flops", "floating-point operations"),
        ("seconds", "training time, seconds"),
    ):
        browser.run(f"document.querySelector('[data-axis={axis}]').click()")
        assert shown in browser.run(label)
        pressed = "[...document.querySelectorAll('[data-axis][aria-pressed=true]')].map(b => b.dataset.axis)"
        assert set(browser.run(pressed)) == {axis}
    curves = "document.querySelectorAll('[data-chart=\"0\"] path.curve').length"
    before = browser.run(curves)
    browser.run("document.querySelector('figure .key').click()")
    assert browser.run(curves) == before - 1
    browser.run("document.querySelector('figure .key').click()")
    assert browser.run(curves) == before
    marks = "document.querySelectorAll('[data-chart=\"0\"] .mark').length"
    before = browser.run(marks)
    browser.run("document.querySelector('.controls .key').click()")
    assert 0 < browser.run(marks) < before
    assert browser.run("document.querySelectorAll('.controls .key[aria-pressed=false]').length") >= 2


def test_spectra_follow_the_layer_and_the_step(browser: Browser, reports: dict[str, Path]) -> None:
    browser.show(reports["grown"], 1400)
    path = "document.querySelector('[data-part=now] path.curve:last-of-type').getAttribute('d')"
    curves = "[...document.querySelectorAll('[data-part=now] path.curve')].map(p => p.getAttribute('d')).join()"
    assert browser.run(path) and "(8 of 8)" in browser.run(TEXT.format(".picker output"))
    seen = {browser.run(curves)}
    browser.run("document.querySelector('.picker').scrollIntoView({block: 'center'})")
    place = browser.run("document.querySelector('.picker input').getBoundingClientRect().toJSON()")
    for part in (0.7, 0.4, 0.02):
        browser.click(place["left"] + part * place["width"], place["top"] + place["height"] / 2)
        seen.add(browser.run(curves))
    assert len(seen) == 4 and "25 (1 of 8)" in browser.run(TEXT.format(".picker output"))
    browser.run("document.querySelector('[data-map]').scrollIntoView({block: 'center'})")
    place = browser.run("document.querySelector('[data-map]').getBoundingClientRect().toJSON()")
    x, y = place["left"] + 200, place["top"] + 4 + 18 + 3 * 13 + 6  # the fourth row of the first kind
    browser.mouse("mouseMoved", x, y)
    tip = browser.run(TEXT.format("[data-map] .tip"))
    assert "blocks.3.attention.q" in tip and "Rank found" in tip and "Null rank\t31" in tip
    browser.click(x, y)
    chosen = "(s => s.options[s.selectedIndex].text)(document.querySelector('.picker select'))"
    assert browser.run(chosen) == "blocks.3.attention.q"
    assert browser.run(curves) not in seen


def test_hostile_text_changes_nothing_of_the_page(browser: Browser, reports: dict[str, Path]) -> None:
    browser.show(reports["hostile"], 800)
    assert browser.run("document.title").startswith('"></title></script>') and browser.run("document.title") != "broken"
    tags = "[...document.querySelectorAll('h1, h2, figure, table')].map(e => e.tagName).join()"
    hostile, height = browser.run(tags), browser.run("document.documentElement.scrollHeight")
    browser.show(reports["resumed"], 800)
    assert hostile == browser.run(tags)
    assert height < browser.run("document.documentElement.scrollHeight") + 1500


def test_a_real_run_that_grew_froze_and_was_resumed(
    browser: Browser, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    for steps in (26, 30):
        settings = small_config(corpus, run__dir=tmp_path / "run", train__steps=steps, eval__interval=5)
        config.write_text(settings.to_yaml())
        assert main(["train", "--config", str(config), "--allow-change", "train.steps"]) == 0
    browser.errors.clear()
    for width in WIDTHS:
        browser.show(tmp_path / "run/report.html", width)
        assert browser.run(CHECKS) == []
    titles = browser.run("[...document.querySelectorAll('figcaption b')].map(b => b.textContent)")
    expected = ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput", "Memory", "Parameters"]
    expected += ["Rank of every layer", "Rank found", "Explained ratio", "Effective rank", "Spectrum", "Over training"]
    assert titles[: len(expected)] == expected and browser.errors == []
    axes = browser.run("Object.keys(page.runs[0].axes)")
    assert axes == ["step", "tokens", "flops", "seconds"]
    marks = browser.run("page.runs[0].marks.map(m => m.label)")
    assert {"growth", "freeze", "resume"} <= set(marks)


@pytest.mark.nightly
def test_three_hundred_thousand_steps_fit(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=300_000, blocks=12, checks=100, width=768)
    report = write_report(folder)
    assert report.stat().st_size < 10e6
    browser.errors.clear()
    for width in (390, 1400):
        browser.show(report, width)
        assert browser.run(CHECKS) == [] and browser.errors == []
    assert browser.run("Math.max(...page.charts[0].lines.map(l => l.x.length))") < 3000

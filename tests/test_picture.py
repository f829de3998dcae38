"""``inrank report --output FILE.svg``: a run as one image."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from runs import the_error

from inrank_dist.commands.main import main

SVG = "{http://www.w3.org/2000/svg}"
COMMITTED = Path(__file__).parent.parent / "inrank_dist/report/quickstart.svg"


def write_run(folder: Path, *, ranks: bool) -> Path:
    layers = {"a": {"from": 2, "to": 5, "explained": 0.8, "null_rank": 4}}
    records = [{"kind": "start", "steps": 40, **({"ranks": {"a": 2}} if ranks else {})}]
    records += [{"kind": "step", "step": step, "loss": 6 - step / 10} for step in range(10, 41, 10)]
    records += [{"kind": "eval", "step": 40, "loss": 2.5}]
    records += [{"kind": "rank_event", "step": 20, "action": "grow", "layers": layers}] if ranks else []
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def check_svg(file: Path) -> list[str]:
    """The texts of an image, which is XML, defines all of its colours for light and dark, and loads nothing."""
    text = file.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    light, dark = text.partition("prefers-color-scheme:dark")[::2]
    for colour in re.findall(r"var\((--\w+)\)", text):
        assert f"{colour}:#" in light and f"{colour}:#" in dark.partition("}")[0]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|@import", text)
    return [str(each.text) for each in root.iter() if each.tag in (f"{SVG}text", f"{SVG}tspan")]


@pytest.mark.parametrize("ranks", [True, False])
def test_an_image_of_a_run(tmp_path: Path, ranks: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks only where there are some; labels of events once."""
    run, file = write_run(tmp_path / "run", ranks=ranks), tmp_path / "run.svg"
    assert main(["report", "--run", str(run), "--output", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    texts = check_svg(file)
    assert {"Loss", "training", "validation"} <= {*texts} and ("Mean rank" in texts) == ranks
    assert texts.count("growth") == texts.count("null rank") == ranks
    assert not (run / "report.html").exists()


def test_an_image_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", ranks=False)
    status = main(["report", "--run", str(run), "--output", str(tmp_path / "none/run.svg")])
    assert "none/run.svg cannot be written" in the_error(status, capsys.readouterr().err)


def test_the_image_of_the_readme() -> None:
    """It is small, and the numbers beside it are those that it shows."""
    assert COMMITTED.stat().st_size < 20_000
    assert {"Loss", "Mean rank", "null rank", "freeze"} <= {*check_svg(COMMITTED)}
    assert "quickstart.svg" in (COMMITTED.parents[2] / "README.md").read_text()

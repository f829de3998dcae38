"""``inrank bench speed``: the same batch and engine for every form, ratios from one run, and what they say."""

import json
from pathlib import Path

import pytest
from pool import Pool
from runs import Fails

from inrank_dist.bench.speed import ABLATION, STANDARD, Form, Outcome, Row, Shape, break_even_width, measure_speed
from inrank_dist.bench.speed_table import conclusion, verdict
from inrank_dist.commands.main import main
from inrank_dist.engine.cost import Held
from inrank_dist.runtime.context import Context
from inrank_dist.train.speed import Peak

TINY = Shape(hidden=64, layers=1, vocab=320, seq=16, batch=1, targets="all", rank=12, buffer=4)
WORDS = "--widths 64,128 --targets all --vocab 320 --seq 16 --batch 1 --rounds 2 --no-compile"


def outcome(times: dict[Form, float], width: int = 64, flops: dict[Form, int] | None = None) -> Outcome:
    """With one round of the given seconds."""
    rows = {
        form: Row(form, (flops or {}).get(form, 100), Held(10, 10, 20), seconds=[seconds])
        for form, seconds in times.items()
    }
    return Outcome(Shape(width, 1, 64, 16, 1, "all", 16), 16, 16, 8, "local", 16, Peak(1e12, "given"), rows)


@pytest.mark.slow
def test_every_form_is_measured_on_one_process() -> None:
    forms = [form for form in {**dict.fromkeys(STANDARD), **dict.fromkeys(ABLATION)} if not form.compiled]
    got = measure_speed(TINY, forms, Context(), engine="local", bf16=False, rounds=3)
    assert list(got.rows) == forms
    assert (got.rank, got.rounded) == (12, 16)  # to the nearest multiple of 8
    for form, row in got.rows.items():
        assert len(row.seconds) == 3 and min(row.seconds) > 0
        assert row.extra > row.held.gradients / 2
        assert row.sent == {}
        assert (row.flops < got.rows[Form("full")].flops) == (form.model not in ("full", "growing"))
    full, frozen, growing = (got.rows[Form(model)] for model in ("full", "frozen", "growing"))
    assert growing.held.parameters > full.held.parameters > frozen.held.parameters
    assert got.flops_ratio(Form("frozen")) == full.flops / frozen.flops
    assert got.rows[Form("half")].flops < frozen.flops == got.rows[Form("bottleneck")].flops


def in_each_process() -> dict[str, tuple[float, float]]:
    context = Context()
    context.start(60)
    forms = [Form("full"), Form("frozen")]
    got = measure_speed(TINY, forms, context, engine="fsdp", bf16=False, rounds=1)
    context.stop()
    return {f"{form.model} {kind}": sent for form, row in got.rows.items() for kind, sent in row.sent.items()}


@pytest.mark.slow
def test_what_travels_is_counted(pool: Pool) -> None:
    for sent in pool.run("test_bench_speed:in_each_process", world_size=2):
        assert list(sent) == [f"{model} {kind}" for model in ("full", "frozen") for kind in ("ddp", "fsdp", "zero3")]
        for measured, formula in sent.values():
            assert measured == pytest.approx(formula, rel=0.02, abs=300)
        assert sent["frozen ddp"][0] < sent["full ddp"][0]


def test_ratios_are_to_full_rank_in_the_same_form() -> None:
    full, compiled = Form("full"), Form("full", compiled=True)
    frozen, fast = Form("frozen"), Form("frozen", compiled=True)
    got = outcome({full: 4.0, compiled: 3.0, frozen: 2.0, fast: 1.0}, flops={frozen: 50, fast: 50})
    assert (got.speedup(frozen), got.speedup(fast), got.flops_ratio(fast)) == (2.0, 3.0, 2.0)
    without = outcome({full: 4.0, fast: 1.0})
    assert without.speedup(fast) == 4.0


def test_break_even_lies_on_the_line_through_two_ranks() -> None:
    """Rank 8 takes 1 s and rank 16 takes 2 s: full rank with 3 s is as fast as rank 24."""
    times = {Form("full"): 3.0, Form("frozen"): 2.0, Form("half"): 1.0}
    assert outcome(times).break_even(compiled=False) == pytest.approx(24)
    assert outcome(times | {Form("half"): 2.5}).break_even(compiled=False) is None  # the times do not tell
    assert outcome({Form("full"): 3.0, Form("frozen"): 2.0}).break_even(compiled=False) is None
    assert outcome(times).break_even_flops == pytest.approx(64 * 12 / 18)
    assert "eager 24; by arithmetic 43" in verdict(outcome(times))
    assert "none, slower at any" in verdict(outcome(times | {Form("full"): 0.5, Form("half"): 1.9}))


def test_low_rank_pays_from_a_width_on() -> None:
    form, full = Form("frozen"), Form("full")
    widths = {
        w: outcome({full: 2.0, form: seconds}, w) for w, seconds in {64: 1.0, 128: 3.0, 256: 1.5, 512: 1.0}.items()
    }
    assert break_even_width(widths, form) == 256  # what is faster below a slower one does not count
    assert break_even_width({64: outcome({full: 1.0, form: 2.0})}, form) is None
    (line,) = conclusion(list(widths.values()))
    assert (
        "low rank pays here from width 256 on; widths (speed-up) 64 (2.00), 128 (0.67), 256 (1.33), 512 (2.00)" in line
    )


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a subject it is this one."""
    assert main(["bench", *WORDS.split(), "--json", str(tmp_path / "speed.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("full rank  ") == 2 and out.count("InRank after the freeze, not joined") == 2
    assert "break-even rank: eager" in out and "width 128, 1 layer(s)" in out
    assert "under torchrun" in out and "compiled" not in out.split("speed-up:")[0]
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [(each["hidden"], each["targets"]) for each in written["shapes"]] == [
        (64, "all"), (128, "all"),
    ]  # fmt: skip
    forms = written["shapes"][0]["forms"]
    assert [form["form"] for form in forms] == [form.name for form in STANDARD if not form.compiled]
    assert all(len(form["seconds"]) == 2 for form in forms)
    assert forms[0]["speedup"] == 1.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_forms_and_the_ablation(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--widths 64 --vocab 320 --seq 16 --batch 1 --rounds 1 --targets all --ablation"
    assert main(["bench", "speed", *words.split()]) == 0
    out = capsys.readouterr().out
    assert all(form.name in out for form in ABLATION)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--widths 64,wide", "--widths has 'wide'; write comma-separated whole numbers of at least 8"),
        ("--widths 4", "--widths has '4'"),
        ("--widths 200", "--widths has 200; write multiples of 64"),
        ("--models tiny", "--models has 'tiny'; write a comma-separated list of gpt2-small"),
        ("--models gpt2-small --widths 64", "--models and --widths cannot both be"),
        ("--vocab 64", "--vocab is 64; write at least 300"),
        ("--targets head", "--targets has 'head'; write mlp, all or mlp,all"),
        ("--rank 600", "--rank is 600 but a width is 512; write at most 512"),
        ("--rounds 0", "--rounds is 0; write a whole number of at least 1"),
        ("--forms 12", "--forms has 12; the table has 11 rows"),
        ("--forms 6,7", "without the full-rank baseline; write 1 as well"),
        ("--precision fp16", "--precision"),
        ("--engine zero9", "--engine is zero9; write"),
        ("--json no/such/file", "--json is no/such/file, but no/such is no folder"),
        ("speed --width 64", "'--width'"),
    ],
)
def test_mistakes_are_one_line(fails: Fails, words: str, says: str) -> None:
    assert says in fails("bench", *words.split())

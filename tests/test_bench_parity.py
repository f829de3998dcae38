"""``inrank bench parity`` and launch/gpu.sh, on the CPU."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from cluster_tools import LAUNCH, launch_environment
from runs import Fails

from inrank_dist.bench.parity import CASES, Bench, Case
from inrank_dist.commands.main import main


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_what_computes_the_same_holds_and_what_does_not_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one more warm-up step of the rate is another run."""
    resumed = next(case for case in CASES if case.name == "resumed")
    other = Case("another schedule", {"schedule.warmup_steps": "3"})
    broken = Case("refused", {"train.global_batch_size": "9"})
    monkeypatch.setattr("inrank_dist.commands.bench_parity.CASES", (resumed, other, broken))
    assert main(["bench", "parity", "--workers", "2", "--json", str(tmp_path / "parity.json")]) == 1
    out, err = capsys.readouterr()
    assert err == "error: does not compute the same as on the CPU: another schedule; refused\n"
    assert "refused: failed (error: train.global_batch_size is 9" in out
    cases = json.loads((tmp_path / "parity.json").read_text())["cases"]
    assert cases["resumed"]["difference"] == 0 and cases["resumed"]["same_ranks"]
    assert cases["another schedule"]["difference"] > 1e-4
    assert [case["holds"] for case in cases.values()] == [True, False, False]


def test_ranks_count_where_rounding_cannot_excuse_them() -> None:
    from inrank_dist.bench.parity import Parity

    exact, rough = Case("exact"), Case("rough", limit=2e-2)
    assert not Parity(exact, 1e-7, same_ranks=False).holds
    assert Parity(rough, 1e-3, same_ranks=False).holds
    assert not Parity(rough, float("nan"), same_ranks=True).holds


def test_mistakes(tmp_path: Path, fails: Fails) -> None:
    assert "--only is nothing; write prefixes of local; ddp; fsdp; zero0" in fails(
        "bench", "parity", "--only", "nothing"
    )
    assert "--timeout is 0" in fails("bench", "parity", "--timeout", "0")
    assert "--workers is 0" in fails("bench", "parity", "--workers", "0")


def test_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {dataclasses.replace(case).limit for case in CASES} == {1e-5, 2e-2}
    assert Bench.__doc__


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_one_script_for_a_gpu_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    """All of its parts, in toy shapes; each leaves what it found."""
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/valid").mkdir()
    text = (Path(__file__).parent / "reference_step.py").read_text()
    for index in range(8):
        (tmp_path / f"data/train/{index}.txt").write_text(text[index * 200 :])
    (tmp_path / "data/valid/v.txt").write_text(text[::-1])
    out = tmp_path / "out"
    done = subprocess.run(
        [str(LAUNCH / "gpu.sh"), "--toy", "--out", str(out), "--data", str(tmp_path / "data")],
        capture_output=True, text=True, timeout=550, env=launch_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(case["holds"] for case in json.loads((out / "parity.json").read_text())["cases"].values())
    assert "full rank, compiled" in (out / "speed.txt").read_text()
    (tokens, _) = json.loads((out / "study/study.json").read_text()).values()
    assert [row["control"] for row in tokens] == [None, "AdamW dense", "Muon dense", *["Muon dense, crossing"] * 3]
    assert all(loss < 6.3 for row in tokens for loss in row["losses"])  # a uniform guess of 512 tokens: 6.24


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--parts parity,sped", "error: --parts has sped; write some of parity,speed,study"),
        ("--data /no/such", "error: --data is /no/such; write a folder with train and valid below it"),
        ("--out", "error: --out lacks its value; see "),
        ("--fast", "error: --fast is not an option of "),
    ],
)
def test_mistakes_of_the_script(tmp_path: Path, words: str, says: str) -> None:
    done = subprocess.run(
        [str(LAUNCH / "gpu.sh"), *words.split()], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says) and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())

"""The first command's job, whole: two processes under torchrun, FSDP2, the embedded corpus."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharing import nightly, slow

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("steps", [slow(130), nightly(400)])
def test_quickstart_learns_grows_and_freezes(tmp_path: Path, steps: int) -> None:
    """Validation ends well below the unigram entropy; there is growth, a freeze, a report and a sample."""
    words = ["--config", "configs/quickstart.yaml", "--run.dir", str(tmp_path / "run"), f"--train.steps={steps}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "inrank_dist", "train", *words, "--data.cache_dir", str(tmp_path / "cache")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (summary,) = [record for record in records if record["kind"] == "summary"]
    assert summary["validation_loss"] < summary["unigram_entropy"] - 1.0
    assert summary["parameters"] < 0.61 * summary["parameters_dense"]  # the first block stays dense
    layers = summary["ranks"].values()
    factors = sum(layer["rank"] * sum(layer["shape"]) for layer in layers)
    assert factors <= 0.33 * sum(math.prod(layer["shape"]) for layer in layers)
    assert {record["action"] for record in records if record["kind"] == "rank_event"} == {"grow", "freeze"}
    assert (tmp_path / "run/report.html").is_file()
    assert "sample" in done.stdout
    assert f"unigram entropy {summary['unigram_entropy']:.4f}" in done.stdout
    assert f"{summary['validation_loss']:.4f}" in done.stdout

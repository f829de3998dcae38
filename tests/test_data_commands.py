"""Commands on runs whose data, tokenizer or cache is not where it was, or is somebody else's."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from runs import Fails, small_config

from inrank_dist.commands.main import main
from inrank_dist.data import DataSettings, TokenizerSettings, find_prepared, prepare
from inrank_dist.data.preparation import Prepared
from inrank_dist.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a tokenizer of its own, its cache beside it."""
    place = tmp_path_factory.mktemp("data-commands")
    settings = {"run__dir": place / "run", "data__cache_dir": place / "cache", "lowrank__warmup_steps": 2}
    config = small_config(corpus, train__steps=4, **settings)
    prepared = prepare(config.data, config.tokenizer, config.model.max_seq_len, progress=False)
    prepared.tokenizer.save(place / "own.model")
    config = small_config(corpus, train__steps=4, tokenizer__path=place / "own.model", **settings)
    (place / "config.yaml").write_text(config.to_yaml())
    assert main(["train", "--config", str(place / "config.yaml")]) == 0
    return place


def test_a_tokenizer_that_moved(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The checkpoint holds it: evaluation and training go on, with a line."""
    (run / "own.model").rename(run / "moved.model")
    try:
        assert main(["eval", "--run", str(run / "run")]) == 0
        more = ["--train.steps", "6", "--allow-change", "train.steps"]
        assert main(["train", "--config", str(run / "config.yaml"), *more]) == 0
        shutil.rmtree(run / "cache")
        assert main(["eval", "--run", str(run / "run"), "--data.cache_dir", str(run / "cache")]) == 0
    finally:
        (run / "moved.model").rename(run / "own.model")


def test_eval_writes_only_where_the_user_says(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run folder may come from anybody: its settings must not make this user write anywhere."""
    shutil.rmtree(run / "cache", ignore_errors=True)
    assert main(["eval", "--run", str(run / "run")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the data of") and f"write --data.cache_dir {run / 'cache'}, or another" in error
    assert not (run / "cache").exists()
    assert main(["eval", "--run", str(run / "run"), "--data.cache_dir", str(run / "elsewhere")]) == 0
    assert not (run / "cache").exists()
    (run / "elsewhere").rename(run / "cache")
    before = sorted(path.name for path in (run / "cache").iterdir())
    assert main(["eval", "--run", str(run / "run")]) == 0
    assert sorted(path.name for path in (run / "cache").iterdir()) == before


def small(tmp_path: Path) -> tuple[DataSettings, TokenizerSettings, int]:
    for name in range(8):
        (tmp_path / f"{name}.txt").write_text(f"document {name} says this and that\n" * 30)
    data = DataSettings(source="files", paths=[str(tmp_path / "*.txt")], cache_dir=str(tmp_path / "cache"))
    return data, TokenizerSettings(vocab_size=300), 8


def test_find_prepared_writes_nothing(tmp_path: Path) -> None:
    settings = small(tmp_path)
    assert find_prepared(*settings) is None and not (tmp_path / "cache").exists()
    made = prepare(*settings, progress=False)
    found = find_prepared(*settings)
    assert isinstance(found, Prepared) and found.fingerprint == made.fingerprint


def test_a_document_in_both_splits_is_told_at_every_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, tokenizer, block = small(tmp_path)
    (tmp_path / "held").mkdir()
    shutil.copy(tmp_path / "0.txt", tmp_path / "held" / "copy.txt")
    data.validation_paths = [str(tmp_path / "held" / "copy.txt")]
    for _ in range(2):
        caplog.clear()
        prepare(data, tokenizer, block, progress=False)
        told = "warning: 1 of 1 validation documents (100.0% of the bytes) are in the training text as well"
        assert caplog.messages == [told]


def test_one_document_begins_its_rows_with_the_separator(tmp_path: Path) -> None:
    """As joined rows: what ``generate`` begins with would otherwise never have had anything after it."""
    (tmp_path / "a.txt").write_text("a story without an end\n" * 200)
    (tmp_path / "v.txt").write_text("a story without an end\n" * 20)
    paths = {"paths": [str(tmp_path / "a.txt")], "validation_paths": [str(tmp_path / "v.txt")]}
    data = DataSettings(source="files", cache_dir=str(tmp_path / "cache"), **paths)
    prepared = prepare(data, TokenizerSettings(vocab_size=300), 8, progress=False)
    for part in (prepared.train, prepared.validation):
        rows = part.with_format("numpy")[:]["input_ids"]
        assert (rows[:, 0] == prepared.tokenizer.eos_id).all()
    rows = prepared.train.with_format("numpy")[:]["input_ids"]
    text = (tmp_path / "a.txt").read_text()
    assert text.startswith(prepared.tokenizer.decode(rows[:, 1:].ravel().tolist()))


@pytest.mark.usefixtures("progress_is_on")
def test_progress_is_that_of_the_process_that_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    """Which may be any process of a job, while the others say nothing."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    config = small_config(corpus, data__cache_dir=tmp_path / "cache", run__dir=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    try:
        assert main(["prepare", "--config", str(tmp_path / "config.yaml")]) == 0
    finally:
        logging.getLogger("inrank_dist").setLevel(logging.INFO)
    assert any("tokenising train: done in" in message for message in caplog.messages)
    assert {record.name for record in caplog.records} == {"inrank_dist.progress"}


AS_NOBODY = """
import os, sys
import inrank_dist.commands.prepare, inrank_dist.data.preparation  # the interpreter may be root's own
from inrank_dist.commands.main import main
os.setgid(65534); os.setuid(54321); os.environ.pop("HOME", None)
for cache in sys.argv[2:]:
    print(main(["prepare", "--config", sys.argv[1], "--data.cache_dir", cache]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_cache(corpus: Path) -> None:
    """One line, whatever it is that may not be done; with a user that is in no passwd and has no home."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(corpus / "corpus", place / "text")
        (place / "config.yaml").write_text(small_config(corpus, data__paths=f"[{place}/text/*.txt]").to_yaml())
        for folder, mode in ((place / "closed", 0o700), (place / "readable", 0o755), (place, 0o755)):
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        caches = [str(place / "closed"), str(place / "readable"), "~/cache"]
        command = [sys.executable, "-c", AS_NOBODY, str(place / "config.yaml"), *caches]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd="/")
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line == "2" or line.startswith("error: ")]
    assert errors[1::2] == ["2"] * 3
    for error in errors[:4:2]:
        assert error.startswith(f"error: data.cache_dir is {place}/") and "cannot be used (Permission denied)" in error
    assert errors[4].startswith("error: data.cache_dir is '~/cache', and nothing says where that home folder is")


def test_a_cache_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle is no missing data set."""
    settings = small(tmp_path)
    prepare(*settings, progress=False)
    is_dir = Path.is_dir

    def fail(path: Path, **more: bool) -> bool:
        if path.parent.name == "cache":
            raise OSError(116, "Stale file handle")
        return is_dir(path, **more)

    monkeypatch.setattr(Path, "is_dir", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Stale file handle\)"):
        find_prepared(*settings)
    with pytest.raises(UserError, match=r"cannot be used \(Stale file handle\)"):
        prepare(*settings, progress=False)


def test_home_in_a_path_of_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave ``--run=~/run`` as it is."""
    monkeypatch.setenv("HOME", str(run))
    assert main(["verify", "--run=~/run"]) == 0
    assert main(["prepare", "--config=~/config.yaml", "--print-config"]) == 0
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert main(["verify", "--run=~/run"]) == 2


@pytest.mark.slow
def test_bench_data_prepares_the_same_text_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, each batch of documents loses less than a row; ours loses less than a row in all."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    file = tmp_path / "result.json"
    main(["bench", "data", "--megabytes", "1", "--rounds", "1", "--threads", "2", "--json", str(file)])
    assert "inrank prepare, SentencePiece" in capsys.readouterr().out
    by_hand, same, ours = json.loads(file.read_text())["routes"]
    assert 0 <= same["tokens"] - by_hand["tokens"] <= 4 * 1024
    assert all(min(route["seconds"]) > 0 and min(route["cpu_seconds"]) > 0 for route in (by_hand, same, ours))


def test_bench_data_needs_enough_text(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "a.txt").write_text("short")
    error = fails("bench", "data", "--paths", str(tmp_path / "*.txt"))
    assert error == "the text has 0.0 MB; write a smaller --megabytes, or --paths with more text"

"""A checkpoint that was damaged or forged is refused by name, or the one before it is used with a loud line."""

import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from runs import small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inrank_dist.commands.main import main
from inrank_dist.data import Tokenizer
from inrank_dist.runtime.context import Context
from inrank_dist.runtime.errors import UserError
from inrank_dist.train.checkpoint import find_checkpoint, folder_of, list_checkpoints, peek_checkpoint, resumable
from inrank_dist.train.checkpoint.folder import begin

OLD, NEW = 8, 16
"""Steps of the two checkpoints: in the first the base is fading, in the second the rank is frozen."""

SHARDS = tuple(f"shard-0000{index}-model-00001-of-00001.safetensors" for index in (1, 2))
FILES = ("complete", "config.yaml", "manifest.json", *SHARDS, "state.json", "tokenizer.model")
LAYER = "blocks.0.mlp.up"


@pytest.fixture(scope="module")
def original(pool: Pool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with FSDP2 and two checkpoints; no test changes it."""
    run = tmp_path_factory.mktemp("original")
    config = small_config(corpus, run__dir=run, train__steps=NEW, lowrank__warmup_steps=NEW, checkpoint__interval=OLD)
    pool.run("runs:train_in_worker", config, world_size=2)
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000008", "step-00000016"]
    assert sorted(os.listdir(folder_of(run, NEW))) == sorted(FILES)
    return run


def copy(original: Path, place: Path) -> Path:
    """A run folder with the same checkpoints, to be damaged."""
    shutil.copytree(original / "checkpoints", place / "checkpoints")
    return place


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return copy(original, tmp_path / "run")


@pytest.fixture
def newest(run: Path) -> Path:
    """The folder of the newest checkpoint of a copy, to be damaged."""
    return folder_of(run, NEW)


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder, with contents and times."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def names_one(message: str, names: tuple[str, ...]) -> bool:
    """Whether one of the names is in a message; ``complete`` is not in ``incomplete``."""
    return any(re.search(rf"(?<!\w){re.escape(name)}", message) for name in names)


def loads(run: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> list[str]:
    """The ways in which a run loads without complaint, although its newest checkpoint is damaged in ``names``."""
    silent = []
    try:
        find_checkpoint(run, NEW)
        silent.append("asked for: loaded")
    except UserError as error:
        if not names_one(str(error), names):
            silent.append(f"asked for: {error}")
    for which, find in (("newest", find_checkpoint), ("resumed", lambda run: resumable(run, Context()))):
        caplog.clear()
        step = find(run).state.step
        told = [r for r in caplog.records if r.levelname == "WARNING" and names_one(r.getMessage(), names)]
        if step != OLD or not told:
            silent.append(f"{which}: loaded step {step}, {len(told)} warnings")
    return silent


def refused(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that the newest checkpoint is refused for ``name`` and the one before it is used."""
    assert loads(run, (name,), caplog) == []


# Damage: bytes that are not as they were written.


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << position % 8
    file.write_bytes(content)


def truncate(file: Path, size: int) -> None:
    os.truncate(file, size)


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def damages(original: Path) -> Iterator[tuple[tuple[str, ...], str, Callable[[Path], object]]]:
    """Names of the files, what becomes of them, and the function that does it to the newest checkpoint's folder."""
    newest, oldest = folder_of(original, NEW), folder_of(original, OLD)
    for name in FILES:
        size = (newest / name).stat().st_size
        for position in sorted({round(part * (size - 1) / 11) for part in range(12)}):
            yield (name,), f"byte {position}", lambda to, name=name, at=position: flip(to / name, at)
        for left in (size - 1, size // 2, 0):
            yield (name,), f"cut to {left}", lambda to, name=name, left=left: truncate(to / name, left)
        yield (name,), "removed", lambda to, name=name: (to / name).unlink()
        yield (name,), "longer", lambda to, name=name: append(to / name)
        if (newest / name).read_bytes() != (oldest / name).read_bytes():
            yield (name,), "of the older", lambda to, name=name: shutil.copy(oldest / name, to / name)
    for one, other in itertools.combinations(FILES, 2):
        yield (one, other), "swapped", lambda to, one=one, other=other: swap(to / one, to / other)
    seals = ("manifest.json", "complete")
    yield SHARDS, "seal of the older", lambda to: [shutil.copy(oldest / name, to / name) for name in seals]


@pytest.mark.slow
def test_no_damage_is_loaded_silently(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    """Every file, a bit flipped in twelve places, cut, emptied, removed, longer, swapped, of another step."""
    silent, trials = [], 0
    for names, what, damage in damages(original):
        run = copy(original, tmp_path / "run")
        damage(folder_of(run, NEW))
        silent += [f"{', '.join(names)} {what}: {how}" for how in loads(run, names, caplog)]
        trials += 3  # each damage is met in all three ways
        shutil.rmtree(run)
    record_property("trials", trials)
    assert silent == []
    assert trials >= 200


@pytest.mark.parametrize("name", FILES)
def test_all_damaged(run: Path, name: str) -> None:
    """Then nothing is loaded, nothing is made anew and nothing is touched."""
    for step in (OLD, NEW):
        flip(folder_of(run, step) / name, 40)
    before = snapshot(run)
    finds: list[Callable[[Path], object]] = [find_checkpoint, lambda run: resumable(run, Context())]
    for find in finds:
        with pytest.raises(UserError) as caught:
            find(run)
        assert name in str(caught.value) and "step-00000016" in str(caught.value)
        assert f"{run} holds no checkpoint that can be used" in str(caught.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["config.yaml", "state.json", "tokenizer.model"])
def test_the_first_look_is_not_at_damaged_files(run: Path, newest: Path, name: str) -> None:
    """Of what is looked at before the data is prepared, a flipped digit would pass for other settings, or for a run
    that is complete."""
    assert peek_checkpoint(run).state.step == NEW
    flip(newest / name, (newest / name).stat().st_size // 2)
    assert peek_checkpoint(run).state.step == OLD


def resumed_step(run: Path) -> int:
    """For the pool: the step that this process would go on from."""
    context = Context()
    context.start(60)
    try:
        return resumable(run, context).state.step
    finally:
        context.stop()


def test_processes_go_on_from_the_same_checkpoint(pool: Pool, original: Path, tmp_path: Path) -> None:
    """Each hashes other files; what one finds, all heed."""
    runs = {name: copy(original, tmp_path / name) for name in SHARDS}
    for name, run in runs.items():
        flip(folder_of(run, NEW) / name, 50_000)
    runs["forged"] = copy(original, tmp_path / "forged")
    forge(folder_of(runs["forged"], NEW), lambda tensors, _: tensors.pop("final_norm.weight"))
    for run in runs.values():
        assert pool.run("test_checkpoint_damage:resumed_step", run, world_size=2) == [OLD, OLD]
    assert pool.run("test_checkpoint_damage:resumed_step", original, world_size=2) == [NEW, NEW]


# Forgeries: manifest and marker fit the files, as if somebody had taken the trouble.


def reseal(folder: Path) -> None:
    """Write manifest and marker for the files that are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: entry(path) for path in folder.iterdir() if path.name not in ("manifest.json", "complete")}
    write_manifest(folder, json.dumps(manifest | {"files": files}))


def entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_manifest(folder: Path, content: str | bytes) -> None:
    """Write a manifest as it is, and the marker that fits it."""
    content = content.encode() if isinstance(content, str) else content
    (folder / "manifest.json").write_bytes(content)
    (folder / "complete").write_text(f"{hashlib.sha256(content).hexdigest()}\n")


Tensors = dict[str, torch.Tensor]
Offsets = dict[str, dict[str, Any]]


def forge(folder: Path, change: Callable[[Tensors, Offsets], object], shards: tuple[str, ...] = SHARDS) -> None:
    """Change the tensors, or what is said of their places, in some shards."""
    for name in shards:
        with safe_open(folder / name, framework="pt") as file:
            notes = file.metadata()
        tensors, offsets = load_file(folder / name), json.loads(notes["DCP_SHARDING_INFO"])
        change(tensors, offsets)
        save_file(tensors, folder / name, metadata=notes | {"DCP_SHARDING_INFO": json.dumps(offsets)})
    reseal(folder)


def test_a_checkpoint_that_was_sealed_again_is_good(run: Path, newest: Path) -> None:
    """Else the tests below could fail for the wrong reason."""
    forge(newest, lambda tensors, offsets: None)
    assert find_checkpoint(run).state.step == NEW
    assert resumable(run, Context()).state.step == NEW


class Trap:
    """What a pickle could do to the one who reads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    "name", ["data.pkl", "weights.pt", "model.bin", ".metadata", "shard-00003-model-00001-of-00001.safetensors"]
)
def test_a_planted_pickle(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, name: str, listed: bool) -> None:
    (newest / name).write_bytes(pickle.dumps(Trap(run / "sprung")))
    if listed:
        reseal(newest)
    refused(run, "step-00000016" if listed and name.endswith("safetensors") else name, caplog)
    assert main(["verify", "--run", str(run)]) == 2
    assert not (run / "sprung").exists()
    pickle.loads((newest / name).read_bytes()).close()
    assert (run / "sprung").exists()  # the trap does work


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    content = pickle.dumps(Trap(run / "sprung"))
    if name == "manifest.json":
        write_manifest(newest, content)
    else:
        (newest / name).write_bytes(content)
        if name != "complete":
            reseal(newest)
    refused(run, "tensor file" if name in SHARDS else name, caplog)
    assert main(["verify", "--run", str(run)]) == 2
    assert not (run / "sprung").exists()


def test_yaml_that_makes_objects(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    (newest / "config.yaml").write_text(f"run: !!python/object/apply:builtins.open [{run}/sprung, w]\n")
    reseal(newest)
    refused(run, "config.yaml", caplog)
    assert not (run / "sprung").exists()


@pytest.mark.parametrize("name", ["../outside.json", "{}/outside.json", "below/outside.json", "..", ".", "", ".x.json"])
def test_a_manifest_that_names_another_place(
    run: Path, newest: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Size and sha256 are right; only the name is not."""
    name = name.format(run)
    (newest / "below").mkdir()
    for place in (newest.parent, run, newest / "below"):
        (place / "outside.json").write_text("{}")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = entry(run / "outside.json")
    write_manifest(newest, json.dumps(manifest))
    refused(run, f"manifest.json lists {name!r}", caplog)


@pytest.mark.parametrize(
    "content",
    [
        "[]", "1", "null", '"x"', "{", "[" * 100_000, '{"format": 2}',
        '{"format": 2, "ephemeral": "no", "files": {}}',
        '{"format": 2, "ephemeral": false, "files": []}',
        '{"format": 2, "ephemeral": false, "files": {"state.json": {}}}',
        '{"format": 2, "ephemeral": false, "files": {"state.json": {"bytes": "1", "sha256": "x"}}}',
        '{"format": 2, "ephemeral": false, "files": {"state.json": {"bytes": 1, "sha256": "x", "more": 1}}}',
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    write_manifest(newest, content)
    refused(run, "manifest.json is not a manifest", caplog)


def test_a_manifest_of_another_format(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_manifest(newest, json.dumps(json.loads((newest / "manifest.json").read_text()) | {"format": 99}))
    refused(run, "has format 99; this version reads format 2", caplog)


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """What it leads to may change after it was hashed."""
    (newest / name).rename(run / name)
    (newest / name).symlink_to(run / name)
    refused(run, name, caplog)


def test_a_link_in_place_of_the_folder(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest.rename(run / "elsewhere")
    newest.symlink_to(run / "elsewhere")
    refused(run, "step-00000016 is a link", caplog)


@pytest.mark.parametrize("step", [OLD, 17])
def test_a_folder_under_another_name(run: Path, newest: Path, step: int) -> None:
    """Its samples would follow on from another step than its name says."""
    shutil.rmtree(folder_of(run, OLD))
    newest.rename(folder_of(run, step))
    with pytest.raises(UserError, match=rf"step-{step:08d}/state\.json is of step 16"):
        find_checkpoint(run)


U, MOMENT = f"{LAYER}.U", f"optimizer.exp_avg.{LAYER}.U"
FIRST = SHARDS[:1]


def rows_elsewhere(tensors: Tensors, offsets: Offsets) -> None:
    """A part that is said to lie one row higher than it does: one row twice, one not at all."""
    offsets[U]["saved_offsets"][0] -= 1


@pytest.mark.parametrize(
    ("change", "shards", "says"),
    [
        (lambda t, o: t.update({U: t[U][:, :-1].contiguous()}), SHARDS, f"{U} as float32 [128, "),
        (lambda t, o: t.update({U: t[U][:, :-1].contiguous()}), FIRST, U),
        (lambda t, o: t.update({U: t[U].flatten()}), FIRST, "tensor file that cannot be read"),
        (lambda t, o: t.update({U: t[U].double()}), SHARDS, f"{U} as float64 [128, "),
        (lambda t, o: t.update({U: t[U].half()}), FIRST, f"parts of {U} in different dtypes"),
        (lambda t, o: t.pop(U), SHARDS, f"{U} as nothing"),
        (lambda t, o: t.pop(U), FIRST, f"every row of {U} exactly once"),
        (lambda t, o: t.pop(MOMENT), SHARDS, f"{MOMENT} as nothing"),
        (lambda t, o: [t.pop(n) for n in list(t) if n.startswith("optimizer.")], SHARDS, "optimizer.exp_avg."),
        (lambda t, o: (t.update(more=torch.zeros(2)), o.update(more={"saved_offsets": [0]})), FIRST, "more"),
        (rows_elsewhere, SHARDS[1:], f"every row of {U} exactly once"),
        (lambda t, o: o[U].update(saved_offsets=[-64, 0]), FIRST, f"every row of {U} exactly once"),
        (lambda t, o: o[U].update(saved_offsets=[0]), FIRST, "tensor file that cannot be read"),
        (lambda t, o: o[U].update(saved_offsets=[0, 0, 0]), FIRST, f"every row of {U} exactly once"),
        (lambda t, o: o[U].update(saved_offsets="ab"), FIRST, "tensor file that cannot be read"),
        (lambda t, o: o.pop(U), FIRST, "tensor file that cannot be read"),
    ],
    ids=[
        "shape", "shape in one", "dimensions", "dtype", "dtype in one", "missing", "missing in one", "moment",
        "all moments", "more", "overlap", "below zero", "short", "long", "text", "unplaced",
    ],
)  # fmt: skip
def test_forged_tensors(
    run: Path,
    newest: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Tensors, Offsets], object],
    shards: tuple[str, ...],
    says: str,
) -> None:
    """torch itself would leave what it does not find as it was, and read what it finds twice."""
    forge(newest, change, shards)
    refused(run, says, caplog)


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_left_out(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    (newest / name).unlink()
    reseal(newest)
    refused(run, "exactly once" if name == SHARDS[0] else "step-00000016", caplog)


def test_a_shard_twice(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(newest / SHARDS[0], newest / SHARDS[0].replace("shard-00001", "shard-00003"))
    reseal(newest)
    refused(run, "exactly once", caplog)


def test_a_tokenizer_of_another_run(run: Path, newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It reads, but its ids may mean other words."""
    with (newest / "tokenizer.model").open("ab") as file:
        file.write(b"\x9a\x06\x01x")  # a field that SentencePiece does not know and passes over
    Tokenizer.load(newest / "tokenizer.model")
    reseal(newest)
    refused(run, "tokenizer.model is not the tokenizer that state.json names", caplog)


# The state.

OPEN: tuple[tuple[Any, ...], ...] = (
    ("layout",), ("versions",), ("ranks", "explained"), ("ranks", "found"), ("ranks", "null", "ranks"),
    *(("ranks", "stable_ranks", name) for name in ("start", "last", "settled")), ("health", "losses"), ("callbacks",),
)  # fmt: skip
"""Places in the state of dicts and lists that may hold any number of things."""


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a state; of what there may be any number, the first."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys[:1] if path in OPEN else keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def wrong(value: Any, path: tuple[Any, ...]) -> list[Any]:
    """Values that are not of the kind of ``value``."""
    others: list[Any] = ["x", 1, 0.5, -1, True, None, [], {}, [[]], {"x": 1}]
    if isinstance(value, bool):
        return [other for other in others if not isinstance(other, bool)]
    if isinstance(value, int):
        known = [other for other in others if other is not None or path != ("flops",)]  # null: they were not counted
        return [other for other in known if type(other) is not int or other < 0]
    if isinstance(value, float):
        allowed: tuple[type, ...] = (int, float, type(None)) if path == ("train_loss",) else (int, float)
        return [other for other in others if type(other) not in allowed]
    return [other for other in others if type(other) is not type(value) or (not other and path not in OPEN)]


EARLIER = (("ranks", "found"), ("ranks", "stable_ranks"), ("flops",), ("callbacks",))
"""What checkpoints of earlier versions lack."""


def forgeries(state: dict[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    """What is wrong with a state, and the function that makes it so."""
    for path in places(state):
        value, name = at(state, path), ".".join(map(str, path))
        for other in wrong(value, path):
            yield f"{name} {other!r}", lambda s, p=path, o=other: at(s, p[:-1]).__setitem__(p[-1], o)
        later = path[0] == "layout" and path[-1] in ("depth", "fixed_outer")
        if path[:-1] not in OPEN and path not in EARLIER and not later:
            yield f"{name} missing", lambda s, p=path: at(s, p[:-1]).pop(p[-1])
        if isinstance(value, dict) and path not in OPEN:
            yield f"{name} with more", lambda s, p=path: at(s, p).update(more=1)
    yield "more", lambda s: s.update(more=1)
    yield "a loss that is none", lambda s: s["health"]["losses"].append(float("nan"))
    yield "a null rank too long", lambda s: s["ranks"]["null"]["ranks"].append([1, 2, 3, 4])


def test_a_state_of_wrong_values(run: Path, newest: Path) -> None:
    """Every key missing, every value of every wrong type; not one may come to light later, as a traceback or never."""
    good = (newest / "state.json").read_text()
    accepted, trials = [], 0
    for what, change in forgeries(json.loads(good)):
        (newest / "state.json").write_text(good)
        rewrite_state(newest, change)
        try:
            find_checkpoint(run, NEW)
            accepted.append(what)
        except UserError as error:
            accepted += [] if "state.json is damaged" in str(error) else [f"{what}: {error}"]
        trials += 1
    assert accepted == []
    assert trials > 300
    (newest / "state.json").write_text(good)
    reseal(newest)
    assert find_checkpoint(run).state.step == NEW  # what was refused was not refused for something else


@pytest.mark.parametrize("content", ["", "[]", "1", "null", "{", "[" * 100_000, '{"a": ' * 100_000, "\ud800"])
def test_a_state_that_is_none(run: Path, newest: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    (newest / "state.json").write_bytes(content.encode(errors="surrogatepass"))
    reseal(newest)
    refused(run, "state.json is damaged", caplog)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(layout={}), "holds blocks.0.attention.k.U as float32"),
        (lambda s: s["layout"].pop(LAYER), f"holds {U} as float32 [128, "),
        (lambda s: s["layout"][LAYER].update(modes=32), f"holds {U} as float32 [128, "),
        (lambda s: s["layout"][LAYER].update(base=True), f"holds {LAYER}.base as nothing"),
        (lambda s: s["layout"][LAYER].update(rank=32), "state.json has rank 32 and "),
        (lambda s: s["layout"][LAYER].update(rank=10**30, modes=10**30), f"in {LAYER}"),
        (lambda s: s["layout"].update({"blocks.9.x": s["layout"][LAYER]}), "blocks.9.x, which is not a linear layer"),
        (lambda s: s["layout"].update(head=s["layout"][LAYER], tok_embed=s["layout"][LAYER]), "tok_embed, which"),
        (lambda s: s.update(step=15), "is of step 15"),
        (lambda s: s.update(optimizer_steps=0), "holds optimizer.exp_avg."),
        (lambda s: s.update(vocab_size=300), "is not the tokenizer"),
        (lambda s: s.update(tokenizer="0" * 64), "is not the tokenizer"),
    ],
)
def test_a_state_that_does_not_fit(
    run: Path,
    newest: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Any]], object],
    says: str,
) -> None:
    """Types are right, but no such model was ever trained."""
    rewrite_state(newest, change)
    refused(run, says, caplog)


# inrank verify.


def verify(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Status, the table's lines by their first word, and the error."""
    capsys.readouterr()
    status = main(["verify", "--run", str(run)])
    out, err = capsys.readouterr()
    return status, {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()}, err


def test_verify_a_good_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    status, lines, err = verify(run, capsys)
    assert (status, err) == (0, "")
    assert lines.keys() == {"step", "step-00000008", "step-00000016"}
    assert lines["step-00000008"] == "complete yes no 7 0.4 MB"
    assert lines["step-00000016"] == "complete yes no 7 0.2 MB"
    assert snapshot(run) == before


def test_verify_tells_what_is_wrong(
    run: Path, newest: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (24, 32, 40):
        shutil.copytree(newest, folder_of(run, step))
        rewrite_state(folder_of(run, step), lambda state, step=step: state.update(step=step))
    shutil.copytree(newest, run / "checkpoints" / "tmp-step-00000048")
    flip(newest / SHARDS[1], 5000)
    (folder_of(run, 24) / "complete").unlink()
    rewrite_state(folder_of(run, 32), lambda state: state["ranks"].update(quiet=-1))
    manifest = json.loads((folder_of(run, 40) / "manifest.json").read_text())
    write_manifest(folder_of(run, 40), json.dumps(manifest | {"ephemeral": True}))
    before = snapshot(run)
    status, lines, err = verify(run, capsys)
    assert status == 2
    assert lines["step-00000008"].startswith("complete yes no 7")
    assert lines["step-00000016"].startswith("damaged no no 7")
    assert f"{SHARDS[1]} is damaged: its sha256" in lines["step-00000016"]
    assert lines["step-00000024"].startswith("incomplete no - 6")
    assert "no complete" in lines["step-00000024"]
    assert lines["step-00000032"].startswith("complete no no 7")
    assert "state.json is damaged (ranks.quiet is -1)" in lines["step-00000032"]
    assert lines["step-00000040"] == "complete yes yes 7 0.2 MB"
    assert lines["tmp-step-00000048"].startswith("incomplete no - 7")
    assert "ignored" in lines["tmp-step-00000048"]
    (line,) = err.splitlines()
    assert line.startswith(f"error: 3 of 5 checkpoints of {run} cannot be resumed from: ")
    assert "step-00000016, step-00000024, step-00000032; restore" in line
    assert snapshot(run) == before


def test_verify_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, says in ((tmp_path / "none", "is not a run folder"), (tmp_path, "holds no checkpoint; train it first")):
        status, lines, err = verify(run, capsys)
        assert (status, lines) == (2, {})
        assert err.startswith(f"error: {run} {says}")
    begin(folder_of(tmp_path, 1))
    status, lines, err = verify(tmp_path, capsys)
    assert status == 2 and "holds no checkpoint" in err
    assert lines.keys() == {"step", "tmp-step-00000001"}

"""Does a change keep every result bit for bit?

    python tests/identity.py [COMMIT]

trains the same small runs, at least one on each engine, from COMMIT (default: HEAD) and from the working tree, and
compares the SHA-256 of losses, gradient norms, ranks and checkpoint tensors. Exit status 1 where one differs. Takes
about five minutes on two cores. Run it before a commit that is not meant to change a result. Words after COMMIT choose
among the runs by name.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMON = {
    "model.num_layers": 3,
    "model.num_heads": 2,
    "model.hidden_size": 48,
    "model.max_seq_len": 32,
    "tokenizer.vocab_size": 512,
    "train.steps": 24,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "checkpoint.interval": 12,
    "checkpoint.keep": 9,
    "eval.interval": 12,
    "eval.batches": 2,
    "log.interval": 1,
    "lowrank.initial_rank": 2,
    "lowrank.buffer": 4,
    "lowrank.interval": 4,
    "lowrank.warmup_steps": 12,
    "lowrank.targets": "[all]",
    "lowrank.threshold": 0.8,
}
LLAMA = {"model.name": "llama", "model.num_kv_heads": 1}
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "local, gradient directions": (1, {"lowrank.growth_init": "gradient"}),
    "local, update without a base": (1, {"lowrank.base": "none", **LLAMA}),
    "local, dense start": (1, {"lowrank.base": "none", "lowrank.dense_fraction": 0.3, "optimizer.name": "lora_muon"}),
    "local, published": (
        1,
        {"lowrank.base": "none", "lowrank.measure": "product", "lowrank.growth_init": "published"},
    ),
    "ddp": (2, {"parallel.engine": "ddp", "lowrank.final": "budget", "model.dropout": 0.1}),
    "ddp, muon": (2, {"parallel.engine": "ddp", "lowrank.mode": "full", "optimizer.name": "muon"}),
    "fsdp": (2, {"parallel.engine": "fsdp", "optimizer.name": "lora_muon", "model.layer_crossing": True}),
    "fsdp, bf16": (2, {"parallel.engine": "fsdp", "train.precision": "bf16", **LLAMA}),
    "fsdp, hybrid": (4, {"parallel.engine": "fsdp", "parallel.shard_size": 2, "optimizer.name": "spectron"}),
    "fsdp, dense start": (2, {"parallel.engine": "fsdp", "lowrank.base": "none", "lowrank.dense_fraction": 0.3}),
    "zero1": (2, {"parallel.engine": "zero1"}),
    "zero3": (2, {"parallel.engine": "zero3", "lowrank.frobenius_decay": 0.1, **LLAMA}),
}


def digest(tree: Path, name: str, folder: Path) -> str:
    """Train one run from a tree; the hash of its results."""
    processes, settings = RUNS[name]
    run = folder / name.replace(", ", "-").replace(" ", "-")
    words = [f"--{key}={value}" for key, value in {**COMMON, **settings}.items()]
    words += [f"--run.dir={run}", f"--data.cache_dir={folder.parent / 'cache'}", "--data.source=files"]
    words += [f"--data.paths=[{folder.parent / 'corpus' / '*.txt'}]"]
    train = ["train", "--config", str(tree / "configs" / "quickstart.yaml"), *_quick(), *words]
    command = [sys.executable, "-m", "inrank_dist", *train]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launch, "-m", "inrank_dist", *train]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{name} failed in {tree}:\n{done.stderr[-3000:]}")
    return result_hash(run)


def _quick() -> list[str]:
    """What the quickstart's settings must not bring in."""
    return [
        "--model.intermediate_size=null",
        "--model.layer_crossing=false",
        "--optimizer.name=adamw",
        "--lowrank.final=per_layer",
        "--lowrank.freeze_step=null",
        "--lowrank.mode=efficient",
        "--eval.sample_tokens=0",
    ]


def result_hash(run: Path) -> str:
    """SHA-256 of what a run computed: its metrics without times, and the tensors of its checkpoints."""
    total = hashlib.sha256()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {key: record.get(key) for key in ("kind", "step", "loss", "grad_norm", "parameters", "action", "layers")}
        total.update(json.dumps(kept, sort_keys=True).encode())
    for file in sorted((run / "checkpoints").rglob("*.safetensors")):
        total.update(str(file.relative_to(run)).encode() + file.read_bytes())
    return total.hexdigest()


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    chosen = [name for name in RUNS if all(word in name for word in sys.argv[2:])]
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for file in (ROOT / "tests").glob("test_*.py"):
            (corpus / f"{file.stem}.txt").write_bytes(file.read_bytes())
        before = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", before, commit], cwd=ROOT, check=True, capture_output=True
        )
        try:
            for name in chosen:
                hashes = [digest(tree, name, Path(folder) / side) for tree, side in ((before, "a"), (ROOT, "b"))]
                same = hashes[0] == hashes[1]
                differing += [] if same else [name]
                print(f"{'same' if same else 'DIFFERS':8s} {hashes[0][:16]} {hashes[1][:16]}  {name}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True, capture_output=True)
    if differing:
        raise SystemExit(f"{len(differing)} of {len(chosen)} differ: {'; '.join(differing)}")


if __name__ == "__main__":
    main()

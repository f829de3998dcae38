"""Plants faults in a copy of the project, one at a time, and shows that a test of the CI tier catches each.

python tests/mutation.py            all of them, one line each; exit status 1 if one survives
python tests/mutation.py NAME ...   those whose name has one of the words

For each fault only the tests run that are named with it. They run first on the copy as it is, where they must pass.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEP = "tests/test_reference_step.py::test_every_step_is_the_textbooks"
ENGINES = "tests/test_engines.py::test_every_engine_gives_the_same_run"
FLUSHED = "tests/test_flushed.py::test_a_checkpoint_is_on_the_disk_before_it_has_its_name"


@dataclass(frozen=True)
class Fault:
    """In ``file`` below ``inrank_dist/``, ``old`` becomes ``new``; ``tests`` must catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    Fault(
        "weight decay on embeddings",
        "optim/groups.py",
        "        and id(parameter) not in embeddings\n",
        "",
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "a moment moved with the wrong map",
        "lowrank/event.py",
        'return self.M if factor == "U" else self.N',
        'return self.N if factor == "U" else self.M',
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "a second moment not mapped",
        "optim/moments.py",
        "map_second_moment(event, first, second, factor, step=step, betas=betas)",
        "torch.nn.functional.pad(second, (0, event.modes))[:, : event.modes].contiguous()",
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "cores mapped in the wrong order",
        "lowrank/cores.py",
        "left, right = maps.left[index].to(moment.device), maps.right[index - 1].to(moment.device)",
        "left, right = maps.left[index - 1].to(moment.device), maps.right[index].to(moment.device)",
        ("tests/test_lowrank_deep.py",),
    ),
    Fault(
        "the rows of a core by the old division",
        "engine/reshapable.py",
        "rows(event.modes))",
        "rows(tensors[name].shape[1]))",
        ("tests/test_deep.py",),
    ),
    Fault(
        "a collective without its group",
        "engine/placement.py",
        "dist.all_reduce(tensor, group=self.group)",
        "dist.all_reduce(tensor)",
        (f"{ENGINES}[fsdp-4-2-1]",),
    ),
    Fault(
        "a row counted twice",
        "engine/placement.py",
        "return RowPlacement(replica=rank, replicas=world_size)",
        "return RowPlacement()",
        (f"{ENGINES}[ddp-2-None-2]",),
    ),
    Fault(
        "a shard not flushed", "train/checkpoint/shard.py", "os.fsync(file.fileno())", "pass", (f"{FLUSHED}[False]",)
    ),
    Fault(
        "the manifest not flushed",
        "train/checkpoint/folder.py",
        "            os.fsync(file.fileno())\n",
        "",
        (f"{FLUSHED}[False]",),
    ),
    Fault(
        "a folder's names not flushed",
        "runtime/files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        (f"{FLUSHED}[False]", "tests/test_flushed.py::test_prepared_data_is_on_the_disk_before_it_has_its_name"),
    ),
    Fault(
        "a wrong null",
        "lowrank/null.py",
        'generator_for(self.seed, "null", *shape, self.checks)',
        'generator_for(self.seed, "null", *shape)',
        ("tests/test_lowrank_null.py",),
    ),
    Fault(
        "a parameter that the optimizer does not have",
        "optim/groups.py",
        "decays = [parameters[name] for name in names if name in decayed]",
        "decays = [parameters[name] for name in names if name in decayed][:-1]",
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "stale parameters: the optimizer holds those of before the rank event",
        "engine/reshapable.py",
        "self.optimizer = self._make_optimizer(module)",
        "self.optimizer = getattr(self, 'stale', None) or self._make_optimizer(module); self.stale = self.optimizer",
        ("tests/test_engines.py::test_every_parameter_moves_after_every_event[fsdp-3]",),
    ),
    Fault(
        "Grams of sharded factors not summed",
        "optim/matrices.py",
        "gram_matrices(rows, self.rows.sum)",
        "gram_matrices(rows, lambda tensor: None)",
        (f"{STEP}[lora_muon-fsdp-3]",),
    ),
    Fault(
        "a matrix made orthogonal from the rows of one process",
        "optim/matrices.py",
        "        if group is None:\n            return",
        "        if True:\n            return",
        (f"{STEP}[muon-fsdp-3]",),
    ),
    Fault(
        "the product of two factors decays twice",
        "optim/matrices.py",
        'shrink = math.sqrt(1 - lr * group["weight_decay"])',
        'shrink = 1 - lr * group["weight_decay"]',
        (f"{STEP}[spectron-local-1]",),
    ),
    Fault(
        "the schedule a step ahead",
        "train/loop.py",
        'planned_rate(self.config, "lr", self.step, ',
        'planned_rate(self.config, "lr", self.step + 1, ',
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "the base fades a step early",
        "method/policy.py",
        "1.0 - step / self.decay_steps",
        "1.0 - (step + 1) / self.decay_steps",
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "a gradient summed over processes, not averaged",
        "engine/engine.py",
        "self._backward(loss * (self.context.world_size / tokens))",
        "self._backward(loss / tokens)",
        (f"{STEP}[gpt2-ddp-2]",),
    ),
    Fault(
        "no clipping",
        "engine/engine.py",
        "(clip / (norm + 1e-6)).clamp(max=1.0) if clip > 0 else None",
        "None",
        (f"{STEP}[gpt2-local-1]",),
    ),
    Fault(
        "a seal not checked",
        "train/checkpoint/folder.py",
        'if marker != f"{hashlib.sha256(content).hexdigest()}\\n".encode():',
        "if False:",
        ("tests/test_checkpoint_damage.py::test_no_damage_is_loaded_silently",),
    ),
    Fault(
        "a sample order that depends on the number of processes",
        "data/loader.py",
        "SampleOrder(sizes, shares, seed)",
        "SampleOrder(sizes, shares, seed + world_size - 1)",
        (f"{ENGINES}[ddp-2-None-2]",),
    ),
    Fault(
        "random numbers that do not depend on the step",
        "train/randomness.py",
        'seed_for(seed, "step", step, process_rank)',
        'seed_for(seed, "step", process_rank)',
        ("tests/test_randomness.py", "tests/test_checkpoint.py::test_resume_is_bit_identical"),
    ),
    Fault(
        "ranks that differ between processes pass",
        "runtime/agreement.py",
        "if extremes[0] == -extremes[1]:",
        "if True:",
        ("tests/test_engines.py::test_processes_that_see_different_spectra_stop[ddp]",),
    ),
    Fault(
        "moments of a factor that was dense from the rows of one process",
        "optim/moments.py",
        "sum_over_processes(sums, all_reduce)",
        "sums",
        (f"{STEP}[dense first, fixed, lora_muon-fsdp-3]",),
    ),
    Fault(
        "retention that removes the newest",
        "train/checkpoint/folder.py",
        "for folder in reversed(named_folders(run_folder)) if",
        "for folder in named_folders(run_folder) if",
        ("tests/test_checkpoint_retention.py",),
    ),
]


def run(copy: Path, tests: tuple[str, ...]) -> "subprocess.CompletedProcess[str]":
    """The tests on the copy, in a process of their own."""
    environment = os.environ | {"PYTHONPATH": f"{copy}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not nightly", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)


def caught_by(output: str) -> str:
    """The first test that failed."""
    failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR "))]
    return failed[0].removeprefix("tests/") if failed else "?"


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="inrank-mutation-") as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        clean = run(copy, tuple(dict.fromkeys(test for fault in chosen for test in fault.tests)))
        if clean.returncode:
            print(f"the tests fail without a fault:\n{clean.stdout[-3000:]}{clean.stderr[-1000:]}")
            return 2
        for fault in chosen:
            file, began = copy / "inrank_dist" / fault.file, time.monotonic()
            text = file.read_text()
            if text.count(fault.old) != 1:
                print(
                    f"OUTDATED  {fault.name}: {fault.file} has {text.count(fault.old)} times {fault.old!r}", flush=True
                )
                survived += 1
                continue
            file.write_text(text.replace(fault.old, fault.new))
            done = run(copy, fault.tests)
            file.write_text(text)
            caught = done.returncode == 1
            survived += not caught
            what = f"caught by {caught_by(done.stdout)}" if caught else f"SURVIVED {fault.tests}"
            print(f"{fault.name}: {what} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Faults as a tool: kill, stop, raise, corrupt, hang or signal a process at a chosen step and phase of a real run.

``launch`` runs the command line in real processes and may arm one fault; ``python -m faults '{...}' train ...`` does
the same below a launcher such as torchrun. A fault goes off once, also when the job is restarted: it leaves a file.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ACTIONS = ("kill", "stop", "raise", "corrupt", "hang", "signal", "pause")

PHASES = (
    "forward",
    "backward",
    "optimizer",
    "decision",
    "reshape",
    "save-data",
    "save-commit",
    "retention",
    "evaluation",
    "prepare",
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when.

    Attributes:
        action: ``kill`` SIGKILL, ``stop`` SIGSTOP, ``raise`` an exception, ``corrupt`` the data of the phase (NaN in
            the loss or the gradient, another Gram, a flipped byte in a file), ``hang`` for ever, ``signal`` SIGTERM,
            ``pause`` until the test has done something to the surroundings and makes the file ``fired`` + ``.go``.
        process: the rank that it befalls.
        step: steps completed when it goes off; None: whatever step.
        phase: one of ``PHASES``.
        fired: file that says that it went off.
        delay: a kill comes so many seconds later, in the midst of what the phase does.
    """

    action: str
    process: int
    step: int | None
    phase: str
    fired: str
    delay: float = 0.0

    def __post_init__(self) -> None:
        assert self.action in ACTIONS and self.phase in PHASES

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Injected(RuntimeError):
    """The error that a ``raise`` fault raises."""


def arm(fault: Fault) -> None:
    """Put the fault into this process's code, if it is the one."""
    if int(os.environ.get("RANK", "0")) != fault.process:
        return
    import torch

    from inrank_dist.engine import engine, sharded
    from inrank_dist.method import controller
    from inrank_dist.train.checkpoint import folder, shard
    from inrank_dist.train.loop import Trainer

    trainers: list[Trainer] = []
    start = Trainer.__init__

    def remembered(self: Trainer, *arguments: Any, **options: Any) -> None:
        trainers.append(self)
        start(self, *arguments, **options)

    Trainer.__init__ = remembered  # type: ignore[method-assign]

    def fires() -> bool:
        if Path(fault.fired).exists() or (fault.step is not None and not trainers):
            return False
        # A save behind the training may come when the training is steps ahead.
        behind = fault.phase in ("save-data", "save-commit", "retention")
        if fault.step is not None and (trainers[0].step < fault.step if behind else trainers[0].step != fault.step):
            return False
        Path(fault.fired).touch()
        return True

    def strike() -> None:
        if fault.action == "kill" and fault.delay:
            threading.Timer(fault.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.action == "raise":
            raise Injected(f"injected at step {fault.step} in {fault.phase}")
        elif fault.action == "hang":
            time.sleep(10_000)
        elif fault.action == "pause":
            while not Path(fault.fired + ".go").exists():
                time.sleep(0.01)

    def around(owner: Any, name: str, corrupt: Callable[..., Any] | None = None, when: Any = None) -> None:
        """Strike before ``owner.name`` is called; a corruption is done to what it returns."""
        original = getattr(owner, name)

        def replaced(*arguments: Any, **options: Any) -> Any:
            goes_off = (when is None or when(*arguments)) and fires()
            if goes_off:
                strike()
            result = original(*arguments, **options)
            return corrupt(result, *arguments) if goes_off and fault.action == "corrupt" and corrupt else result

        setattr(owner, name, replaced)

    def flip(result: Any, *arguments: Any) -> Any:
        """Flip a byte of the tensor file that was written."""
        path = arguments[0] / next(iter(result))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return result

    training = lambda held, *_: held.module.training  # noqa: E731
    if fault.phase == "forward":
        around(engine.Engine, "loss", lambda loss, *_: loss * float("nan"), training)
    elif fault.phase == "backward":
        original_loss = engine.Engine.loss

        def hooked(held: Any, *arguments: Any) -> torch.Tensor:
            loss = original_loss(held, *arguments)
            if loss.requires_grad and fires():

                def hook(gradient: torch.Tensor) -> torch.Tensor:
                    strike()
                    return gradient * float("nan") if fault.action == "corrupt" else gradient

                loss.register_hook(hook)
            return loss

        engine.Engine.loss = hooked  # type: ignore[method-assign]
    elif fault.phase == "optimizer":
        gradient_norm = engine.Engine.gradient_norm

        def poisoned(held: Any) -> Any:
            if fires():
                strike()
                if fault.action == "corrupt":
                    next(rows for rows in held._gradients() if rows.numel()).fill_(float("nan"))
            return gradient_norm(held)

        engine.Engine.gradient_norm = poisoned  # type: ignore[method-assign]
    elif fault.phase == "decision":

        def tilt(result: Any, *_: Any) -> Any:
            result.checksums[next(iter(result.checksums))] += 1
            return result

        around(controller, "measure_spectra", tilt)
    elif fault.phase == "reshape":
        around(sharded, "map_factors")
    elif fault.phase == "save-data":
        around(shard, "write_shard", flip)
    elif fault.phase == "save-commit":
        around(Path, "rename", when=lambda path, *_: path.name.startswith("tmp-step-"))
    elif fault.phase == "retention":
        around(folder.shutil, "rmtree", when=lambda path, *_, **__: path.name.startswith("tmp-removed-"))
    elif fault.phase == "evaluation":
        around(engine.Engine, "loss", lambda loss, *_: loss * float("nan"), lambda held, *_: not held.module.training)
    elif fault.phase == "prepare":
        around(sys.modules["inrank_dist.data.preparation"], "make_once")


def record_samples(file: Path) -> None:
    """Write down the samples of every step: step, then their numbers."""
    from inrank_dist.data import Prefetcher

    next_batch = Prefetcher.next_batch

    def recorded(self: Prefetcher) -> Any:
        state = self.state()
        batches = next_batch(self)
        with file.open("a") as lines:
            place = f"{state.epoch}:{state.sample_index}"
            lines.write(json.dumps([place, [i for batch in batches for i in batch.sample_ids]]) + "\n")
        return batches

    Prefetcher.next_batch = recorded  # type: ignore[method-assign]


def main(words: list[str]) -> int:
    """``FAULT.json-text COMMAND ...``: the command line with a fault in it."""
    from inrank_dist.commands.main import main as command_line

    arm(Fault(**json.loads(words[0])))
    return command_line(words[1:])

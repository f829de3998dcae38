"""Faults as a tool: kill, stop, raise, corrupt, hang or signal a process at a chosen step and phase of a real run.

``launch`` runs the command line in real processes and may arm one fault; ``python -m faults '{...}' train ...`` does
the same below a launcher such as torchrun. A fault goes off once, also when the job is restarted: it leaves a file.
"""

import functools
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
    """Put the fault into this process, if it is the one."""
    if int(os.environ.get("RANK", "0")) != fault.process:
        return
    from inrank_dist.commands import train
    from inrank_dist.train import build

    injected = injector(fault)
    train.build = functools.partial(build, callbacks=[injected])  # type: ignore[assignment]
    if fault.phase == "prepare":  # before there is a run
        injected.around(sys.modules["inrank_dist.data.source_folder"], "make_once")


def injector(fault: Fault) -> Any:
    """A callback that puts the fault into the parts of a run when it starts."""
    import torch

    from inrank_dist.engine import reshapable
    from inrank_dist.method import controller
    from inrank_dist.train import Callback
    from inrank_dist.train.checkpoint import folder, shard

    class Injector(Callback):
        trainer: Any = None

        def on_start(self, trainer: Any) -> None:
            self.trainer, engine = trainer, trainer.engine
            nan = lambda loss, *_: loss * float("nan")  # noqa: E731
            if fault.phase == "forward":
                self.around(engine, "loss", nan, lambda *_: engine.module.training)
            elif fault.phase == "evaluation":
                self.around(engine, "loss", nan, lambda *_: not engine.module.training)
            elif fault.phase == "backward":
                engine.loss = self.hooked(engine.loss)
            elif fault.phase == "optimizer":
                self.around(engine, "gradient_norm", before=lambda: self.poison(engine))
            elif fault.phase == "decision":
                self.around(controller, "measure_spectra", self.tilt)
            elif fault.phase == "reshape":
                self.around(reshapable, "map_factors")
            elif fault.phase == "save-data":
                self.around(shard, "write_shard", self.flip)
            elif fault.phase == "save-commit":
                self.around(Path, "rename", when=lambda path, *_: path.name.startswith("tmp-step-"))
            elif fault.phase == "retention":
                removed = lambda path, *_, **__: path.name.startswith("tmp-removed-")  # noqa: E731
                self.around(folder.shutil, "rmtree", when=removed)

        def fires(self) -> bool:
            if Path(fault.fired).exists() or (fault.step is not None and self.trainer is None):
                return False
            # A save behind the training may come when the training is steps ahead.
            behind = fault.phase in ("save-data", "save-commit", "retention")
            if fault.step is not None:
                step = self.trainer.step
                if step < fault.step if behind else step != fault.step:
                    return False
            Path(fault.fired).touch()
            return True

        def around(
            self,
            owner: Any,
            name: str,
            corrupt: Callable[..., Any] | None = None,
            when: Any = None,
            before: Callable[[], None] = lambda: None,
        ) -> None:
            """Strike before ``owner.name`` is called. A corruption is done to what it returns, or beforehand."""
            original = getattr(owner, name)

            def replaced(*arguments: Any, **options: Any) -> Any:
                goes_off = (when is None or when(*arguments)) and self.fires()
                if goes_off:
                    strike(fault)
                    if fault.action == "corrupt":
                        before()
                result = original(*arguments, **options)
                return corrupt(result, *arguments) if goes_off and fault.action == "corrupt" and corrupt else result

            setattr(owner, name, replaced)

        def hooked(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            """Strike when the gradient of the loss arrives."""

            def replaced(*arguments: Any) -> torch.Tensor:
                loss = original(*arguments)
                if loss.requires_grad and self.fires():

                    def hook(gradient: torch.Tensor) -> torch.Tensor:
                        strike(fault)
                        return gradient * float("nan") if fault.action == "corrupt" else gradient

                    loss.register_hook(hook)
                return loss

            return replaced

        @staticmethod
        def poison(engine: Any) -> None:
            next(rows for rows in engine._gradients() if rows.numel()).fill_(float("nan"))

        @staticmethod
        def tilt(result: Any, *_: Any) -> Any:
            result.checksums[next(iter(result.checksums))] += 1
            return result

        @staticmethod
        def flip(result: Any, *arguments: Any) -> Any:
            """Flip a byte of the tensor file that was written."""
            path = arguments[0] / next(iter(result))
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            return result

    return Injector()


def strike(fault: Fault) -> None:
    """Do to this process what the fault does, but for a corruption."""
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

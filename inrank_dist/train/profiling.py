"""``train.profile``: a trace of chosen steps, and what the memory was taken up by."""

import gzip
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch.profiler import profile

from ..engine.cost import Held
from ..runtime.context import Context
from .memory import cuda_peak, peak_in, profiled

log = logging.getLogger("inrank_dist")

Result = TypeVar("Result")


class Profile(NamedTuple):
    """A trace, and the most bytes that its step held: on CPU beyond those at its start, on a GPU in all."""

    trace: Path
    most: int


class StepProfiler:
    """Profiles the optimizer steps that it was told to.

    Args:
        steps: their numbers, from 1 on.
        folder: where traces go, ``step-00000020-process-0.json.gz``; readable by Perfetto and chrome://tracing.
        context: who this process is.
    """

    def __init__(self, steps: Collection[int], folder: Path, context: Context) -> None:
        self.steps, self.folder, self.context = frozenset(steps), folder, context

    def run(self, step: int, work: Callable[[], Result]) -> tuple[Result, Callable[[], Profile | None] | None]:
        """Do a step.

        Returns:
            What ``work`` returned; where it was profiled, what writes the trace, which takes longer than the step. It
            gives None where that failed, and says so: the training goes on.
        """
        if step not in self.steps:
            return work(), None
        device = self.context.device
        if device.type == "cuda":
            with cuda_peak(device) as peak:
                result, profiler = profiled(work, device)
            most = peak()
        else:
            result, profiler = profiled(work, device)
            most = None
        return result, lambda: self._write(step, profiler, most)

    def _write(self, step: int, profiler: profile, most: int | None) -> Profile | None:
        trace = self.folder / f"step-{step:08d}-process-{self.context.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                raw, packed = Path(place) / "trace.json", Path(place) / trace.name
                profiler.export_chrome_trace(str(raw))
                most = peak_in(raw) if most is None else most
                with raw.open("rb") as whole, gzip.open(packed, "wb", compresslevel=3) as file:
                    shutil.copyfileobj(whole, file)
                packed.replace(trace)
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("warning: step %d was profiled but %s could not be written (%s)", step, trace, error)
            return None
        return Profile(trace, most)


def memory_split(held: Held, most: int, *, on_gpu: bool) -> dict[str, Any]:
    """Bytes of this process at its peak in a step: parameters, gradients, moments, and the rest, which is activations,
    what was gathered, and workspaces.

    Args:
        held: by the formulas, which the tests hold against what is allocated.
        most: ``Profile.most``.
    """
    peak = most + held.host if on_gpu else most + held.parameters + held.moments
    rest = max(peak - held.total, 0)
    split = {"parameters": held.parameters, "gradients": held.gradients, "moments": held.moments, "activations": rest}
    return {"peak": peak, **split}

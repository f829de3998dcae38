"""Profiling of selected steps (``train.profile``)."""

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
    """Profile of a step.

    Attributes:
        trace: path of the trace.
        most: peak of allocated bytes. On CPU, memory allocated before the step is not included.
    """

    trace: Path
    most: int


class StepProfiler:
    """Profiler of selected optimizer steps.

    Args:
        steps: numbers of the steps to profile, starting at 1.
        folder: folder for traces, such as ``step-00000020-process-0.json.gz``, which Perfetto and chrome://tracing can
            display.
        context: context of this process.
    """

    def __init__(self, steps: Collection[int], folder: Path, context: Context) -> None:
        self.steps, self.folder, self.context = frozenset(steps), folder, context

    def run(self, step: int, work: Callable[[], Result]) -> tuple[Result, Callable[[], Profile | None] | None]:
        """Run a step, under the profiler if it is selected.

        Args:
            step: number of the step, starting at 1.
            work: function that runs the step.

        Returns:
            The result of ``work``, and a function that writes the trace, or None if the step was not profiled. Writing
            takes longer than the step. If it fails, the function logs a warning and returns None.
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
    """Return the peak memory of this process in a step, by kind, in bytes.

    ``activations`` is the remainder: activations, gathered parameters and workspaces.

    Args:
        held: bytes of parameters, gradients and moments according to ``engine.cost``.
        most: peak of allocated bytes, from ``Profile.most``.
        on_gpu: whether the step ran on a GPU.
    """
    peak = most + held.host if on_gpu else most + held.parameters + held.moments
    rest = max(peak - held.total, 0)
    split = {"parameters": held.parameters, "gradients": held.gradients, "moments": held.moments, "activations": rest}
    return {"peak": peak, **split}

"""Output of ``inrank bench decision``."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from ..runtime.context import Context
from ..runtime.words import plural
from .common import MIB, machine_info, spread
from .decision import Result, Workload

COLUMNS = (
    "shape", "layers", "out x in", "R", "ours\nms/layer", "dense\nms/layer", "ours\ns/model", "dense\ns/model",
    "ours\n/ dense", "ours MiB\nlayer / model", "dense\nMiB", "ranks\nfound", "ranks equal",
)  # fmt: skip


def as_table(results: Sequence[Result]) -> Table:
    """One row per shape: median (lowest-highest) over the rounds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for result in results:
        layers, measured = len(result.ours), len(result.dense)
        narrow, mark = result.shape.hidden, "~" if result.extrapolated else ""
        table.add_row(
            result.shape.name,
            str(layers),
            f"{4 * narrow} x {narrow}",
            str(result.modes),
            spread([1e3 * seconds / layers for seconds in result.ours_seconds]),
            spread([1e3 * seconds / layers for seconds in result.dense_whole]),
            spread(result.ours_seconds),
            mark + spread(result.dense_whole),
            f"1/{1 / result.share:.1f}",
            f"{result.ours_bytes_layer / MIB:.1f} / {result.ours_bytes / MIB:.1f}",
            f"{result.dense_bytes / MIB:.1f}",
            f"{min(result.ours.values())}-{max(result.ours.values())}",
            f"{measured - len(result.different)} of {measured}",
        )
    return table


def notes(results: Sequence[Result], workload: Workload, context: Context) -> Iterator[str]:
    """Lines below the table: what was measured, what is extrapolated, where the ranks differ."""
    machine = machine_info(context)
    yield (
        f"one decision from rank {workload.rank} with buffer {workload.buffer}, published rule; {machine['device']}, "
        f"torch {machine['torch']}, {plural(machine['processes'], 'process')} of "
        f"{plural(machine['threads'], 'thread')}; median (lowest-highest) of {workload.repeats} alternating rounds"
    )
    yield (
        "layers: the two MLP matrices of each block, half of them out x in as shown, half transposed; dense: float32 "
        "in x out product and svdvals, layer by layer, in process 0; MiB: peak beyond the factors"
    )
    for result in results:
        up, down = (
            1e3
            * statistics.median(s for name, each in result.dense_seconds.items() if name.endswith(part) for s in each)
            for part in ("up", "down")
        )
        yield (
            f"{result.shape.name}: dense method {up:.0f} ms for a wide in x out product (mlp.up), "
            f"{down:.0f} ms for a tall one (mlp.down)"
        )
        if result.extrapolated:
            yield (
                f"{result.shape.name}: ~ the dense method was measured on {len(result.dense)} of {len(result.ours)} "
                "layers, and its time for the model is scaled to the number of layers"
            )
        for name, (ours, dense) in result.different.items():
            yield f"{result.shape.name}: ranks differ in {name}: {ours} by Grams, {dense} by the float32 SVD"


def as_record(results: Sequence[Result], workload: Workload, context: Context) -> dict[str, Any]:
    """JSON-serializable record of all measurements, round by round; seconds and bytes."""
    return {
        **machine_info(context),
        "rank": workload.rank,
        "buffer": workload.buffer,
        "repeats": workload.repeats,
        "shapes": [
            {
                "shape": result.shape.name,
                "layers": len(result.ours),
                "hidden": result.shape.hidden,
                "modes": result.modes,
                "ours_seconds": result.ours_seconds,
                "dense_seconds": result.dense_whole,
                "dense_extrapolated": result.extrapolated,
                "dense_layer_seconds": result.dense_seconds,
                "share": result.share,
                "ours_bytes_layer": result.ours_bytes_layer,
                "ours_bytes": result.ours_bytes,
                "dense_bytes": result.dense_bytes,
                "ours_ranks": result.ours,
                "dense_ranks": result.dense,
                "ranks_equal": not result.different,
            }
            for result in results
        ],
    }

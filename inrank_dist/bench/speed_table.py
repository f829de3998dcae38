"""Output of ``inrank bench speed``."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from rich.table import Table

from ..runtime.context import Context
from ..runtime.words import plural
from .common import MIB, machine_info, spread
from .speed import COUNTED_ENGINES, Form, Outcome, Row, break_even_width

HEADINGS = (
    "ms per step", "speed-up", "by\narithmetic", "of it", "tokens/s", "MFU", "MFU\nas dense", "peak\nMiB", "ratio",
)  # fmt: skip


def as_table(outcome: Outcome) -> Table:
    """One row per form: median (lowest-highest) over the rounds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    counted = any(row.sent for row in outcome.rows.values())
    table.add_column("")
    for heading in [*HEADINGS, *([f"{name} sends\nMiB a step" for name in COUNTED_ENGINES] if counted else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    processes = outcome.tokens // (outcome.shape.batch * outcome.shape.seq)
    for form, row in outcome.rows.items():
        full = outcome.reference(form)
        share = outcome.tokens / row.median / (outcome.peak.flops * processes)
        sent = [f"{row.sent[name][0] / MIB:.1f}" if name in row.sent else "-" for name in COUNTED_ENGINES]
        speedup, flops_ratio = outcome.speedup(form), outcome.flops_ratio(form)
        table.add_row(
            form.name,
            spread([1e3 * seconds for seconds in row.seconds]),
            f"{speedup:.2f}",
            f"{flops_ratio:.2f}",
            f"{speedup / flops_ratio:.2f}",
            f"{outcome.tokens / row.median:.0f}",
            f"{share * row.flops:.2f}",
            f"{share * full.flops:.2f}",
            f"{row.peak / MIB:.0f}",
            f"{row.peak / full.peak:.2f}",
            *(sent if counted else []),
        )
    return table


def title(outcome: Outcome) -> str:
    """The line above a table."""
    shape = outcome.shape
    return (
        f"width {shape.hidden}, {shape.layers} layer(s), vocabulary {shape.vocab}, {shape.batch} sequence(s) of "
        f"{shape.seq} tokens a process; targets {shape.targets}, rank {outcome.rank}, rounded {outcome.rounded}"
    )


def verdict(outcome: Outcome) -> str:
    """The break-even rank at this shape."""
    parts = []
    for compiled in (False, True):
        if Form("half", compiled=compiled) in outcome.rows:
            rank = outcome.break_even(compiled=compiled)
            found = "not determined by these times"
            if rank is not None:
                found = f"{rank:.0f}" if rank >= 1 else "none, slower at any"
            parts.append(f"{'compiled' if compiled else 'eager'} {found}")
    return f"break-even rank: {', '.join(parts)}; by arithmetic {outcome.break_even_flops:.0f}" if parts else ""


def conclusion(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The width from which on low rank is faster, for each choice of targets."""
    for targets in dict.fromkeys(outcome.shape.targets for outcome in outcomes):
        widths = {outcome.shape.hidden: outcome for outcome in outcomes if outcome.shape.targets == targets}
        for form in (Form("frozen"), Form("frozen", compiled=True)):
            if len(widths) < 2 or any(form not in outcome.rows for outcome in widths.values()):
                continue
            width_from = break_even_width(widths, form)
            measured = ", ".join(f"{width} ({widths[width].speedup(form):.2f})" for width in sorted(widths))
            where = (
                f"pays here from width {width_from} on"
                if width_from is not None
                else "does not pay here at the largest width"
            )
            yield f"targets {targets}, {form.name}: low rank {where}; widths (speed-up) {measured}"


def notes(outcomes: Sequence[Outcome], context: Context, rounds: int, precision: str) -> Iterator[str]:
    """Lines below the tables: where and how it was measured."""
    machine, first = machine_info(context), outcomes[0]
    yield (
        f"{machine['device']}, torch {machine['torch']}, {plural(machine['processes'], 'process')} of "
        f"{plural(machine['threads'], 'thread')}, engine {first.engine}, {precision}; "
        f"median (lowest-highest) of {rounds} alternating rounds"
    )
    yield (
        "speed-up: full rank in the same form (compiled or not) over this; by arithmetic: the same ratio of "
        f"floating-point operations; MFU: of {first.peak.flops / 1e12:.3g} TFLOP/s ({first.peak.source}), as dense: "
        "with the operations of full rank"
    )
    yield "peak: weights, moments and the peak memory of a step beyond them, of process 0; ratio: to full rank"
    if any(row.sent for outcome in outcomes for row in outcome.rows.values()):
        without = "" if find_spec("deepspeed") else "; zero3 needs the extra deepspeed, which is not installed"
        yield f"sends: bytes of one process per step, counted at the collectives, with ring algorithms{without}"
    else:
        yield "bytes sent by ddp, fsdp and zero3 are counted under torchrun, with several processes"


def as_record(outcomes: Sequence[Outcome], context: Context, rounds: int, precision: str) -> dict[str, Any]:
    """JSON-serializable record of all measurements, round by round; seconds and bytes."""
    return {
        **machine_info(context),
        "rounds": rounds,
        "precision": precision,
        "shapes": [
            {
                **vars(outcome.shape),
                "rank": outcome.rank,
                "rounded_rank": outcome.rounded,
                "engine": outcome.engine,
                "tokens": outcome.tokens,
                "peak_flops": outcome.peak.flops,
                "peak_source": outcome.peak.source,
                "break_even_rank": outcome.break_even(compiled=False),
                "break_even_rank_compiled": outcome.break_even(compiled=True),
                "break_even_rank_by_arithmetic": outcome.break_even_flops,
                "forms": [_row(outcome, form, row) for form, row in outcome.rows.items()],
            }
            for outcome in outcomes
        ],
    }


def _row(outcome: Outcome, form: Form, row: Row) -> Mapping[str, Any]:
    return {
        "form": form.name,
        **vars(form),
        "seconds": row.seconds,
        "speedup": outcome.speedup(form),
        "speedup_by_arithmetic": outcome.flops_ratio(form),
        "flops_per_token": row.flops,
        "parameters_bytes": row.held.parameters,
        "gradients_bytes": row.held.gradients,
        "moments_bytes": row.held.moments,
        "peak_bytes": row.peak,
        "sent_bytes": {name: sent for name, (sent, _) in row.sent.items()},
        "sent_bytes_by_formula": {name: formula for name, (_, formula) in row.sent.items()},
    }

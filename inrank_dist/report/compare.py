"""The page and the tables of several runs beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..runtime.words import plural
from ..train.monitors.text import amount, duration, fixed, operations, size
from .chart import COLOURS, Chart, Charts, Line
from .comparison import Comparison, Group, Member, readable
from .curves import memory_points, scaled
from .history import History, Points
from .plot import smoothed
from .run import write_page
from .style import page, text_table

DASHES = ("", "7 3", "2 3")
"""Dash patterns of the lines: another one after each round of the colours."""

UNFINISHED_DASH = "1 4"

STYLE = """<style>
main { max-width:1400px }
figure, .legend { min-width:0 }
th, td { padding:5px 6px }
@media print {
  .controls { break-after:avoid }
  td, th { white-space:normal; padding:2px 3px }
  td:not(.n), th:not(.n) { overflow-wrap:anywhere }
}
</style>"""
"""Room for the columns of the tables, also on paper, and no heading at the end of a page."""

CURVES: list[tuple[str, str, Callable[[History], Points], bool]] = [
    ("Validation loss", "nats per token", lambda history: history.eval_curve("loss"), False),
    ("Bits per byte", "validation", lambda history: history.eval_curve("bits_per_byte"), False),
    ("Training loss", "nats per token, smoothed", lambda history: _smooth(history.curve("loss")), False),
    ("Mean rank", "over the low-rank layers", lambda history: history.means["rank"], True),
    ("Parameters", "", lambda history: history.curve("parameters"), True),
    ("Throughput", "tokens per second", lambda history: history.curve("tokens_per_s"), True),
    ("Memory", "MiB, process 0", lambda history: _memory(history), True),
    ("Learning rate", "", lambda history: history.curve("lr"), True),
]
"""Title, unit and points of the plots, and whether their y axis begins at 0."""

STEPPED = ("Mean rank", "Parameters")
DOTTED = ("Validation loss", "Bits per byte")

Figure = tuple[str, Callable[[Member], float | None], Callable[[float | None], str]]

FIGURES: list[Figure] = [
    ("validation loss", lambda member: member.loss, lambda value: fixed(value, 4)),
    ("bits per byte", lambda member: member.history.bits_per_byte, lambda value: fixed(value, 4)),
    ("parameters", lambda member: member.history.parameters, amount),
    ("rank", lambda member: member.rank, lambda value: fixed(value, 1)),
    ("null rank", lambda member: member.null_rank, lambda value: fixed(value, 1)),
    ("tokens", lambda member: member.history.tokens, amount),
    ("FLOPs", lambda member: member.history.at_end("flops"), operations),
    ("time", lambda member: member.history.at_end("seconds"), duration),
    ("memory", lambda member: member.memory, size),
]
"""Heading, figure of a run, and how it is written."""

COST_NAMES: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "tokens": ("tokens", amount),
    "flops": ("FLOPs", operations),
    "seconds": ("", duration),
}


def write_comparison(comparison: Comparison, file: Path) -> Path:
    """Write the page of a comparison and return its path. The file is written atomically.

    Raises:
        UserError: the file cannot be written.
    """
    write_page(file, _page(comparison))
    return file


def terminal_table(comparison: Comparison) -> Table:
    """The final figures of each config: means over its seeds, with the range of the losses."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("config", no_wrap=True)
    for heading in ("seeds", "steps"):
        table.add_column(heading, justify="right")
    for heading, _, _ in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
        if heading == "validation loss":
            table.add_column("range", justify="right", no_wrap=True)
    for group in comparison.groups:
        cells = [_means(group, figure)[0] for figure in FIGURES]
        span = _means(group, FIGURES[0])[1] or "-"
        # As Text, because a folder's name may contain rich markup.
        table.add_row(Text(group.label), _seeds(group), _steps(group), cells[0], span, *cells[1:])
    return table


def _page(comparison: Comparison) -> str:
    groups = comparison.groups
    title = " and ".join(group.label for group in groups) if len(groups) < 3 else plural(len(groups), "config")
    runs = plural(len(comparison.members), "run")
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes())
    charts = Charts([member.timeline for member in comparison.members])
    choice = charts.controls(events=False)  # those of many runs would fill the plots
    figures = [_figure(charts, comparison, index) for index in range(len(CURVES))]
    body = [
        STYLE,
        f'<header><h1><bdi>{escape(title)}</bdi></h1><p class="soft">{runs} compared</p></header>',
        f'<h2>Before comparing</h2><div class="reading"><ul>{notes}</ul></div>' if notes else "",
        f"<h2>At the end</h2>{_final_table(comparison)}",
        _equal_costs(comparison),
        f'<h2>Over training</h2>{choice}{figures[0]}<div class="pair">{"".join(figures[1:])}</div>',
        _differences(comparison),
        f"<h2>Runs</h2>{_run_table(comparison)}",
        charts.script(),
    ]
    return page(escape(title), body)


def _figure(charts: Charts, comparison: Comparison, index: int) -> str:
    title, unit, points_of, from_zero = CURVES[index]
    lines: list[Line] = []
    for number_of_group, group in enumerate(comparison.groups):
        colour = COLOURS[number_of_group % len(COLOURS)]
        dash = DASHES[number_of_group // len(COLOURS) % len(DASHES)]
        place = comparison.members.index
        done = group.compared
        line = _mean_line([points_of(member.history) for member in done])
        line.label, line.run, line.colour, line.dash = group.label, place(done[0]), colour, dash
        lines.append(line)
        for member in group.members:
            if member not in done:
                label, points = f"{member.label}, not finished", points_of(member.history)
                lines.append(Line(label=label, points=points, run=place(member), colour=colour, dash=UNFINISHED_DASH))
        if title == "Mean rank":
            nulls = _mean_line([member.history.means["null_rank"] for member in done])
            nulls.label, nulls.run, nulls.colour = f"{group.label}, null rank", place(done[0]), colour
            nulls.dash, nulls.width, nulls.low, nulls.high = "4 4", 1.1, (), ()
            lines.append(nulls)
    for line in lines:
        line.dots = title in DOTTED and len(line.points) <= 60
        if title in STEPPED:
            _hold(line)
    return charts.figure(
        Chart(title=title, unit=unit, lines=lines, marks=False, height=340 if index == 0 else 220, from_zero=from_zero)
    )


def _mean_line(curves: Sequence[Points]) -> Line:
    """The mean of the curves of several runs at the steps that all have, with its range; without a label."""
    if len(curves) == 1:
        return Line(label="", points=list(curves[0]))
    values = [{step: value for step, value in curve if value is not None} for curve in curves]
    steps = sorted(set.intersection(*({*each} for each in values)))
    at = [[each[step] for each in values] for step in steps]
    points: Points = [(step, sum(each) / len(each)) for step, each in zip(steps, at, strict=True)]
    return Line(label="", points=points, low=[min(each) for each in at], high=[max(each) for each in at])


def _hold(line: Line) -> None:
    """Let a line and its band keep their values until the next point."""
    steps = [step for step, _ in line.points for _ in range(2)]
    line.points = list(zip(steps, _delayed([value for _, value in line.points]), strict=True))
    line.low, line.high = _delayed(line.low), _delayed(line.high)


def _delayed(values: Sequence[float | None]) -> list[float | None]:
    """Each value after the one before it."""
    return [each for pair in zip([*values[:1], *values[:-1]], values, strict=True) for each in pair]


def _smooth(points: Points) -> Points:
    return smoothed(points, len(points) // 100) if len(points) >= 50 else points


def _memory(history: History) -> Points:
    points, _ = memory_points(history)
    return scaled(points, 2**20)


def _means(group: Group, figure: Figure) -> tuple[str, str]:
    """Mean over the compared runs, and the range where they differ."""
    _, value_of, write = figure
    values = group.values(value_of)
    ends = [write(min(values)), write(max(values))] if values else []
    return write(group.mean(value_of)), " \u2013 ".join(ends) if len({*ends}) > 1 else ""


def _seeds(group: Group) -> str:
    return (
        f"{len(group.compared)} of {len(group.members)}"
        if len(group.compared) < len(group.members)
        else str(len(group.members))
    )


def _steps(group: Group) -> str:
    steps = sorted({member.history.last_step for member in group.compared})
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} \u2013 {steps[-1]:,}"


def _final_table(comparison: Comparison) -> str:
    known = [figure for figure in FIGURES if any(group.values(figure[1]) for group in comparison.groups)]
    head = "".join(f'<th class="n">{heading}</th>' for heading in ("seeds", "steps", *(each[0] for each in known)))
    rows = []
    for group in comparison.groups:
        cells = [f'<td class="n">{each}</td>' for each in (_seeds(group), _steps(group))]
        for figure in known:
            value, span = (escape(each) for each in _means(group, figure))
            cells.append(
                f'<td class="n">{value}' + (f'<br><small class="soft">{span}</small>' if span else "") + "</td>"
            )
        rows.append(f"<tr><td><bdi>{escape(group.label)}</bdi></td>{''.join(cells)}</tr>")
    return (
        '<p class="soft">Means over the seeds, with their range below. The null rank is what the rule finds on '
        "untrained factors: a rank says something only where it differs. Memory is the peak of process 0.</p>"
        f'<div class="scroll"><table><thead><tr><th>config</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _equal_costs(comparison: Comparison) -> str:
    budgets = comparison.budgets
    if not budgets or len(comparison.groups) < 2:
        return ""
    head = [
        "config",
        *(
            f"at {write(budgets[axis])} {name}".rstrip()
            for axis, (name, write) in COST_NAMES.items()
            if axis in budgets
        ),
    ]
    rows = [
        [
            group.label,
            *(
                fixed(group.mean(lambda member, axis=axis: member.loss_at(axis, budgets[axis])), 4)  # type: ignore[misc]
                for axis in COST_NAMES
                if axis in budgets
            ),
        ]
        for group in comparison.groups
    ]
    return (
        '<h2>Validation loss at equal cost</h2><p class="soft">Each at the largest cost at which all were evaluated, '
        "linear between evaluations. The learning rate of a run that goes on is not yet at its end there. Time depends "
        f"on the machine and on its other load.</p>{text_table(head, rows, [0])}"
    )


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    head = ["setting", *(group.label for group in comparison.groups)]
    rows = [[key, *(readable(value, 60) for value in values)] for key, values in comparison.differences]
    return f"<h2>Settings that differ</h2>{text_table(head, rows, range(len(head)))}"


def _run_table(comparison: Comparison) -> str:
    head = ["run", "config", "seed", "state", *(heading for heading, _, _ in FIGURES)]
    rows = []
    for group in comparison.groups:
        for member in group.members:
            figures = [write(value_of(member)) for _, value_of, write in FIGURES]
            rows.append([member.label, group.label, member.seed, state_of(member), *figures])
    return text_table(head, rows, [0, 1, 3])


def state_of(member: Member) -> str:
    """How far a run is, in words."""
    history = member.history
    state = "finished" if history.ended else f"not finished, step {history.last_step:,}{history.goal}"
    times = len(history.resumes)
    return state + (f", resumed {'once' if times == 1 else f'{times} times'}" if times else "")

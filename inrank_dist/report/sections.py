"""The sections of the report as HTML. A section without content is an empty string."""

from __future__ import annotations

from html import escape
from typing import Any

from ..runtime.words import plural
from ..train.monitors.ranks import RankChange, RankTable, mean
from ..train.monitors.text import amount, duration, fixed, number, perplexity_of
from .history import History, Layer, last

HTML = str


def tiles(history: History) -> HTML:
    """The most important figures, each with its reference value."""
    entropy, loss, table = history.unigram_entropy, history.validation_loss, history.table
    cells = []
    note = f"unigram entropy {fixed(entropy, 3)}"
    if entropy is not None and loss is not None:
        note += f"; {abs(entropy - loss):.3f} {'below' if loss < entropy else 'above'} it"
    cells.append(("Validation loss, nats per token", fixed(loss, 3), note))
    bits = f"; {history.bits_per_byte:.3f} bits per byte" if history.bits_per_byte is not None else ""
    unigram = f"unigram {fixed(perplexity_of(entropy), 0)}"
    cells.append(("Validation perplexity", fixed(history.perplexity, 2), unigram + bits))
    dense = number(history.summary.get("parameters_dense"))
    notes = [f"from {amount(history.parameters_start)} at the start"] if history.parameters_start else []
    if dense and history.parameters is not None:
        notes.append(f"{history.parameters / dense:.2f} of dense, {amount(dense)}")
    cells.append(("Parameters", amount(history.parameters), "; ".join(notes)))
    if table.ranks:
        null = mean(table.null_ranks.values())
        note = f"null rank {fixed(null, 1)}" if null is not None else "no null rank measured"
        if null is not None:
            note = f"found by the rule {fixed(mean(table.found.values()), 1)}, {note}"
        layers = plural(len(table.ranks), "layer")
        cells.append(("Mean rank", fixed(mean(table.ranks.values()), 1), f"{note}; {layers}"))
    speed = history.tokens_per_second
    note = f"median {speed:,.0f} per second" if speed else ""
    cells.append(("Tokens trained on", amount(history.tokens), note))
    if (seconds := number(history.summary.get("seconds"))) is not None:
        spent = history.decision_seconds
        note = f"h:mm:ss; decisions on rank {spent:.2f} s" if spent else "h:mm:ss"
        cells.append(("Wall time", duration(seconds), note))
    body = "".join(
        f'<dl class="tile"><dt>{escape(name)}</dt><dd class="big">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></dl>'
        for name, value, note in cells
    )
    return f'<div class="tiles">{body}</div>'


def layer_table(history: History) -> HTML:
    """A table of all low-rank layers: shape, ranks, explained ratio, and parameters relative to dense."""
    layers, table = list(history.layers.values()), history.table
    if not layers:
        return ""
    head = _row(
        "th",
        ("Layer", ""),
        ("out \u00d7 in", "n"),
        ("Rank", "n"),
        ("Found", "n"),
        ("Null rank", "n"),
        ("", ""),
        ("Rank beside null", ""),
        ("Explained", "n"),
        ("Effective rank", "n"),
        ("r (out + in)", "n"),
        ("Of dense", "n"),
    )
    at = "" if history.last_decision is None else f", step {history.last_decision:,}"
    longest = max([1.0, *(last(layer.rank) or 0.0 for layer in layers), *table.null_ranks.values()])
    rows = "".join(_layer_row(layer, table, longest) for layer in layers)
    return (
        '<h2>Layers</h2><p class="soft">Bars: the rank; the upright line is the null rank. <i>Found</i>, '
        f"<i>explained</i> and <i>effective rank</i> are of the last decision{at}: the rank that the rule chose, "
        "before rounding or a budget; the share of the spectrum that the rank kept explains; and the nuclear over the "
        "spectral norm. Compare the rank found with the null rank. Marked: a rank found that is the null rank within "
        "2%, one that never left its start, one that explains less than the threshold. "
        "<i>r (out + in)</i> counts the factors only, without a base that has not been removed.</p>"
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody>{_total(layers, table)}</table></div>'
    )


def _layer_row(layer: Layer, table: RankTable, longest: float) -> HTML:
    rank, null = last(layer.rank), table.null_ranks.get(layer.name)
    flags = " ".join(f'<span class="flag">{escape(flag)}</span>' for flag in table.flags(layer.name))
    shape = f"{layer.shape[0]:,} \u00d7 {layer.shape[1]:,}" if layer.shape else "-"
    factors, dense = layer.factor_parameters, layer.dense_parameters
    share = f"{factors / dense:.2f}" if factors is not None and dense else "-"
    return _row(
        "td",
        (escape(layer.name), ""),
        (shape, "n"),
        (fixed(rank, 0), "n"),
        (fixed(table.found.get(layer.name) if null is not None else None, 0), "n"),
        (fixed(null, 0), "n"),
        (flags, ""),
        (_bar(rank, null, longest), ""),
        (fixed(table.explained.get(layer.name), 3), "n"),
        (fixed(table.effective_ranks.get(layer.name), 1), "n"),
        (fixed(factors, 0), "n"),
        (share, "n"),
    )


def _total(layers: list[Layer], table: RankTable) -> HTML:
    known = [
        (layer.factor_parameters, layer.dense_parameters)
        for layer in layers
        if layer.factor_parameters is not None and layer.dense_parameters is not None
    ]
    factors, dense = sum(pair[0] for pair in known), sum(pair[1] for pair in known)
    row = _row(
        "td",
        (f"Mean, sum ({plural(len(layers), 'layer')})", ""),
        ("", "n"),
        (fixed(mean(last(layer.rank) for layer in layers), 1), "n"),
        (fixed(mean(table.found.get(layer.name) for layer in layers if layer.name in table.null_ranks), 1), "n"),
        (fixed(mean(table.null_ranks.values()), 1), "n"),
        ("", ""),
        ("", ""),
        (fixed(mean(table.explained.values()), 3), "n"),
        (fixed(mean(table.effective_ranks.values()), 1), "n"),
        (fixed(factors, 0) if known else "-", "n"),
        (f"{factors / dense:.2f}" if dense else "-", "n"),
    )
    return f"<tfoot>{row}</tfoot>"


def _bar(rank: float | None, null: float | None, longest: float) -> HTML:
    filled = 118 * (rank or 0) / longest
    tick = ""
    if null is not None:
        x = 118 * null / longest
        tick = f'<line class="null" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="12"/>'
    return (
        '<svg class="bar" viewBox="0 0 120 12" aria-hidden="true">'
        '<rect class="all" y="2" width="120" height="8"/>'
        f'<rect class="rank" y="2" width="{filled:.1f}" height="8"/>{tick}</svg>'
    )


def event_table(history: History) -> HTML:
    """Growth, freeze, base removal and resumes in the order of steps."""
    rows = [(change.step, _rank_event_row(change)) for change in history.rank_changes]
    for record in history.base_removals:
        rows.append((record["step"], _plain_row(record, "base removed", "the factors stand alone from here")))
    for record in history.resumes:
        world = plural(int(number(record.get("world_size")) or 1), "process")
        rows.append((record["step"], _plain_row(record, "resume", f"on {world}")))
    if not rows:
        return ""
    head = _row(
        "th",
        ("Step", "n"),
        ("Event", ""),
        ("Layers", "n"),
        ("Mean rank", "n"),
        ("Found", "n"),
        ("Null rank", "n"),
        ("Explained", "n"),
        ("Seconds", "n"),
        ("", ""),
    )
    body = "".join(row for _, row in sorted(rows, key=lambda pair: pair[0]))
    cost = ""
    if history.decision_seconds:
        cost = f"Decisions on rank took {history.decision_seconds:.2f} s in all"
        if seconds := number(history.summary.get("seconds")):
            cost += f", {100 * history.decision_seconds / seconds:.2g}% of the wall time"
        cost = f'<p class="soft">{cost}.</p>'
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    cost += (
        '<p class="soft">Ranks and ratios are means over all layers, after the event.</p>'
        if history.rank_changes
        else ""
    )
    return f'<h2>Events</h2>{cost}<div class="scroll">{table}</div>'


def _rank_event_row(change: RankChange) -> HTML:
    return _row(
        "td",
        (f"{change.step:,}", "n"),
        (escape(change.action), ""),
        (f"{change.changed:,} of {change.total:,}", "n"),
        (f"{fixed(change.before, 1)} → {fixed(change.after, 1)}", "n"),
        (fixed(change.found, 1), "n"),
        (fixed(change.null_rank, 1), "n"),
        (fixed(change.explained, 3), "n"),
        (fixed(change.seconds, 2), "n"),
        (" ".join(f'<span class="flag">{escape(note)}</span>' for note in change.short_notes), ""),
    )


def _plain_row(record: dict[str, Any], event: str, note: str) -> HTML:
    empty = [("", "")] * 6
    return _row("td", (f"{record['step']:,}", "n"), (event, ""), *empty, (escape(note), ""))


def _row(tag: str, *cells: tuple[HTML, str]) -> HTML:
    inner = "".join(f'<{tag} class="{kind}">{text}</{tag}>' for text, kind in cells)
    return f"<tr>{inner}</tr>"


def samples(history: History) -> HTML:
    """The latest sampled text, with the earlier ones collapsed."""
    if not history.samples:
        return ""
    *earlier, newest = history.samples
    older = "".join(_sample(record) for record in reversed(earlier))
    folded = f"<details><summary>Earlier samples ({len(earlier)})</summary>{older}</details>" if earlier else ""
    return f"<h2>Sampled text</h2>{_sample(newest)}{folded}"


def _sample(record: dict[str, Any]) -> HTML:
    prompt, text = escape(str(record.get("prompt", ""))), escape(str(record.get("text", "")))
    content = f"<b><bdi>{prompt}</bdi></b><bdi>{text}</bdi>"
    return f'<p class="soft">Step {record["step"]:,}</p><div class="sample">{content}</div>'


def config(text: str) -> HTML:
    """The resolved settings, collapsed."""
    if not text:
        return ""
    folded = f"<details><summary>Resolved config.yaml</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>Settings</h2>{folded}"

"""The style sheet of our pages, for light and dark screens, paper and phones, and the page frame."""

from collections.abc import Collection, Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme:light dark; --paper:#fff; --card:#f6f7f9; --ink:#16191d; --soft:#5c6570;
  --rule:#dde1e6; --grid:#eaedf0; --c0:#1f6fb4; --c1:#c8501c; --c2:#218358; --c3:#8145b5; --c4:#a3791a;
  --c5:#b5325c; --c6:#0f8a94; --c7:#6a7280; --warn:#b3261e;
  --h0:#d3d7dc; --h1:#c7e9b4; --h2:#7fcdbb; --h3:#41b6c4; --h4:#1d91c0; --h5:#225ea8; --h6:#253494; --h7:#081d58 }
@media screen and (prefers-color-scheme:dark) {
  :root { --paper:#14171b; --card:#1c2026; --ink:#e8ebee; --soft:#9aa4af; --rule:#343b44; --grid:#262c33;
    --c0:#62a8e5; --c1:#f08a52; --c2:#55bd8b; --c3:#b98be6; --c4:#d8ae4e; --c5:#ec7ba0; --c6:#4cc3cd;
    --c7:#98a1ad; --warn:#ff8a80;
    --h0:#4a515a; --h1:#253494; --h2:#225ea8; --h3:#1d91c0; --h4:#41b6c4; --h5:#7fcdbb; --h6:#c7e9b4; --h7:#ffffd9 }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
main { max-width:1080px; margin:0 auto; padding:36px 28px 56px }
h1 { font-size:1.75rem; line-height:1.2; margin:0 0 4px; letter-spacing:-.01em }
h1 bdi { display:-webkit-inline-box; -webkit-box-orient:vertical; -webkit-line-clamp:3; overflow:hidden;
  max-width:100%; vertical-align:middle }
h2 { font-size:1.1rem; margin:40px 0 12px; padding-bottom:6px; border-bottom:1px solid var(--rule) }
p { margin:0 0 10px }
.soft { color:var(--soft) }
.warn { color:var(--warn) }
header .status { display:inline-block; font-size:.8rem; padding:1px 9px; border:1px solid currentColor;
  border-radius:99px; vertical-align:middle; margin-left:8px; font-weight:500; letter-spacing:0 }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(280px, 1fr)); gap:12px; margin:22px 0 0 }
.tile { margin:0; background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:12px 14px }
.tile dt { font-size:.8rem; color:var(--soft) }
.tile dd { margin:0 }
.tile .big { font-size:1.6rem; line-height:1.25; font-weight:600; letter-spacing:-.01em }
.tile .note { font-size:.82rem; color:var(--soft); line-height:1.4 }
.reading { border-left:3px solid var(--c0); background:var(--card); padding:12px 16px 12px 0; margin:0;
  border-radius:0 8px 8px 0 }
.reading { overflow-wrap:anywhere }
.reading code { font:13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.reading code span { display:inline-block; max-width:100% }
.reading ul { margin:0; padding-left:32px }
.reading li { margin:3px 0 }
.reading bdi { display:block; max-height:12em; overflow:auto }
figure { margin:0 0 24px; break-inside:avoid }
figcaption { display:flex; flex-wrap:wrap; align-items:baseline; gap:0 8px; margin-bottom:4px }
.unit { color:var(--soft); font-size:.85rem }
.legend { display:flex; flex-wrap:wrap; gap:0 14px; font-size:.82rem; color:var(--soft); margin-left:auto }
.legend span { display:inline-flex; align-items:center; gap:6px }
button { font:inherit; color:inherit; background:none; border:0; padding:0; cursor:pointer; text-align:left }
.key { display:inline-flex; align-items:center; gap:6px; max-width:100%; min-width:0 }
.key bdi { overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
.key[aria-pressed=false] { opacity:.45; text-decoration:line-through }
.controls { display:flex; flex-wrap:wrap; align-items:center; gap:6px 14px; margin:0 0 14px }
.choice { display:flex; flex-wrap:wrap; padding-left:1px; font-size:.85rem }
.choice button { border:1px solid var(--rule); padding:2px 12px; margin-left:-1px; color:var(--soft) }
.choice button[aria-pressed=true] { background:var(--card); color:var(--ink); font-weight:600 }
.picker { display:flex; flex-wrap:wrap; gap:6px 20px; margin:0 0 12px; font-size:.88rem }
.picker label { display:flex; flex-wrap:wrap; align-items:center; gap:8px; max-width:100% }
.picker select { font:inherit; max-width:100% }
.picker output { color:var(--soft) }
.pair > * { min-width:0 }
.plot { position:relative; touch-action:pan-y }
.tip { position:absolute; top:8px; z-index:1; pointer-events:none; max-width:100%; padding:6px 10px; font-size:.78rem;
  line-height:1.45; background:var(--card); border:1px solid var(--rule); border-radius:6px;
  box-shadow:0 2px 8px rgb(0 0 0 / .18) }
.tip p { margin:0 }
.tip .long { overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
.tip table { width:auto; font-size:inherit }
.tip td { padding:0 4px; border:0 }
.tip td:first-child { padding:0 }
.tip td bdi { display:block; max-width:240px; overflow:hidden; text-overflow:ellipsis }
.tip i { display:block; width:9px; height:9px; border-radius:50% }
.cross { stroke:var(--soft); stroke-width:1; fill:none }
.mark { stroke-width:1.2; fill:none }
.band { opacity:.18 }
.points circle { stroke:var(--paper); stroke-width:1 }
.swatch { width:18px; height:12px; flex:none }
.pair { display:grid; grid-template-columns:1fr 1fr; gap:0 28px }
svg { display:block; width:100%; height:auto }
.grid { stroke:var(--grid) }
.axis { stroke:var(--soft) }
.curve { fill:none; stroke-linejoin:round }
.reference { stroke:var(--soft); stroke-dasharray:6 4; stroke-width:1.3 }
.tick,.name { font-size:12px; fill:var(--soft); font-family:inherit }
.name { fill:var(--ink); paint-order:stroke; stroke:var(--paper); stroke-width:4px; stroke-linejoin:round }
.group { font-size:12px; font-weight:600; fill:var(--ink); font-family:inherit }
.row { fill:none; stroke:var(--ink); stroke-width:1 }
.h0 { fill:var(--h0) }
.h1 { fill:var(--h1) }
.h2 { fill:var(--h2) }
.h3 { fill:var(--h3) }
.h4 { fill:var(--h4) }
.h5 { fill:var(--h5) }
.h6 { fill:var(--h6) }
.h7 { fill:var(--h7) }
.patch { height:10px; flex:none }
.narrow { display:none }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:.88rem }
th,td { padding:5px 10px; text-align:left; border-bottom:1px solid var(--grid); white-space:nowrap;
  max-width:64ch; overflow:hidden; text-overflow:ellipsis; overflow-wrap:normal }
th { white-space:normal; font-weight:600; color:var(--soft); border-bottom-color:var(--rule); vertical-align:bottom }
th.n,td.n { text-align:right }
tfoot td { font-weight:600; border-top:1px solid var(--rule); border-bottom:0 }
td:first-child,th:first-child { padding-left:0 }
tr { break-inside:avoid }
td .bar { width:120px; height:12px; min-width:120px }
.bar .all { fill:var(--grid) }
.bar .rank { fill:var(--c0) }
.bar .null { stroke:var(--ink); stroke-width:2 }
.flag { color:var(--warn); font-size:.8rem }
pre, .sample { font:13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background:var(--card); border:1px solid var(--rule); border-radius:8px; padding:12px 14px;
  white-space:pre-wrap; overflow-wrap:anywhere; margin:0 0 10px }
.sample { max-height:30em; overflow:auto }
summary { cursor:pointer; margin:8px 0 }
footer { margin-top:40px; font-size:.82rem; color:var(--soft) }
@media (max-width:640px) {
  main { padding:20px 16px 40px }
  .wide { display:none }
  .narrow { display:block }
  .pair { grid-template-columns:1fr }
  .legend { margin-left:0; width:100% }
  .tiles { grid-template-columns:1fr 1fr; gap:8px }
  .tile { padding:10px 11px }
  .tile .big { font-size:1.3rem }
}
@media print {
  :root { color-scheme:light }
  main { max-width:none; padding:0 }
  body { font-size:11pt }
  .scroll { overflow:visible }
  .tip, .choice { display:none }
  table, .flag { font-size:7.5pt }
  th, td { padding:2px 4px; max-width:26ch }
  .sample { max-height:none }
  th { white-space:normal }
  td .bar { width:70px; min-width:70px }
  h2, .controls, .picker { break-after:avoid }
  tfoot { display:table-row-group }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A self-contained HTML page, which may load nothing. ``title`` and ``parts`` are HTML; empty parts are skipped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def with_commands(sentence: str) -> str:
    """A sentence as HTML, with what is between backticks as commands, which wrap between their words only."""
    parts = sentence.split("`")
    if len(parts) % 2 == 0:  # a name holds one
        return escape(sentence)
    return "".join(_command(part) if index % 2 else escape(part) for index, part in enumerate(parts))


def _command(text: str) -> str:
    return f"<code>{' '.join(f'<span>{escape(word)}</span>' for word in text.split(' '))}</code>"


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Collection[int]) -> str:
    """A table of plain text as HTML. All columns but ``text_columns`` hold numbers and are aligned to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if index in text_columns else ' class="n"' for index in range(len(cells))]
        joined = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{joined}</tr>"

    body = "".join(line(each, "td") for each in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'

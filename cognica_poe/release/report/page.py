"""HTML pieces of the report: document, style, tables, folds. Callers escape what they put in (``text.html_text``)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cognica_poe.release.text import html_text

if TYPE_CHECKING:
    from cognica_poe.release.report.plots import Plot

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #22262b; --soft: #5d656e; --grid: #d9dce0;
  --line: #e3e5e8; --good: #17744d; --weak: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --ink: #e4e7ea; --soft: #a0a8b1;
  --grid: #3a4047; --line: #31363c; --good: #5fc79a; --weak: #d9a441; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { margin: .4rem 0; } p, li { max-width: 75ch; } .sub, figcaption, em, .tile small { color: var(--soft); }
em { font-style: normal; }
.tiles h2 { border: 0; margin: 1.25rem 0 .5rem; padding: 0; font-size: 1.05rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; }
.tile, figure, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: .75rem .9rem; } .tile b { display: block; font-size: clamp(1.05rem, 4vw, 1.3rem); line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile small { display: block; font-size: .8rem; line-height: 1.35; }
.tile span { font-size: .85rem; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1rem;
  margin: 1rem 0; }
figure { margin: 0; padding: .8rem .9rem; display: flex; flex-direction: column; }
figure h3 { margin: 0 0 .4rem; font-size: 1rem; } figcaption { font-size: .85rem; line-height: 1.4; margin-top: .4rem; }
svg.plot { width: 100%; height: auto; display: block; } svg.plot text { font-family: inherit !important; }
nav { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .9rem; margin: 1rem 0;
  font-size: .9rem; } nav ul { list-style: none; margin: 0; padding: 0; columns: 15rem; column-gap: 1.5rem; }
nav li { break-inside: avoid; margin: .1rem 0; } nav li.sub { padding-left: 1rem; } nav a, a { color: inherit; }
.scroll { overflow: auto; max-height: 36rem; margin: .25rem 0 1rem; border: 1px solid var(--line); border-radius: 10px;
  background: linear-gradient(to right, var(--card) 30%, transparent) left / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 30%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to right, var(--grid), transparent) left / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--grid), transparent) right / .8rem 100% no-repeat scroll, var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; } tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; position: sticky; top: 0; background: var(--card); z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); max-width: 45vw;
  overflow-wrap: anywhere; } td.t:first-child { white-space: normal; min-width: 9rem; } th:first-child { z-index: 2; }
.t { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
details { padding: .6rem .9rem; margin: .5rem 0; } details .scroll { border: 0; margin: .5rem 0 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary em { font-size: .85rem; margin-left: .4rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem .9rem;
  overflow-x: auto; font-size: .85rem; line-height: 1.45; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
.signal { color: var(--good); } .noise { color: var(--weak); } .warn { color: var(--weak); }
dt { font-weight: 600; margin-top: .7rem; } dd { margin: 0; max-width: 75ch; color: var(--soft); }
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --grid: #ccc; --line: #ccc; --good: #060;
    --weak: #630; }
  main { max-width: none; padding: 0; } body { font-size: 11px; } table { font-size: 8px; } nav { display: none; }
  .plots { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; max-height: none; background: none; }
  th, td { white-space: normal; padding: .15rem .25rem; position: static; }
  th:first-child, td:first-child { position: static; max-width: none; }
  details::details-content { content-visibility: visible; display: block; } }
"""

GLOSSARY = """<dl>
<dt>Bits per byte</dt><dd>What the model needs, on average, to write down one UTF-8 byte of held-out text. It does not
depend on the tokenizer. Lower is better.</dd>
<dt>Full pool, stage, prefix, plain path</dt><dd>All stage heads combined; one head alone at its own depth; the first
stages combined (a shallower, cheaper model with the same weights); the last layer with the shared head only, as an
ordinary transformer.</dd>
<dt>Gap</dt><dd>Bits per byte of the full pool minus those of another use of the same weights (the deepest stage, the
stage or the first stages that do best on this text), over the same documents. An interval below zero speaks for the
pool, one above zero for the other, one that holds zero for neither.</dd>
<dt>WAND bounds and exits</dt><dd>A token may leave at a stage once its lead is larger than all that later stages are
expected to change. The bounds are the 99th percentile of that change, measured on held-out tokens of each step. Exits
are counted; whether they save time has to be timed.</dd>
<dt>Routed</dt><dd>Share of positions that stage 0 may answer alone by its lead, at a capped rate of tokens lost. Where
the cap never binds, the share says nothing about the lead.</dd>
<dt>Acceptance</dt><dd>Share of tokens drafted by a shallow stage that the full pool would have chosen too. The output
is the full pool's either way. It depends on the prompts and on how many tokens follow them.</dd>
<dt>Interval, signal, noise</dt><dd>95 % bootstrap intervals over documents. A change since another step is a signal
when its paired interval excludes zero and its p-value holds Holm's correction for all changes of its table, else
noise.</dd>
<dt>xz, primed xz</dt><dd>The same text under a general-purpose compressor, alone and after it has read training
text.</dd>
</dl>"""


MARK = '<meta name="generator" content="cognica-poe report">'
"""A line of every report; a page without it is not ours to replace."""


def document(title: str, body: str) -> str:
    """The page around ``body``."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{html_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def header(title: str, subtitle: str) -> str:
    """Page heading."""
    return f'<header>\n<h1>{html_text(title)}</h1>\n<p class="sub">{html_text(subtitle)}</p>\n</header>'


def section(title: str, body: str, anchor: str) -> str:
    """A part of the page under a heading."""
    return f'<section>\n<h2 id="{html_text(anchor)}">{html_text(title)}</h2>\n{body}\n</section>'


def subsection(title: str, body: str, anchor: str) -> str:
    """A smaller part, or nothing when ``body`` is empty."""
    return f'<h3 id="{html_text(anchor)}">{html_text(title)}</h3>\n{body}' if body else ""


def contents(body: str) -> str:
    """A list of the parts of ``body`` that carry a name to jump to."""
    found = re.findall(r'<h([23]) id="([^"]+)">(.*?)</h', body, re.DOTALL)
    items = "".join(
        f'<li class="{"sub" if level == "3" else "part"}"><a href="#{anchor}">{title}</a></li>'
        for level, anchor, title in found
    )
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def tiles(title: str, items: Iterable[tuple[str, str, str]]) -> str:
    """Key numbers: ``(name, value, note)`` each, plain text."""
    head = f"<h2>{html_text(title)}</h2>" if title else ""
    cells = "".join(
        f'<div class="tile"><span>{html_text(name)}</span><b>{html_text(value)}</b>'
        f"<small>{html_text(note)}</small></div>"
        for name, value, note in items
    )
    return f'{head}<div class="row">{cells}</div>'


def plots(items: Sequence[Plot]) -> str:
    """A grid of ``plots.Plot``."""
    cells = "".join(
        f"<figure><h3>{html_text(plot.title)}</h3>\n{plot.svg}\n"
        f"<figcaption>{html_text(plot.note, 800)}</figcaption></figure>\n"
        for plot in items
    )
    return f'<div class="plots">\n{cells}</div>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str = "",
    text_columns: int = 1,
    last_is_text: bool = False,
    anchor: str = "",
) -> str:
    """A table that scrolls by itself and keeps its head and first column. Cells are HTML already; the first
    ``text_columns`` are left-aligned."""
    last = len(head) - 1

    def kind(column: int) -> str:
        if last_is_text and column == last:
            return ' class="long"'
        return ' class="t"' if column < text_columns else ""

    lines = ["".join(f"<th{kind(i).replace('long', 't')}>{cell}</th>" for i, cell in enumerate(head))]
    lines += ["".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    name = f' id="{html_text(anchor)}"' if anchor else ""
    caption = f"<h3{name}>{html_text(title)}</h3>\n" if title else ""
    return f'{caption}<div class="scroll"><table>\n{body}\n</table></div>'


def listing(items: Sequence[str]) -> str:
    """A list of sentences, HTML each; nothing where there is none."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def fold(summary: str, body: str, is_open: bool = False) -> str:
    """A part that can be opened; ``summary`` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>\n{body}\n</details>"


def code(text: str) -> str:
    """A block of code."""
    return f"<pre><code>{html.escape(text)}</code></pre>"

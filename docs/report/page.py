"""The report as one HTML file: figures and equations lie in it, nothing is fetched, and it prints on A4."""

import base64
import functools
import html
import io
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from docs.report.texts import Text

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d6dbe2; --tint: #f4f6f8; --accent: #1f5f8b; --warn: #8a5a00 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink); background: white;
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.45rem; margin: 3rem 0 .5rem; padding-bottom: .3rem; border-bottom: 2px solid var(--accent) }
h3 { font-size: 1.12rem; margin: 0 0 .4rem }
p { margin: 0 0 .7rem; max-width: 46rem }
a { color: var(--accent) }
nav ol { columns: 2; padding-left: 1.3rem; margin: .6rem 0 0 }
section.part { margin: 1.6rem 0; padding: 1.1rem 1.2rem; border: 1px solid var(--line); border-radius: 8px }
.edition { color: var(--soft); font-weight: normal; font-size: .9rem; margin-left: .4rem }
.beside { display: grid; grid-template-columns: minmax(0, 3fr) minmax(19rem, 2fr); gap: 1.4rem; align-items: start }
.beside.wide { grid-template-columns: minmax(0, 1fr) }
.beside > div { min-width: 0 }
figure { margin: 0 0 1rem; break-inside: avoid }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line) }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .3rem }
.equation { margin: .3rem 0 .9rem }
.equation img { display: block; max-width: 100%; margin: .35rem 0 }
.equation small { color: var(--soft) }
.wide table { max-width: 46rem }
table { border-collapse: collapse; font-size: .88rem; margin: 0 0 .3rem; width: 100%; break-inside: avoid }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem }
th, td { padding: .22rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
th { color: var(--soft); font-weight: 600 }
.source { color: var(--soft); font-size: .8rem; margin: 0 0 1rem; overflow-wrap: anywhere }
pre { background: var(--tint); border-radius: 6px; padding: .55rem .7rem; font-size: .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; margin: .3rem 0 .9rem }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace }
.absent { border-left: 4px solid var(--warn); padding: .4rem .8rem; background: #fdf6e7 }
@page { size: A4; margin: 14mm 13mm }
@media (max-width: 56rem) { .beside { grid-template-columns: minmax(0, 1fr) } nav ol { columns: 1 } }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0 }
  h2 { break-before: page; margin-top: 0 }
  h2, h3 { break-after: avoid }
  section.part { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .8rem 0 0; margin: .8rem 0 }
  .beside { display: block }
  figure img { max-height: 150mm; width: auto }
  .moving { display: none }
  a { color: inherit; text-decoration: none }
  pre { font-size: 8pt }
}
"""


@dataclass(frozen=True)
class Table:
    """A table: texts in the first column, numbers as text in the others.

    Attributes:
        caption: what it tells.
        head: names of the columns.
        rows: of the same length.
        source: where its numbers were read from.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: str


@dataclass(frozen=True)
class Figure:
    """A picture file and what it shows; `moving` ones are left out on paper."""

    file: Path
    caption: str
    moving: bool = False


@dataclass(frozen=True)
class Part:
    """One part of the page.

    Attributes:
        key: its anchor.
        text: its words.
        figures: to show.
        tables: beside them.
        commands: that made them, each with its seconds.
        seed: of the figures; None if nothing was drawn.
        absent: why there is nothing to show; one sentence of text, or nothing.
        wide: whether the figures take the whole width.
    """

    key: str
    text: Text
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, float]] = ()
    seed: int | None = None
    absent: str = ""
    wide: bool = False


def data_uri(content: bytes, kind: str) -> str:
    """Content as an address that needs no file and no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(file: Path, alternative: str) -> str:
    """An image element that holds the whole file."""
    kind = mimetypes.guess_type(file.name)[0] or "image/png"
    return f'<img src="{data_uri(file.read_bytes(), kind)}" alt="{html.escape(alternative)}">'


@functools.cache
def equation(tex: str) -> str:
    """An equation as an image element of curves, which needs no font of the reader's."""
    from matplotlib import font_manager, mathtext  # here, because it takes a second to import

    drawn = io.BytesIO()
    mathtext.math_to_image(f"${tex}$", drawn, font_manager.FontProperties(size=13), format="svg")
    return f'<img src="{data_uri(drawn.getvalue(), "image/svg+xml")}" alt="{html.escape(tex)}">'


def table(content: Table) -> str:
    """A table element, and beneath it where its numbers come from."""

    def row(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in content.rows)
    return (
        f"<table><caption>{html.escape(content.caption)}</caption><thead>{row(content.head, 'th')}</thead>"
        f"<tbody>{body}</tbody></table>"
        f'<p class="source">Read from {html.escape(content.source)}</p>'
    )


def part_html(part: Part) -> str:
    """A part as a section element."""
    text = "".join(f"<p>{paragraph}</p>" for paragraph in part.text.paragraphs)
    equations = "".join(map(equation, part.text.equations))
    if equations:
        text += f'<div class="equation">{equations}<small>{html.escape(part.text.source)}</small></div>'
    figures = "".join(
        f"<figure{' class=moving' * figure.moving}>{image(figure.file, figure.caption)}"
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        for figure in part.figures
    )
    beside = "".join(map(table, part.tables))
    if part.commands:
        shown = "\n".join(f"{html.escape(command)}   # {seconds:.0f} s" for command, seconds in part.commands)
        seed = f", seed {part.seed}" if part.seed is not None else ""
        beside += f"<strong>Made by</strong>{seed}<pre><code>{shown}</code></pre>"
    if part.absent:
        figures += f'<p class="absent">{html.escape(part.absent)}</p>'
    columns = f'<div class="beside{" wide" * part.wide}"><div>{figures}</div><div>{beside}</div></div>'
    return (
        f'<section class="part" id="{part.key}"><h3>{html.escape(part.text.title)}'
        f'<span class="edition">{html.escape(part.text.edition)}</span></h3>{text}{columns}</section>'
    )


def page(title: str, introduction: Sequence[str], facts: Table, parts: Sequence[Part]) -> str:
    """The whole page."""
    links = "".join(
        f'<li><a href="#{part.key}">{html.escape(part.text.title)}</a>{" (not there)" * bool(part.absent)}</li>'
        for part in parts
    )
    body, problem = [], None
    for part in parts:
        if part.text.problem != problem:
            problem = part.text.problem
            body.append(f"<h2>{html.escape(problem)}</h2>")
        body.append(part_html(part))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1>{''.join(f'<p>{text}</p>' for text in introduction)}"
        f"<nav><ol>{links}</ol></nav></header>"
        f"<main>{''.join(body)}</main><footer><h2>What this was made with</h2>{table(facts)}</footer></body></html>\n"
    )

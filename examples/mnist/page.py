"""The report as one HTML page that needs no other file: pictures inside, tables that sort, light and dark."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .document import Block, Cell, Code, Figure, Heading, Table, Text

__all__ = ["page"]

STYLE = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #626262; --line: #dcdcdc; --soft: #f5f6f8;
  --warn: #7a3b00; --warn-ground: #fff3e0; --link: #00599b }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e8e8e8; --faint: #a3a3a3; --line: #363a42;
  --soft: #1f2228; --warn: #ffcf99; --warn-ground: #3a2a14; --link: #7cc4ff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 1.5rem clamp(.9rem, 3vw, 2rem) 4rem }
h1 { font-size: clamp(1.45rem, 3.4vw, 2.1rem); line-height: 1.2; margin: .4rem 0 1rem; text-wrap: balance }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line) }
p, ul { max-width: 78ch; margin: .7rem 0; overflow-wrap: break-word } ul { padding-left: 1.2rem }
nav { font-size: .9rem; margin: 1rem 0 } nav a { display: inline-block; margin: 0 1rem .25rem 0 }
a { color: var(--link) }
.warning, .note { color: var(--warn); background: var(--warn-ground); border-radius: 4px }
.warning { font-weight: 600; padding: .5rem .8rem; max-width: none; border-left: 4px solid }
.note { display: inline-block; font-size: .8rem; font-weight: 600; padding: 0 .45rem; margin-left: .3rem }
figure { margin: 1.4rem 0 } figure > div { overflow-x: auto }
figure img { display: block; width: 100%; min-width: 640px; max-width: 900px; height: auto }
figcaption { max-width: 78ch; color: var(--faint); font-size: .92rem; margin-top: .4rem }
.table { margin: 1.4rem 0 } .caption { max-width: 100ch; font-size: .92rem; font-weight: 600; margin: 0 0 .4rem }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
tbody tr:last-child td { border-bottom: 0 } tbody tr:hover td { background: var(--soft) }
th { background: var(--soft); vertical-align: bottom; padding: 0 }
th button { all: unset; box-sizing: border-box; cursor: pointer; display: block; width: 100%; padding: .4rem .55rem;
  font-weight: 600; line-height: 1.25 }
th button:focus-visible { outline: 2px solid var(--link); outline-offset: -2px }
th button::after { content: "\\2195"; opacity: .35; padding-left: .25em }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1 }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1 }
td small { display: block; color: var(--faint); font-size: .88em } td:not(:first-child) small { white-space: nowrap }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1 }
td:first-child { min-width: 6.5em; max-width: 11em } th:first-child { background: var(--soft) }
td[data-value] { white-space: nowrap } td:first-child { white-space: normal }
td.missing { color: var(--faint); font-style: italic }
pre { overflow-x: auto; background: var(--soft); border-radius: 6px; padding: .7rem .9rem; font-size: .88rem }
code { font-family: ui-monospace, "SF Mono", Consolas, monospace; font-size: .92em } summary { cursor: pointer }
@media print { .scroll { overflow: visible } nav { display: none } }
"""

# A click on a header sorts by its column, a second one the other way round; cells without a number stay at the end.
SCRIPT = """\
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numbers = [...body.rows].some(row => row.cells[column].dataset.value !== undefined);
    const key = row => {
      const cell = row.cells[column];
      return numbers ? (cell.dataset.value === undefined ? null : Number(cell.dataset.value)) : cell.textContent;
    };
    const compare = (a, b) => numbers ? a - b : a.localeCompare(b, "en", {numeric: true});
    const rows = [...body.rows].sort((first, second) => {
      const a = key(first), b = key(second);
      if (a === null || b === null) return (a === null) - (b === null);
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...rows);
  }));
}
"""


def page(blocks: Sequence[Block]) -> str:
    """The blocks as one page."""
    title = next((block.text for block in blocks if isinstance(block, Heading) and block.level == 1), "Report")
    content, contents = [], _contents(blocks)
    for block in blocks:
        content.append(_html(block))
        if isinstance(block, Heading) and block.level == 1:
            content.append(contents)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(content)
        + f"\n</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _contents(blocks: Sequence[Block]) -> str:
    heads = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "\n".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in heads)
    return f'<nav aria-label="Contents">\n{links}\n</nav>'


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _html(block: Block) -> str:
    warned = ' class="warning"'
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_anchor(text)}">{escape(text)}</h{level}>'
        case Text(text, warning):
            if text.startswith("- "):
                return "<ul>\n" + "\n".join(f"<li>{_inline(line[2:])}</li>" for line in text.split("\n")) + "\n</ul>"
            return f"<p{warned if warning else ''}>{_inline(text)}</p>"
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Figure():
            return _figure(block)
        case Table():
            return _table(block)


def _inline(text: str) -> str:
    """Strong, emphasis and code, as Markdown writes them."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"(?<![\w*/])\*([^*\s][^*]*)\*", r"<em>\1</em>", text)


def _notes(warnings: Sequence[str]) -> str:
    return "".join(f' <span class="note">{escape(text)}</span>' for text in warnings)


def _figure(figure: Figure) -> str:
    light, dark = _data(figure.path), _data(figure.dark)
    return (
        f'<figure>\n<div tabindex="0" role="region" aria-label="{escape(figure.alt)}"><picture>'
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(figure.alt)}"></picture></div>\n'
        f"<figcaption>{_inline(figure.caption)}{_notes(figure.warnings)}</figcaption>\n</figure>"
    )


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in table.header)
    rows = "\n".join("<tr>" + "".join(map(_entry, row)) + "</tr>" for row in table.rows)
    body = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
    if table.folded:
        body = f"<details><summary>{len(table.rows)} rows</summary>\n{body}\n</details>"
    return (
        f'<div class="table">\n<p class="caption">{_inline(table.caption)}{_notes(table.warnings)}</p>\n{body}\n</div>'
    )


def _entry(cell: Cell) -> str:
    sorts = "" if cell.value is None else f' data-value="{cell.value!r}"'
    missing = ' class="missing"' if cell.value is None and re.match(r"not |diverged|-$", cell.text) else ""
    text = f"<strong>{escape(cell.text)}</strong>" if cell.strong else escape(cell.text)
    return f"<td{missing}{sorts}>{text}{''.join(f'<small>{escape(line)}</small>' for line in cell.small)}</td>"

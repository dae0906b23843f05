"""A report as blocks, written once and drawn twice: as Markdown here, as a page in page.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Cell", "Code", "Figure", "Heading", "Table", "Text", "markdown"]


@dataclass(frozen=True)
class Cell:
    """One entry of a table: what it says, in small lines what more there is to it, and the number that it sorts by."""

    text: str
    small: tuple[str, ...] = ()
    value: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the report's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or a warning that must not be overlooked; **strong**, *emphasis* and `code` are Markdown's."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header, with a caption that ends in the warnings; a folded one opens on demand."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    warnings: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture, the same on a dark ground, and what it shows."""

    path: Path
    dark: Path
    alt: str
    caption: str
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    text: str


Block = Heading | Text | Table | Figure | Code


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as one Markdown text."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text, warning):
            return f"> **{text}**" if warning else text
        case Code(text):
            return f"```\n{text}\n```"
        case Figure():
            return f"![{block.alt}]({block.path.name})\n\n{block.caption}{_note(block.warnings)}"
        case Table():
            lines = [[name.replace("|", "\\|") for name in block.header], ["---"] * len(block.header)]
            lines += [[_entry(cell) for cell in row] for row in block.rows]
            body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
            caption = f"**{block.caption}**{_note(block.warnings)}"
            if block.folded:
                return f"{caption}\n\n<details><summary>{len(block.rows)} rows</summary>\n\n{body}\n\n</details>"
            return f"{caption}\n\n{body}"


def _entry(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.strong else cell.text
    return " ".join((text, *cell.small)).replace("|", "\\|")


def _note(warnings: Sequence[str]) -> str:
    return "".join(f" (*{text}*)" for text in warnings)

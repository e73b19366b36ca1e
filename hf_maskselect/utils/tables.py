"""Tables as plain text and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned plain text: the first column left, numbers right."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return not text or text.replace(",", "").replace(".", "").replace("-", "").replace("e", "").isdigit()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown; the first column and those with words in them are left, numbers right."""
    columns = [[str(row[i]) for row in rows] for i in range(len(header))]
    numbers = [all(cell == "-" or cell.removeprefix("-")[:1].isdigit() for cell in column) for column in columns]
    lines = [header, ["---", *("---:" if right else "---" for right in numbers[1:])], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def without_section(text: str, heading: str) -> str:
    """A card without one section: its heading and what follows up to the next of the same level."""
    return re.sub(rf"\n*^{re.escape(heading)}\n.*?(?=\n+## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)

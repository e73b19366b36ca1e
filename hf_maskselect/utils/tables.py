"""Tables as plain text and as Markdown."""

import html
import re
from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a plain-text table: columns of numbers are right-aligned, the others left-aligned."""
    lines = [[visible(str(cell)) for cell in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_is_number, column[1:])) for column in columns]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table: columns of numbers after the first are right-aligned, the others left-aligned."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    columns = list(zip(*lines, strict=True))[1:]
    right = [all(cell == "-" or cell.removeprefix("-")[:1].isdigit() for cell in column[1:]) for column in columns]
    lines.insert(1, ["---", *("---:" if number else "---" for number in right)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def visible(text: str) -> str:
    """Return a text with its control characters written as escapes: it then stays on its line, in any terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def escaped(text: str) -> str:
    """Return a text, such as a name from a file, that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(visible(text), quote=False))


def code(text: object) -> str:
    """Return a text as code in Markdown, on one line."""
    shown = visible(str(text))
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest else f"`{shown}`"


def without_section(text: str, heading: str) -> str:
    """Remove a section from a model card: its heading and everything up to the next `## ` heading."""
    first, *others = f"\n{text}".split(f"\n{heading}\n")
    if not others:
        return text
    kept = [first.rstrip("\n")[1:]]
    for other in others:
        section, found, rest = other.partition("\n## ")
        kept.append(section[len(section.rstrip("\n")) :] + found + rest if found else "")
    return "".join([*(part.rstrip("\n") for part in kept[:-1]), kept[-1]])


def _is_number(text: str) -> bool:
    return not text or text.replace(",", "").replace(".", "").replace("-", "").replace("e", "").isdigit()

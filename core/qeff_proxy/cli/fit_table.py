"""Tables in a narrow terminal: no figure is cut, and names break at their separators only.

A table that is too wide first breaks its text columns, then leaves out figures of the least weight
and says which, and is stacked where that is not enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from qeff_proxy.common.messages import escape_controls

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Column, Table
    from rich.text import Text

#: Headings of columns that are left out where there is no room, the first one first.
_LEAST: tuple[str, ...] = (
    "mean",
    "cosine",
    "quickest",
    "slowest turn",
    "weights",
    "floor",
    "floor dB",
    "limit",
)
_LEAST += ("limit dB", "tokens", "passed", "seconds", "worst tensor", "SQNR dB")
#: Lines of a name in a cell, and the columns that a sentence needs.
_LINES = 2
_SENTENCE = 28
#: Where a line can end: after a space between words, and after a separator that is not part of
#: a number.
_SPACE = re.compile(r"(?<=\S\s)(?=\S)")
_SEPARATOR = re.compile(r"(?<=\w[/\\])(?<!\d[/\\])(?=\w)|(?<=\w[._/\\-])(?=[^\W\d_])")
#: Wider than any table.
_UNFOLDED = 100_000


def fit_table(table: Table, console: Console) -> list[RenderableType]:
    """The table as it is printed at the console's width, and a line for what is left out."""
    from rich.text import Text

    wide = console.options.update(max_width=_UNFOLDED)
    natural = console.measure(table, options=wide).maximum
    title = None if table.title is None else _text(table.title)
    if title is not None and not title.cell_len <= natural <= console.width:
        untitled = copy(table)  # rich would break the title's words
        untitled.title = None
        head = _broken_text(title, _pieces(title.plain), console.width)
        return [head, *fit_table(untitled, console)]
    if natural <= console.width:
        return [table]
    columns = [_Column(column) for column in table.columns]
    headings = [column.texts[0].plain for column in columns]
    droppable = [heading for heading in _LEAST if heading in headings]
    for count in range(len(droppable) + 1):
        left_out = droppable[:count]
        kept = [one for one, name in zip(columns, headings, strict=True) if name not in left_out]
        fitted = _broken(table, kept, console)
        if fitted is not None:
            said = ", ".join(sorted(left_out, key=headings.index))
            note = f"(no room for: {said}; a wider terminal and --json have more)"
            return [fitted, *([Text(note, "dim")] if left_out else [])]
    return list(_stacked(columns, console.width))


class _Column:
    """A column with its texts, the heading first, and the widths that it can have.

    A shape is the widths of a text's pieces, with and without the spaces at their ends.
    """

    def __init__(self, column: Column) -> None:
        from rich.cells import cell_len

        self.column = column
        self.texts = [_text(cell) for cell in (column.header, *column.cells)]
        self.pieces = [_pieces(text.plain) for text in self.texts]
        self.is_figure = column.justify == "right"
        if self.is_figure or column.no_wrap:
            self.pieces[1:] = [[text.plain] for text in self.texts[1:]]
        shapes = [
            tuple((cell_len(piece), cell_len(piece.rstrip())) for piece in pieces)
            for pieces in self.pieces
        ]
        self.shapes = set(shapes)
        self.natural = max(text.cell_len for text in self.texts)
        self.least = max(width for shape in shapes for _, width in shape)
        cells = [text.plain for text in self.texts[1:]]
        if any(len(pieces) > 1 and len("".join(pieces)) > _SENTENCE for pieces in self.pieces[1:]):
            self.least = max(self.least, _SENTENCE)
        names = {shape for shape, cell in zip(shapes[1:], cells, strict=True) if " " not in cell}
        while any(len(_line_starts(name, self.least)) > _LINES for name in names):
            self.least += 1

    def lines(self, width: int) -> int:
        """The most lines of a cell at a width."""
        return max(len(_line_starts(shape, width)) for shape in self.shapes)

    def broken(self, index: int, width: int) -> Column:
        """A copy whose texts have line ends; the ``index`` is that in its table."""
        texts = [_broken_text(*one, width) for one in zip(self.texts, self.pieces, strict=True)]
        made = replace(self.column, header=texts[0], no_wrap=True, min_width=None)
        made._index, made._cells = index, list(texts[1:])  # noqa: SLF001 (rich has no other way)
        return made


def _broken(table: Table, columns: list[_Column], console: Console) -> Table | None:
    """A table of these columns with line ends in their cells; None if they do not fit."""
    made = copy(table)
    made.columns = [column.broken(i, _UNFOLDED) for i, column in enumerate(columns)]
    wide = console.options.update(max_width=_UNFOLDED)
    frame = console.measure(made, options=wide).maximum - sum(one.natural for one in columns)
    widths = [column.least for column in columns]
    room = console.width - frame - sum(widths)
    if room < 0:
        return None
    for _ in range(room):  # the column whose cells have the most lines gets more
        short = [i for i, one in enumerate(columns) if widths[i] < one.natural]
        if not short:
            break
        index = max(
            short, key=lambda i: (columns[i].lines(widths[i]), widths[i] - columns[i].natural)
        )
        widths[index] += 1
    made.columns = [column.broken(i, widths[i]) for i, column in enumerate(columns)]
    return made


def _pieces(text: str) -> list[str]:
    """What a line ends between: short words of a sentence are whole."""
    words = _SPACE.split(text)
    return [
        piece
        for word in words
        for piece in (
            [word] if len(words) > 1 and len(word) <= _SENTENCE else _SEPARATOR.split(word)
        )
    ]


def _line_starts(shape: Sequence[tuple[int, int]], width: int) -> list[int]:
    """The indices of the pieces that begin a line."""
    starts = [0]
    used = 0
    for index, (whole, bare) in enumerate(shape):
        if used and used + bare > width:
            starts.append(index)
            used = 0
        used += whole
    return starts


def _broken_text(text: Text, pieces: Sequence[str], width: int) -> Text:
    from rich.cells import cell_len
    from rich.text import Text

    shape = [(cell_len(piece), cell_len(piece.rstrip())) for piece in pieces]
    starts = _line_starts(shape, width)[1:]
    lines = text.divide([len("".join(pieces[:start])) for start in starts])
    for line in lines:
        line.rstrip()
    return Text("\n").join(lines)


def _text(cell: RenderableType) -> Text:
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(escape_controls(str(cell)))


def _stacked(columns: list[_Column], width: int) -> Iterator[Text]:
    """Each row as lines of its own: a text on each, or as many figures as it holds."""
    from rich.text import Text

    for row in zip(*(column.texts[1:] for column in columns), strict=True):
        lines = [Text()]
        for column, cell in zip(columns, row, strict=True):
            if not cell.plain:
                continue
            heading = column.texts[0].plain
            item = Text(f"{heading}: " if heading else "").append(cell)
            full = lines[-1].cell_len + item.cell_len + 2 > width
            if lines[-1].plain and (full or not column.is_figure):
                lines.append(Text("  "))
            lines[-1].append(", " if lines[-1].plain.strip() else "").append(item)
        yield from (_broken_text(line, _pieces(line.plain), width) for line in lines if line.plain)

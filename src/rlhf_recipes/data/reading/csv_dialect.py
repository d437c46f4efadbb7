"""How a table is written: its delimiter and its quotes, found out on the whole file."""

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.encodings import open_text
from rlhf_recipes.data.reading.files import DataFile, Options, note

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
NAMELESS = re.compile(r"|Unnamed: [\d.]+|__index_level_\d+__")  # as pandas names the numbers of rows
QUOTE_AFTER_SPACE = re.compile(r'[,;|\t] +"')
SEPARATOR = re.compile(r"\ufeff?\"?sep=([,;|\t])\"?\s*", re.I)  # the first line that Excel reads as a command
SEEN = 10_000  # rows whose numbers are compared: a column of labels repeats itself sooner
STYLES: dict[str, dict[str, Any]] = {
    "standard": {"doublequote": True},
    "spaced": {"doublequote": True, "skipinitialspace": True},
    "escaped": {"doublequote": False, "escapechar": "\\"},
    "literal": {"quoting": csv.QUOTE_NONE},
}


@dataclass(frozen=True)
class Dialect:
    """A delimiter and what quotes mean: ``standard``, ``spaced`` (also after a space), ``escaped`` or ``literal``."""

    delimiter: str
    style: str = "standard"

    @property
    def delimiter_name(self) -> str:
        """Return the word for the delimiter."""
        return DELIMITERS[self.delimiter]

    @property
    def line(self) -> re.Pattern[str] | None:
        """Return what every line must match where ``csv`` itself is not strict: whole quotes, one line to a row."""
        if self.style != "escaped":
            return None
        cell = rf'(?:"(?:[^"\\]|\\["\\])*"|[^"\\{re.escape(self.delimiter)}]*)'
        return re.compile(rf"{cell}(?:{re.escape(self.delimiter)}{cell})*")

    def reader(self, lines: Iterable[str]) -> Any:
        """Return a strict ``csv.reader`` over the lines."""
        csv.field_size_limit(sys.maxsize)
        return csv.reader(_without_command(lines), delimiter=self.delimiter, strict=True, **STYLES[self.style])


@dataclass
class Survey:
    """What a pass over a table with one dialect found.

    Args:
        first: the cells of the first line.
        width: the number of cells of every row; 0 for an empty file.
        rows: the number of rows after the first line.
        problem: why the dialect does not fit; empty if it does.
        spanning: the number of rows that go over several lines.
        empty: places of nameless columns without any content.
        numeric: places of nameless columns that hold whole numbers only, each once.
        seen: such places and numbers, of the first rows.
        has_quotes, has_escapes, has_spaced_quotes: what the lines hold.
    """

    first: list[str] = field(default_factory=list)
    width: int = 0
    rows: int = 0
    problem: str = ""
    spanning: int = 0
    empty: set[int] = field(default_factory=set)
    numeric: set[int] = field(default_factory=set)
    seen: set[tuple[int, str]] = field(default_factory=set)
    has_quotes: bool = False
    has_escapes: bool = False
    has_spaced_quotes: bool = False


def choose_dialect(file: DataFile, options: Options, kind: str) -> tuple[Dialect, Survey]:
    """Return the dialect in which every row has as many cells as the first line, and the survey with it.

    Raises:
        UserError: there is none; the message names the first line that does not fit.
    """
    own = "\t" if kind == "tsv" else ","
    with open_text(file, options.encoding, "") as stream:
        header = next((line for line in stream if line.strip()), "")
    if announced := SEPARATOR.fullmatch(header):
        own, header = announced[1], announced[1]
    present = [each for each in (own, *DELIMITERS) if each in header] or [own]
    problems = []
    for delimiter in dict.fromkeys(present):
        standard = survey(file, options, Dialect(delimiter))
        chosen = _with_quotes(file, options, delimiter, standard, header)
        if chosen is not None:
            if delimiter != own and chosen[1].width > 1:
                note("%s: cells end at a %s", file.name, DELIMITERS[delimiter])
            return chosen
        problems.append(standard.problem)
    raise UserError(problems[0])


def survey(file: DataFile, options: Options, dialect: Dialect) -> Survey:
    """Read a table with one dialect, at most ``options.limit`` rows of it, and return what was found."""
    found = Survey()
    with open_text(file, options.encoding, "") as stream:
        reader = dialect.reader(_watched(stream, found, dialect.line))
        line = 0
        try:
            for cells in reader:
                if is_blank(cells, found.width):
                    continue
                if not found.first:
                    _start_(found, cells, options)
                    if not options.csv_columns:
                        line = reader.line_num
                        continue
                found.rows += 1
                found.spanning += reader.line_num > line + 1
                line = reader.line_num
                _add_(found, cells, options, file, line, dialect)
                if found.problem or found.rows == options.limit:
                    return found
        except csv.Error as error:
            found.problem = f"{file.name}, line {reader.line_num} cannot be read: {error}; fix the quotes of the line"
    return found


def ragged(file: DataFile, line: int, cells: int, names: Sequence[str], dialect: Dialect) -> str:
    """Say which line has too many or too few cells."""
    shown = ", ".join(short(name) for name in names)
    return (
        f"{file.name}, line {line}: {cells} cells, but there are {len(names)} columns ({shown}); "
        f"put a text that holds a {dialect.delimiter_name} in double quotes, or complete the line"
    )


def is_blank(cells: Sequence[str], width: int) -> bool:
    """Whether a line is no row: nothing, or white space where several cells are expected."""
    return not cells or (len(cells) == 1 and width > 1 and not cells[0].strip())


def _without_command(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines without a first one such as ``sep=;``; a blank line keeps its number."""
    for number, line in enumerate(lines):
        yield "\n" if number == 0 and SEPARATOR.fullmatch(line) else line


def short(cell: str) -> str:
    """Return a cell, abbreviated for a message."""
    return cell if len(cell) <= 40 else cell[:40] + "..."


def _watched(lines: Iterable[str], found: Survey, strictly: re.Pattern[str] | None) -> Iterator[str]:
    """Yield the lines, note in `found` which quotes they hold, and whether one does not match `strictly`."""
    for line in lines:
        if strictly is not None and not found.problem and not strictly.fullmatch(line.rstrip("\r\n")):
            found.problem = "a quote is within a cell"
        if '"' in line:
            found.has_quotes = True
            found.has_escapes = found.has_escapes or '\\"' in line
            found.has_spaced_quotes = found.has_spaced_quotes or QUOTE_AFTER_SPACE.search(line) is not None
        yield line


def _start_(found: Survey, cells: list[str], options: Options) -> None:
    found.first = cells
    found.width = len(options.csv_columns or cells)
    if not options.csv_columns:
        found.empty = {place for place, name in enumerate(cells) if NAMELESS.fullmatch(name.strip())}
        found.numeric = set(found.empty)


def _add_(found: Survey, cells: list[str], options: Options, file: DataFile, line: int, dialect: Dialect) -> None:
    """Add a row to the survey; a last cell that is empty in every row is a column without a name."""
    if found.rows == 1 and len(cells) == found.width + 1 and not cells[-1]:
        found.empty.add(found.width)
        found.width += 1
    named = len(options.csv_columns or found.first)
    if len(cells) != found.width or (found.width > named and cells[-1]):
        names = list(options.csv_columns or found.first)
        found.problem = ragged(file, line, len(cells), names, dialect)
        return
    found.empty -= {place for place in found.empty if cells[place].strip()}
    for place in list(found.numeric):
        if not cells[place].isdecimal() or (place, cells[place]) in found.seen:
            found.numeric.discard(place)
        elif found.rows < SEEN:
            found.seen.add((place, cells[place]))


def _with_quotes(
    file: DataFile, options: Options, delimiter: str, standard: Survey, header: str
) -> tuple[Dialect, Survey] | None:
    """Return the meaning of quotes that fits every row; None if none does."""
    if standard.problem:
        if not standard.has_quotes:
            return None
        possible = {"spaced": standard.has_spaced_quotes, "escaped": standard.has_escapes, "literal": True}
        styles = tuple(style for style, seen in possible.items() if seen)
    else:
        if not standard.has_quotes or standard.width == 1:
            return Dialect(delimiter), standard
        styles = (
            ("spaced",)
            if standard.has_spaced_quotes and f"{delimiter} " in header
            else ("literal",)
            if delimiter == "\t"
            else ()
        )
    for style in styles:
        dialect = Dialect(delimiter, style)
        found = survey(file, options, dialect)
        if found.problem or (
            not standard.problem and style == "literal" and not _are_text(file, options, standard, found)
        ):
            continue
        if style == "literal":
            note("%s: quotes are part of the text", file.name)
        return dialect, found
    return None if standard.problem else (Dialect(delimiter), standard)


def _are_text(file: DataFile, options: Options, standard: Survey, literal: Survey) -> bool:
    """Whether the quotes of a table with tabs belong to the text, although both readings give whole rows.

    A quote that would join whole lines is text. Otherwise, quotes around cells are no text if a cell needs them
    (it holds doubled quotes), or if they are around all cells of a column.
    """
    if standard.rows != literal.rows:
        return True
    quoted: dict[int, list[int]] = {}
    with (
        open_text(file, options.encoding, "") as one,
        open_text(file, options.encoding, "") as other,
    ):
        pairs = zip(Dialect("\t").reader(one), Dialect("\t", "literal").reader(other), strict=False)
        for number, (cells, raw) in enumerate(pairs):
            if number == 0 and not options.csv_columns:
                continue
            if options.limit is not None and number > options.limit:
                break
            for place, (cell, text) in enumerate(zip(cells, raw, strict=False)):
                counts = quoted.setdefault(place, [0, 0])
                if cell != text and '""' in text[1:-1]:
                    return False
                counts[0] += cell != text
                counts[1] += cell == text and bool(text)
    return any(enclosed and bare for enclosed, bare in quoted.values())

"""Rows of .csv and .tsv files: every cell is the string that is written there."""

import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.csv_dialect import NAMELESS, Dialect, Survey, choose_dialect, is_blank, ragged, short
from rlhf_recipes.data.reading.encodings import open_text
from rlhf_recipes.data.reading.files import DataFile, Options, note
from rlhf_recipes.data.reading.source import Row

LONGEST_NAME = 60  # characters; a longer cell of the first line is a text
NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*%?")


def csv_rows(file: DataFile, options: Options, kind: str) -> Callable[[], Iterator[Row]]:
    """Return a function that reads the rows of a table with a header line, or with ``options.csv_columns``.

    The delimiter and the meaning of quotes are those with which every row has as many cells as the header. A column of
    row numbers without a name, and an empty last column without a name, are left out with a line in the log.

    Args:
        kind: csv or tsv, which decides where the content does not.

    Raises:
        UserError: rows of different lengths with the line, a first line that is no header; here or as rows are read.
    """
    csv.field_size_limit(sys.maxsize)
    dialect, found = choose_dialect(file, options, kind)
    if not found.width:
        return lambda: iter(())
    names = _names(file, options, found)
    kept = _kept(file, names, found)
    return partial(_rows, file, options, dialect, names, kept, found.width)


def _names(file: DataFile, options: Options, found: Survey) -> list[str]:
    """Return the names of the columns, one per cell."""
    header = [cell.strip() for cell in found.first]
    if options.csv_columns:
        names = list(options.csv_columns)
        if [cell.lower() for cell in header] == [name.lower() for name in names]:
            raise UserError(f"{file.name} has a header line with the names of --csv_columns; leave --csv_columns out")
    else:
        names = header
        for cell in names:
            if len(cell) > LONGEST_NAME or cell[-1:] in tuple(".?!。？！") or NUMBER.fullmatch(cell):
                raise UserError(
                    f"{file.name} seems to have no header line: its first line holds {short(cell)!r}; name its "
                    f"{len(names)} columns with --csv_columns, or write a header line with short names"
                )
    doubled = next((name for name in names if name and names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{file.name} has two columns named {doubled!r}; rename one")
    return names + [""] * (found.width - len(names))


def _kept(file: DataFile, names: Sequence[str], found: Survey) -> list[int]:
    """Return the places of the columns that are read: those with a name, unless they only number the rows."""
    kept = []
    for place, name in enumerate(names):
        nameless = NAMELESS.fullmatch(name)
        what = "empty" if place in found.empty else "the numbers of the rows" if place in found.numeric else None
        if nameless and what and (place == 0 or what == "empty" or name):
            note("%s: column %d (%s) is %s and is left out", file.name, place + 1, name or "no name", what)
        elif not name:
            raise UserError(f"{file.name}: column {place + 1} has no name; name it in the first line")
        else:
            kept.append(place)
    return kept


def _rows(
    file: DataFile, options: Options, dialect: Dialect, names: Sequence[str], kept: Sequence[int], width: int
) -> Iterator[Row]:
    columns = [(place, names[place]) for place in kept]
    skip = not options.csv_columns
    with open_text(file, options.encoding, "") as stream:
        reader = dialect.reader(stream)
        try:
            for cells in reader:
                if is_blank(cells, width):
                    continue
                if skip:
                    skip = False
                    continue
                if len(cells) != width:
                    raise UserError(ragged(file, reader.line_num, len(cells), names, dialect))
                yield {name: cells[place] for place, name in columns}
        except csv.Error as error:
            raise UserError(f"{file.name}, line {reader.line_num} cannot be read: {error}; fix the line") from None

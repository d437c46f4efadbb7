"""Rows of .txt files: a line, a paragraph or a whole document each."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.encodings import open_text
from rlhf_recipes.data.reading.files import DataFile, Options, note
from rlhf_recipes.data.reading.source import Row

TEXT_BY = ("auto", "line", "paragraph", "document")
SEPARATOR = "<|endoftext|>"
HEADING = re.compile(r" = .+ = \s*")  # of WikiText
CHUNK = 1 << 20


@dataclass
class _Survey:
    """Counts over text files."""

    lines: int = 0  # with text
    paragraphs: int = 0
    longest: int = 0  # lines of the longest paragraph
    documents: int = 0
    multiline_files: int = 0
    headings: int = 0
    has_separator: bool = False


def text_rows(files: Sequence[DataFile], options: Options) -> list[Callable[[], Iterator[Row]]]:
    """Return, for each .txt file of a split, a function that reads its rows, each with the column ``text``.

    White space alone is no row. The text ``<|endoftext|>`` ends a row whatever `options.text_by` is.

    Raises:
        UserError: with ``auto``, lines and documents are both possible; the message counts what each choice gives.
    """
    if options.text_by not in TEXT_BY:
        raise UserError(f"text_by is {options.text_by!r}; choose one of {', '.join(TEXT_BY)}")
    by = options.text_by if options.text_by != "auto" else _choose(files, options)
    return [partial(_rows, file, options.encoding, by) for file in files]


def _choose(files: Sequence[DataFile], options: Options) -> str:
    survey = _Survey()
    for file in files:
        _count_(survey, file, options)
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    if survey.has_separator:
        return "document"
    ambiguous_files = len(files) > 1 and survey.multiline_files and not _are_shards(files)
    if (survey.longest > 1 and survey.paragraphs > len(files)) or ambiguous_files:
        title = "headings of WikiText and " if survey.headings else ""
        raise UserError(
            f"{name} has {title}several lines to a block: pass --text_by line ({survey.lines:,} rows), "
            f"paragraph ({survey.paragraphs:,} rows) or document ({survey.documents:,} rows)"
        )
    if survey.lines > 1:
        note("%s: %s lines, one row each; --text_by paragraph or document changes this", name, f"{survey.lines:,}")
    return "line"


def _count_(survey: _Survey, file: DataFile, options: Options) -> None:
    """Add the counts of a file; stop at a separator."""
    block = lines = 0
    with open_text(file, options.encoding) as stream:
        for line in stream:
            if SEPARATOR in line:
                survey.has_separator = True
                return
            block = block + 1 if line.strip() else 0
            lines += block > 0
            survey.paragraphs += block == 1
            survey.headings += HEADING.fullmatch(line) is not None
            survey.longest = max(survey.longest, block)
    survey.lines += lines
    survey.documents += lines > 0
    survey.multiline_files += lines > 1


def _are_shards(files: Sequence[DataFile]) -> bool:
    return all(re.search(r"[-_.]of[-_.]?\d|part[-_.]?\d", file.name.rsplit("/", 1)[-1]) for file in files)


def _rows(file: DataFile, encoding: str | None, by: str) -> Iterator[Row]:
    with open_text(file, encoding) as stream:
        if by == "document":
            for document in _documents(stream):
                if document.strip():
                    yield {"text": document.strip("\n")}
            return
        paragraph: list[str] = []
        for line in stream:
            for index, piece in enumerate(line.rstrip("\n").split(SEPARATOR)):
                ends = index > 0 or not piece.strip() or by == "line"
                if ends and paragraph:
                    yield {"text": "\n".join(paragraph)}
                    paragraph = []
                if piece.strip():
                    paragraph.append(piece)
        if paragraph:
            yield {"text": "\n".join(paragraph)}


def _documents(stream: Iterator[str]) -> Iterator[str]:
    """Split a text at the separator, with one document in memory at a time."""
    pieces: list[str] = []
    for line in stream:
        first, *others = line.split(SEPARATOR)
        pieces.append(first)
        for other in others:
            yield "".join(pieces)
            pieces = [other]
    yield "".join(pieces)

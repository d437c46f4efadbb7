"""Rows of JSON files: one object per line, an array of objects, or one object that holds the rows."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.encodings import open_text
from rlhf_recipes.data.reading.files import DataFile, Options
from rlhf_recipes.data.reading.json_documents import document_rows, document_splits
from rlhf_recipes.data.reading.source import Row

CHUNK = 1 << 20
SPACE = re.compile(r"\s*")
ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def json_rows(file: DataFile, options: Options, split: str) -> Callable[[], Iterator[Row]]:
    """Return a function that reads the rows of a JSON file; of a file with several splits, those of `split`.

    Values stay as they are written: dates and digits in quotes are strings, ``NaN`` is a float.

    Raises:
        UserError: invalid JSON with its line, a value that is no row; here or as the rows are read.
    """
    shape, _ = _shape(file, options)
    if shape == "document":
        return partial(_document, file, options, split)
    return partial({"lines": _lines, "array": _array, "empty": _nothing}[shape], file, options)


def splits_inside(file: DataFile, options: Options) -> list[str] | None:
    """Return the splits that a JSON file such as ``{"train": [...], "test": [...]}`` holds; None for other files."""
    shape, document = _shape(file, options)
    return document_splits(document) if shape == "document" else None


def _shape(file: DataFile, options: Options) -> tuple[str, Any]:
    """Return how the file is laid out (lines, array, document, empty), and the document."""
    with open_text(file, options.encoding, "\n") as stream:
        number, line = _next_line(stream, 0)
        start = line.lstrip()[:1]
        if not start:
            return "empty", None
        if start == "[":
            return "array", None
        if start != "{":
            raise UserError(
                f"{file.name}, line {number}: {_excerpt(line)} is not JSON; each line must be an object such as "
                '{"text": "..."}, or give the file the ending that fits its content'
            )
        try:
            value = _parse(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            if error.pos < len(line.rstrip()):
                raise _invalid(file, number, error) from None
            return "document", _whole(file, line + stream.read(), number)
        except _Refused as error:
            raise UserError(f"{file.name}, line {number}: {error}") from None
        if _next_line(stream, number)[1]:
            return "lines", None
        return "document", value


def _document(file: DataFile, options: Options, split: str) -> Iterator[Row]:
    shape, document = _shape(file, options)
    if shape != "document":
        raise UserError(f"{file.name} was changed while it was read; run again")
    return document_rows(document, file, split)


def _nothing(file: DataFile, options: Options) -> Iterator[Row]:
    return iter(())


def _lines(file: DataFile, options: Options) -> Iterator[Row]:
    with open_text(file, options.encoding, "\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    value = _parse(line.rstrip("\r\n"))
                except json.JSONDecodeError as error:
                    raise _invalid(file, number, error) from None
                except _Refused as error:
                    raise UserError(f"{file.name}, line {number}: {error}") from None
                yield _row(value, file, number)


def _array(file: DataFile, options: Options) -> Iterator[Row]:
    """Read an array of objects element by element, so that one element at a time is in memory."""
    with open_text(file, options.encoding) as stream:
        text = _Text(file, stream)
        text.skip()
        text.place += 1  # the bracket
        sign = text.skip()
        while sign != "]":
            value = text.value()
            if not isinstance(value, dict):
                _row(value, file, text.line())
            yield value
            sign = text.skip()
            if sign == ",":
                text.place += 1
                text.skip()
            elif sign != "]":
                raise UserError(f"{file.name}, line {text.line()}: a comma is missing between two elements; add it")
        text.place += 1
        if text.skip(required=False):
            raise UserError(
                f"{file.name}: something follows the first array; write one object per line, such as "
                '{"messages": [...]}, or one array of objects'
            )


class _Text:
    """A JSON text that is read in chunks; `place` is where parsing goes on in the part that is in memory."""

    def __init__(self, file: DataFile, stream: TextIO) -> None:
        self.file, self.stream = file, stream
        self.text, self.place, self.lines = "", 0, 1

    def line(self) -> int:
        """Return the number of the current line."""
        return self.lines + self.text.count("\n", 0, self.place)

    def skip(self, required: bool = True) -> str:
        """Move to the next character that is no white space, and return it; an empty string at the end."""
        while True:
            self.place = _after_space(self.text, self.place)
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._read(CHUNK):
                if required:
                    raise self._incomplete()
                return ""

    def value(self) -> Any:
        """Parse the value that begins here, reading on until it is complete, and move behind it."""
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                _require_whole_characters(self.text[self.place : end], value)
                self.place = end
                return value
            except json.JSONDecodeError as error:
                if not self._read(size):
                    self.place = error.pos
                    if error.pos >= len(self.text.rstrip()):
                        raise self._incomplete() from None
                    raise _invalid(self.file, self.line(), error) from None
            except RecursionError:
                raise UserError(f"{self.file.name}, line {self.line()}: nested too deeply; flatten it") from None
            except ValueError as error:
                raise UserError(f"{self.file.name}, line {self.line()}: {str(error).split(';')[0]}") from None
            size *= 2

    def _read(self, size: int) -> bool:
        more = self.stream.read(size)
        if more:
            self.lines = self.line()
            self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)

    def _incomplete(self) -> UserError:
        return UserError(f"{self.file.name}: the array has no end; the file is incomplete, copy or download it again")


def _whole(file: DataFile, text: str, first: int) -> Any:
    """Parse a document that goes on over several lines; `first` is the number of its first line."""
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            raise UserError(
                f"{file.name}, line {first + error.lineno - 1}: a second object begins, but the first one goes over "
                "several lines; write one object per line (jq -c . FILE), or one array"
            ) from None
        raise _invalid(file, first + error.lineno - 1, error) from None
    except _Refused as error:
        raise UserError(f"{file.name}: {error}") from None


def _row(value: Any, file: DataFile, line: int) -> Row:
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a string" if isinstance(value, str) else repr(value)[:30]
        raise UserError(
            f"{file.name}, line {line}: {kind} is not a row; write an object with names, such as "
            '{"messages": [...]} or {"text": "..."}'
        )
    return value


class _Refused(ValueError):
    """JSON that Python accepts, but that loses something or cannot be used later."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"an object has the key {double!r} twice; keep one")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parse(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
        _require_whole_characters(text, value)
        return value
    except RecursionError:
        raise _Refused("it is nested too deeply; flatten it") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise _Refused(str(error).split(";")[0]) from None


def _require_whole_characters(text: str, value: Any) -> None:
    """Refuse halves of characters (lone surrogates), which no tokenizer can encode."""
    if ESCAPED_HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("half of a character (a lone \\ud800-\\udfff); remove it") from None


def _invalid(file: DataFile, line: int, error: json.JSONDecodeError) -> UserError:
    reason = (error.msg[:1].lower() + error.msg[1:]).removesuffix(" at")
    return UserError(f"{file.name}, line {line}, column {error.colno} cannot be read as JSON: {reason}; fix the line")


def _next_line(stream: TextIO, number: int) -> tuple[int, str]:
    """Return the number and the text of the next line that is not blank; an empty text at the end."""
    for line in iter(stream.readline, ""):
        number += 1
        if line.strip():
            return number, line
    return number, ""


def _after_space(text: str, place: int) -> int:
    match = SPACE.match(text, place)
    return match.end() if match else place


def _excerpt(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 40 else line[:40] + "...")

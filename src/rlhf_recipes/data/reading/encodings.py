"""Encodings of text files: marks at the start, UTF-16 without one, and a proposal where UTF-8 does not fit."""

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import DataFile, open_bytes, read_head

MARKS = (  # the mark of UTF-32 begins with the one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CHUNK = 1 << 20
EXCERPT = 24  # characters
GOOD = 0.5  # a proposal's share of plausible characters


@contextmanager
def open_text(file: DataFile, encoding: str | None, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading; without `encoding`, marks, UTF-8 and UTF-16 are recognized.

    Raises:
        UserError: an unknown encoding, or bytes that it cannot decode, here or as the text is read.
    """
    codec = choose_encoding(read_head(file), encoding, file.name)
    try:
        with open_bytes(file) as stream:
            yield io.TextIOWrapper(stream, encoding=codec, newline=newline)
    except UnicodeError:
        raise _undecodable(file, codec, encoding) from None


def choose_encoding(head: bytes, requested: str | None, name: str) -> str:
    """Return the codec for a text that starts with `head`; `name` is what messages call the file.

    Raises:
        UserError: no such encoding, or one that the mark at the start contradicts.
    """
    marked = next((codec for mark, codec in MARKS if head.startswith(mark)), None)
    if requested is None:
        return marked or _wide(head) or "utf-8"
    try:
        "".encode(requested)
        wanted = codecs.lookup(requested).name
    except (LookupError, ValueError):
        raise UserError(f"encoding {requested!r} is unknown; give one such as utf-8, gb18030 or latin-1") from None
    if marked is None:
        return "utf-8" if wanted == "utf-8-sig" else wanted
    if not wanted.startswith(marked.removesuffix("-sig")):
        kind = marked.removesuffix("-sig")
        raise UserError(f"{name} starts with the mark of {kind}, but --encoding is {requested}; leave --encoding out")
    return marked


def _wide(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 where zero bytes are at the places of ASCII characters."""
    whole = head[: len(head) // 4 * 4]
    zero = [whole[place::4].count(0) / max(1, len(whole) // 4) for place in range(4)]
    if min(zero[1:]) > 0.5 > zero[0]:
        return "utf-32-le"
    if min(zero[:3]) > 0.5 > zero[3]:
        return "utf-32-be"
    even, odd = (zero[0] + zero[2]) / 2, (zero[1] + zero[3]) / 2
    if max(even, odd) > 0.5 and min(even, odd) < max(even, odd) / 20:
        return "utf-16-le" if odd > even else "utf-16-be"
    return None


def _undecodable(file: DataFile, codec: str, requested: str | None) -> UserError:
    """Return the error for a file that `codec` cannot decode: where, and which encodings fit."""
    offset, line, sample = _first_failure(file, codec)
    said = requested or codec.removesuffix("-sig")
    where = f"{file.name}, line {line}: byte {offset} is not {said}"
    proposals = _wide_proposals(read_head(file)) or ([] if sample is None else _proposals(sample, codec))
    if not proposals:
        return UserError(f"{where}; pass --encoding with the file's encoding, or save it as UTF-8")
    shown = " or ".join(f"--encoding {name} (it reads {text!r})" for name, text in proposals)
    return UserError(f"{where}; pass {shown}, or save it as UTF-8")


def _first_failure(file: DataFile, codec: str) -> tuple[int, int, bytes | None]:
    """Return the offset and the line of the first byte that is no `codec`, and bytes from that line on."""
    decoder = codecs.getincrementaldecoder(codec)()
    offset, line, kept = 0, 1, b""
    with open_bytes(file) as stream:
        while True:
            chunk = stream.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                start = len(kept) - pending + getattr(error, "start", 0)
                text = kept + chunk
                begin = text.rfind(b"\n", 0, start) + 1
                sample = text[begin:] + stream.read(CHUNK // 16)
                return offset - len(kept) + start, line + text.count(b"\n", 0, start), sample
            if not chunk:
                return offset, line, None
            text = kept + chunk
            keep = text.rfind(b"\n") + 1  # the last line may go on in the next chunk
            keep = keep if keep and len(text) - keep < CHUNK else max(0, len(text) - 4096)
            line += text.count(b"\n", 0, keep)
            offset, kept = offset + len(chunk), text[keep:]


def _proposals(sample: bytes, failed: str) -> list[tuple[str, str]]:
    """Return at most three encodings that fit the bytes, the most probable first, each with what the text would read."""
    sample = sample[: 1 << 16]
    scored: list[tuple[float, str, str]] = []
    for name, plausible in PLAUSIBLE.items():
        text = _decoded(sample, name)
        if text is None or name == failed:
            continue
        places = [place for place, letter in enumerate(text) if letter > "\x7f"]
        score = sum(plausible(text, place) for place in places) / max(1, len(places))
        start = max(0, places[0] - EXCERPT // 2) if places else 0
        scored.append((score, name, " ".join(text[start : start + EXCERPT].split())))
    scored.sort(key=lambda each: -each[0])  # a stable sort: ties keep the order of the table
    return [(name, text) for score, name, text in scored[:3] if score >= max(GOOD, 0.7 * scored[0][0])]


def _wide_proposals(head: bytes) -> list[tuple[str, str]]:
    """Return UTF-16 for text with few ASCII characters, which zero bytes do not give away."""
    for name in ("utf-16-le", "utf-16-be"):
        text = _decoded(head[:CHUNK], name)
        plausible = sum("\t" <= letter <= "~" or _simplified(letter) for letter in text or "")
        if text and plausible > 0.8 * len(text):
            return [(name, " ".join(text[:EXCERPT].split()))]
    return []


def _decoded(sample: bytes, name: str) -> str | None:
    """Decode bytes whose last character may be incomplete; None if they do not fit."""
    try:
        return codecs.getincrementaldecoder(name)().decode(sample)
    except UnicodeError:
        return None


def _in_rows(codec: str, first: int, last: int) -> Callable[[str], bool]:
    """Return whether a character's two bytes in `codec` are in the rows of its most common characters."""

    def common(letter: str) -> bool:
        try:
            code = letter.encode(codec)
        except UnicodeError:
            return False
        return len(code) == 2 and first <= int.from_bytes(code, "big") <= last

    return common


_simplified = _in_rows("gb2312", 0xB0A1, 0xD7F9)


def _chinese(codec: str, first: int, last: int) -> Callable[[str, int], float]:
    common = _in_rows(codec, first, last)
    return lambda text, place: 1.0 if text[place] in "，。、？！：；（）《》“”「」…—" or common(text[place]) else 0.0


def _japanese(codec: str, first: int, last: int) -> Callable[[str, int], float]:
    common = _in_rows(codec, first, last)

    def plausible(text: str, place: int) -> float:
        letter = text[place]
        kana = "\u3040" <= letter <= "\u30ff" or letter in "、。"
        near = any("\u3040" <= other <= "\u309f" for other in text[max(0, place - 8) : place + 9])
        return 1.01 if kana else 1.01 if near and common(letter) else 0.6 if common(letter) else 0.0

    return plausible


def _korean(text: str, place: int) -> float:
    spaced = any(other == " " for other in text[max(0, place - 9) : place + 10])
    return (1.01 if spaced else 0.8) if "\uac00" <= text[place] <= "\ud7a3" else 0.0


def _cyrillic(text: str, place: int) -> float:
    letter, before = text[place], text[place - 1 : place]
    if not ("\u0410" <= letter <= "\u044f" or letter in "ёЁ"):
        return 0.9 if letter in "«»—–“”„…№" else 0.0
    capital_inside = letter.isupper() and before.islower()
    return 0.0 if capital_inside or ("a" <= before.lower() <= "z") else 1.0


def _western(text: str, place: int) -> float:
    letter, around = text[place], text[max(0, place - 1) : place + 2].replace(text[place], "", 1)
    if letter in "‘’“”–—…€«»„•°£§":
        return 0.95
    if not letter.isalpha() or letter in "ªº":
        return 0.6 if letter in "¿¡ªº" else 0.0
    crowded = len(around) == 2 and all(other > "\x7f" for other in around)
    capital_inside = letter.isupper() and text[place - 1 : place].islower()
    return 0.0 if crowded or capital_inside else 0.99


PLAUSIBLE: dict[str, Callable[[str, int], float]] = {
    "shift_jis": _japanese("shift_jis", 0x889F, 0x9872),
    "euc_jp": _japanese("euc_jp", 0xB0A1, 0xCFD3),
    "euc_kr": _korean,
    "big5": _chinese("big5", 0xA440, 0xC67E),
    "gb18030": _chinese("gb2312", 0xB0A1, 0xD7F9),
    "cp1251": _cyrillic,
    "cp1252": _western,
    "latin-1": lambda text, place: 0.0 if "\x80" <= text[place] <= "\x9f" else 0.9 * _western(text, place),
}

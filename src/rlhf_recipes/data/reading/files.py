"""One data file: what its name says, what its content says, and its bytes without compression."""

import bz2
import gzip
import logging
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import is_main_process

logger = logging.getLogger(__name__)

# Ending -> format. A compression ending may follow each.
FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jl", ".json"), "json"),
    **dict.fromkeys((".csv",), "csv"),
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    **dict.fromkeys((".txt", ".text"), "text"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".zip")
KNOWN = ".jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow (also .gz, .bz2, .xz, .zst, .zip)"
TABLES = "save the sheet as .csv (UTF-8)"
CONVERT = "convert it to .jsonl or .parquet"
UNPACK = "unpack it and give the folder"
# Ending -> (what the file is, what to do).
REFUSED = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), ("a spreadsheet", TABLES)),
    **dict.fromkeys((".pkl", ".pickle"), ("a pickle, which can run code as it is read", CONVERT)),
    **dict.fromkeys((".pt", ".pth", ".bin", ".safetensors", ".gguf", ".ckpt"), ("made of tensors, not rows", CONVERT)),
    **dict.fromkeys((".npy", ".npz"), ("a NumPy array", CONVERT)),
    **dict.fromkeys((".docx", ".odt", ".rtf", ".pdf", ".epub"), ("a document", "save its text as .txt or .jsonl")),
    **dict.fromkeys((".html", ".htm", ".xml"), ("a page with markup", "extract its text to .jsonl")),
    **dict.fromkeys((".yaml", ".yml", ".toml"), ("a configuration file", CONVERT)),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), ("a database", "export the table as .csv or .jsonl")),
    **dict.fromkeys(
        (".h5", ".hdf5", ".orc", ".avro", ".msgpack", ".tfrecord", ".lance"), ("of another format", CONVERT)
    ),
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), ("an archive", UNPACK)),
}
# First bytes -> format, or (what the file is, what to do).
MAGIC: tuple[tuple[bytes, str | tuple[str, str]], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
    (b"FEA1", "arrow"),
    (b"PK\x03\x04", "zip"),
    (
        b"version https://git-lfs.github.com",
        ("a pointer of Git LFS, not the data", "run `git lfs pull` in its repository"),
    ),
    (b"%PDF", REFUSED[".pdf"]),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ("an old Office file", TABLES)),
    (b"\x93NUMPY", REFUSED[".npy"]),
    (b"\x89HDF", REFUSED[".h5"]),
    (b"SQLite format 3", REFUSED[".db"]),
    (b"7z\xbc\xaf", REFUSED[".7z"]),
    (b"Rar!", REFUSED[".rar"]),
    (b"GGUF", REFUSED[".gguf"]),
    (b"Obj\x01", REFUSED[".avro"]),
    (b"ORC", REFUSED[".orc"]),
    (b"\x80\x02}", REFUSED[".pkl"]),
    (b"\x80\x03", REFUSED[".pkl"]),
    (b"\x80\x04\x95", REFUSED[".pkl"]),
    (b"\x80\x05\x95", REFUSED[".pkl"]),
    (b"\x89PNG", ("an image", "give a file with text")),
    (b"\xff\xd8\xff", ("an image", "give a file with text")),
)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
ENDING_OF = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4", ".zip": "zip"}
HTML = (b"<!doctype html", b"<html", b"<?xml")


@dataclass(frozen=True)
class DataFile:
    """A file, or a member of a .zip archive.

    Args:
        path: the file or the archive.
        member: the name within the archive; empty for a file.
    """

    path: Path
    member: str = ""

    @property
    def name(self) -> str:
        """What messages call the file."""
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def is_plain(self) -> bool:
        """Whether the bytes on the disk are the content."""
        return not self.member and _compression(_head(self.path)) is None


@dataclass(frozen=True)
class Options:
    """How files are read.

    Args:
        encoding: of text files; None: found out.
        text_by: what one row of a .txt file is: line, paragraph, document or auto.
        csv_columns: names of the columns of tables without a header line.
        limit: examine only so many rows before reading; None: all of them.
    """

    encoding: str | None = None
    text_by: str = "auto"
    csv_columns: Sequence[str] | None = None
    limit: int | None = None


def note(message: str, *values: Any) -> None:
    """Log, on the main process only, what was decided for the user."""
    if is_main_process():
        logger.warning(message, *values)


def data_ending(name: str) -> tuple[str, str]:
    """Split a file's name into its stem and the ending of a data file: ``a.jsonl.gz`` -> ``a``, ``.jsonl.gz``.

    The ending is empty if the name has no known one.
    """
    stem, compression = _without(name, COMPRESSIONS)
    stem, ending = _without(stem, tuple(FORMATS))
    if ending or compression == ".zip":
        return stem, ending + compression
    return name, ""


def format_by_name(name: str) -> str | None:
    """Return the format that a file's name announces; None if it announces none."""
    _, ending = _without(_without(name, COMPRESSIONS)[0], tuple(FORMATS))
    return FORMATS.get(ending)


def refuse_by_name(name: str, label: str) -> None:
    """Raise UserError if the ending of `name` is one of a format that is not read; `label` is what messages call it."""
    for ending in {Path(name).suffix.lower(), Path(_without(name, COMPRESSIONS)[0]).suffix.lower()}:
        if ending in REFUSED:
            kind, fix = REFUSED[ending]
            raise UserError(f"{label} is {kind}; {fix}")


def format_of(file: DataFile) -> str:
    """Return how a file is read: json, csv, tsv, text, parquet, arrow or zip. The content decides over the name.

    Raises:
        UserError: a format that is not read, a pointer or web page in place of data, an unknown ending.
    """
    name = Path(file.member or file.path).name
    announced = format_by_name(name)
    head = read_head(file)
    found = _format_by_content(head)
    if isinstance(found, tuple):
        raise UserError(f"{file.name} is {found[0]}; {found[1]}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(HTML):
        if announced != "text":
            raise UserError(f"{file.name} holds a web page, not data; download the file itself")
        note("%s holds a web page: its markup is part of the text", file.name)
    if found is not None:
        if found == "zip":
            _refuse_office(file)
        elif announced not in (None, found):
            note("%s is read as %s, whatever its ending says", file.name, found)
        return found
    refuse_by_name(name, file.name)
    if announced is None:
        raise UserError(f"data file {file.name} has no known ending; rename it to one of {KNOWN}")
    if announced in ("parquet", "arrow"):
        kind = {"parquet": "a Parquet", "arrow": "an Arrow"}[announced]
        start = f"it starts with {head[:30].decode('utf-8', 'replace')!r}" if head else "it is empty"
        fix = "rename it to .jsonl" if head.lstrip()[:1] in (b"{", b"[") else "copy or download it again"
        raise UserError(f"{file.name} is not {kind} file: {start}; {fix}")
    return announced


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """Open the content of a file for reading from its start, without its compression.

    Raises:
        UserError: the file cannot be opened, or its compression is damaged, here or as it is read.
    """
    with ExitStack() as stack, _readable(file):
        raw: Any
        if file.member:
            raw = stack.enter_context(stack.enter_context(zipfile.ZipFile(file.path)).open(file.member))
        else:
            raw = stack.enter_context(file.path.open("rb"))
        compression = _compression(raw.peek(8)[:8])
        _require_announced(file, compression)
        yield _decompressed(raw, compression, stack)


def read_head(file: DataFile, size: int = 4096) -> bytes:
    """Return the first `size` bytes of the content, without compression."""
    with open_bytes(file) as stream:
        return stream.read(size)


def _without(name: str, endings: Sequence[str]) -> tuple[str, str]:
    ending = Path(name).suffix
    return (name[: -len(ending)], ending.lower()) if ending.lower() in endings else (name, "")


def _format_by_content(head: bytes) -> str | tuple[str, str] | None:
    if head[257:262] == b"ustar":
        return REFUSED[".tar"]
    return next((found for magic, found in MAGIC if head.startswith(magic)), None)


def _refuse_office(file: DataFile) -> None:
    """Raise UserError for documents, arrays and weights that are .zip archives inside."""
    if file.member:
        raise UserError(f"{file.name} is an archive in an archive; {UNPACK}")
    try:
        with zipfile.ZipFile(file.path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{file.name} cannot be unpacked: {error}; copy or download it again") from None
    if any(name in ("[Content_Types].xml", "mimetype") for name in names):
        raise UserError(f"{file.name} is an office document or a spreadsheet; {TABLES}, or its text as .txt")
    if any(name.endswith(".npy") for name in names):
        raise UserError(f"{file.name} is {REFUSED['.npz'][0]}; {CONVERT}")
    if any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{file.name} is {REFUSED['.pt'][0]}; {CONVERT}")


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8)


def _compression(head: bytes) -> str | None:
    return next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)


def _require_announced(file: DataFile, compression: str | None) -> None:
    """Raise UserError if the name announces a compression that the content does not have."""
    announced = ENDING_OF.get(Path(file.member or file.path).suffix.lower())
    if announced not in (None, "zip") and compression != announced:
        raise UserError(f"{file.name} is not {announced} data; copy or download it again, or correct its ending")


def _decompressed(raw: Any, compression: str | None, stack: ExitStack) -> Any:
    if compression == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=raw))
    if compression == "bz2":
        return stack.enter_context(bz2.BZ2File(raw))
    if compression == "xz":
        return stack.enter_context(lzma.LZMAFile(raw))
    if compression is not None:
        import pyarrow

        return stack.enter_context(pyarrow.CompressedInputStream(raw, compression))
    return raw


@contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """Within this block, failures to open or decompress `file` are UserErrors."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise UserError(f"{file.name} cannot be decompressed: {error}; copy or download it again") from None
    except (OSError, RuntimeError, NotImplementedError) as error:
        reason = str(getattr(error, "strerror", None) or error).strip().splitlines()[0]
        raise UserError(f"{file.name} cannot be read: {reason}; copy or download it again") from None

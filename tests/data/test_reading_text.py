"""Text files: encodings, and what one row of a .txt file is."""

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import encodings, open_source

SAMPLES = {
    "gb18030": ["春天来了，花开了。", "我们在学习机器学习的基本方法，今天天气很好。", "请问这个问题怎么回答？"],
    "big5": ["春天來了，花開了。", "請問這個問題怎麼回答？", "我們今天學習語言模型。"],
    "shift_jis": ["春が来ました。", "これは日本語の文章です。", "ありがとうございます"],
    "euc_jp": ["春が来ました。", "これは日本語の文章です。", "ありがとうございます"],
    "euc_kr": ["봄이 왔습니다. 꽃이 피었습니다.", "이것은 한국어 문장입니다."],
    "cp1251": ["Весна пришла, цветы расцвели.", "Москва — столица России"],
    "cp1252": [
        "Où est le café ?",
        "Près de l’église – à gauche.",
        "Der Bär läuft über die Straße",
        "“quoted”",
        "El niño comió piña",
    ],
}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in SAMPLES.items() for text in texts])
def test_the_right_encoding_is_proposed_first_and_then_works(tmp_path: Path, encoding: str, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ascii"}\n' + f'{{"text": "{text}"}}\n'.encode(encoding))
    with pytest.raises(UserError, match=rf"line 2: byte \d+ is not utf-8; pass --encoding {encoding} "):
        open_source(str(path), "train")
    assert [row["text"] for row in open_source(str(path), "train", encoding=encoding)] == ["ascii", text]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(("name", "start"), [("a.csv", "text\n"), ("a.tsv", "text\n"), ("a.txt", "")])
def test_unicode_is_recognized(tmp_path: Path, name: str, start: str, encoding: str, streaming: bool) -> None:
    lines = ["plain words", "café 三 🙂", "more plain words"]
    (tmp_path / name).write_bytes((start + "\n".join(lines) + "\n").encode(encoding))
    for requested in (None, encoding):
        source = open_source(str(tmp_path / name), "train", encoding=requested, streaming=streaming)
        assert [row["text"] for row in source] == lines


def test_where_the_encoding_ends_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    for chunk in (3, 7, 1 << 20):
        monkeypatch.setattr(encodings, "CHUNK", chunk)
        path.write_bytes("é\n".encode() * 20 + b"caf\xe9\n")
        with pytest.raises(UserError, match="line 21: byte 63 is not utf-8"):
            open_source(str(path), "train")


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"plain", "utf-99", "encoding 'utf-99' is unknown"),
        (b"plain", "base64", "encoding 'base64' is unknown"),
        ("é".encode("utf-16"), "gb18030", "starts with the mark of utf-16"),
        ("caf\xe9".encode("latin-1"), "utf-8", "line 1: byte 3 is not utf-8"),
        ("caf\xe9".encode("latin-1"), "ascii", "line 1: byte 3 is not ascii"),
    ],
)
def test_a_requested_encoding_is_used_strictly(tmp_path: Path, content: bytes, encoding: str, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "a.txt"), "train", encoding=encoding)


def rows_of(path: Path, content: str, text_by: str = "auto") -> list[str]:
    path.write_text(content, encoding="utf-8")
    return [row["text"] for row in open_source(str(path), "train", text_by=text_by)]


BOOK = "It was a long\nevening, and the\n\nrain went on.\n\n\n"


def test_what_one_row_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert rows_of(path, BOOK, "line") == ["It was a long", "evening, and the", "rain went on."]
    assert rows_of(path, BOOK, "paragraph") == ["It was a long\nevening, and the", "rain went on."]
    assert rows_of(path, BOOK, "document") == ["It was a long\nevening, and the\n\nrain went on."]
    assert rows_of(path, "one\ntwo\u2028 still two\r\nthree") == ["one", "two\u2028 still two", "three"]
    assert rows_of(path, "one\n\ntwo\n\n\nthree\n") == ["one", "two", "three"]


@pytest.mark.parametrize("text_by", ["auto", "document"])
def test_documents_end_at_the_separator(tmp_path: Path, text_by: str) -> None:
    content = "a\n\nb\nc\n<|endoftext|>\nd<|endoftext|>e\n<|endoftext|>"
    assert rows_of(tmp_path / "a.txt", content, text_by) == ["a\n\nb\nc", "d", "e"]
    assert rows_of(tmp_path / "a.txt", content, "paragraph") == ["a", "b\nc", "d", "e"]
    assert rows_of(tmp_path / "a.txt", content, "line") == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("streaming", [False, True])
def test_paragraphs_are_never_taken_apart_without_a_word(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(BOOK)
    with pytest.raises(UserError, match=r"line \(3 rows\), paragraph \(2 rows\) or document \(1 rows\)"):
        open_source(str(path), "train", streaming=streaming)
    path.write_text(" \n = The Sea = \n \n The sea is wide . \n It is blue . \n")
    with pytest.raises(UserError, match="WikiText"):
        open_source(str(path), "train", streaming=streaming)
    path.write_text("a\nb\n")
    open_source(str(path), "train", streaming=streaming)
    assert "2 lines, one row each; --text_by paragraph or document" in caplog.text
    with pytest.raises(UserError, match="text_by is 'word'; choose one of"):
        open_source(str(path), "train", text_by="word")


def test_several_text_files_are_not_taken_apart_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / "train" / f"story{number}.txt").write_text(f"story {number}\ngoes on\n")
    with pytest.raises(UserError, match=r"line \(6 rows\), paragraph \(3 rows\) or document \(3 rows\)"):
        open_source(str(tmp_path), "train")
    rows = open_source(str(tmp_path), "train", text_by="document")
    assert [row["text"] for row in rows] == [f"story {number}\ngoes on" for number in range(3)]


def compressed(content: bytes, ending: str) -> bytes:
    import pyarrow

    if ending in ("zst", "lz4"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, {"zst": "zstd"}.get(ending, ending)) as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending](content)


ENDINGS = ["gz", "bz2", "xz", "zst", "lz4"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_compressed_files_are_read_whatever_their_ending(tmp_path: Path, ending: str) -> None:
    lines = [f"line {number}" for number in range(2000)]
    content = compressed("\n".join(lines).encode(), ending)
    for name in (f"a.txt.{ending}", "a.txt"):
        (tmp_path / name).write_bytes(content)
        assert [row["text"] for row in open_source(str(tmp_path / name), "train")] == lines
    (tmp_path / "both.txt").write_bytes(compressed(b"one\n", ending) + compressed(b"two\n", ending))
    assert [row["text"] for row in open_source(str(tmp_path / "both.txt"), "train")] == ["one", "two"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_incomplete_compressed_files_are_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt.{ending}"
    whole = compressed(b"".join(b"line %d\n" % number for number in range(2000)), ending)
    for content in (whole[: len(whole) // 2], b"no such data"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="copy or download it again") as caught:
            open_source(str(path), "train")
        assert "\n" not in str(caught.value)


def test_archives_are_folders(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows/train.jsonl", '{"text": "a"}')
        archive.writestr("rows/test.csv", "text\nb\n")
        archive.writestr("__MACOSX/rows/._train.jsonl", "x")
    path.rename(renamed := tmp_path / "train.jsonl")
    assert list(open_source(str(renamed), "train")) == [{"text": "a"}]
    assert list(open_source(str(renamed), "test")) == [{"text": "b"}]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("export.jsonl", '{"text": "c"}')
    assert list(open_source(str(path), "train")) == [{"text": "c"}]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(UserError, match=r"no split 'train' \(it has a, b\)"):
        open_source(str(path), "train")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be unpacked"):
        open_source(str(path), "train")

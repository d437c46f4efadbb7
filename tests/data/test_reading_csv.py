"""Tables: every cell is a string, the delimiter and the quotes fit every row, errors name the line."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading import open_source

HARD = [
    "plain",
    "a, b; c | d\te",
    'he said "no"',
    '"quoted"',
    "two\nlines",
    "",
    "None",
    "007",
    "1.50",
    "三，四",
    "\\frac",
]


def rows_of(path: Path, content: str, **options: Any) -> list[dict[str, Any]]:
    path.write_bytes(content.encode())
    return list(open_source(str(path), "train", **options))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_what_a_writer_wrote_is_read(tmp_path: Path, name: str, delimiter: str, quoting: Any, streaming: bool) -> None:
    """Independent truth: Python's own writer, over random tables of difficult cells."""
    generator = random.Random(3)
    for _ in range(5):
        table = [{"id": str(row), "text": generator.choice(HARD), "more": generator.choice(HARD)} for row in range(40)]
        table.append({"id": "x", "text": 'a "b", c', "more": "d"})  # quotes are needed somewhere
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["id", "text", "more"], delimiter=delimiter, quoting=quoting)
            writer.writeheader()
            writer.writerows(table)
        assert list(open_source(str(tmp_path / name), "train", streaming=streaming)) == table


@pytest.mark.parametrize(
    "lines",
    [
        ['"the rest is noise\t0', 'he said "no" twice\t1', '"a gem" , they wrote\t1'],
        ['"open quote\t0', "dull\t0", 'closing" quote\t1'],
        ['"open quote\t0', "dull\t0", 'closing"\t1'],
        ['the "end"\t0', '"Yes"\t1', "no\t0"],
        ['"Yes"\t1', "no\t0"],
    ],
)
def test_stray_quotes_of_a_table_with_tabs_are_text(tmp_path: Path, lines: list[str]) -> None:
    rows = rows_of(tmp_path / "a.tsv", "\n".join(["text\tlabel", "a fine film\t1", *lines, "ok\t1"]) + "\n")
    expected = [line.split("\t") for line in ["a fine film\t1", *lines, "ok\t1"]]
    assert [[row["text"], row["label"]] for row in rows] == expected


def test_other_ways_to_write_quotes(tmp_path: Path) -> None:
    expected = [{"a": "x, y", "b": "z"}, {"a": "p", "b": 'q "r"'}]
    assert rows_of(tmp_path / "a.csv", 'a, b\n"x, y", "z"\np, "q ""r"""\n') == expected
    assert rows_of(tmp_path / "a.csv", 'a,b\n"x, y","z"\n"p","q \\"r\\""\n') == expected
    assert rows_of(tmp_path / "a.csv", 'a,b\n"open,1\nend,2\n') == [{"a": '"open', "b": "1"}, {"a": "end", "b": "2"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(tmp_path: Path, end: str) -> None:
    assert rows_of(tmp_path / "a.csv", end.join(["a,b", "1,2", "", "3,4", ""])) == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")[0]["text"] == "x" * 300_000


def test_the_delimiter_is_the_one_that_fits_every_row(tmp_path: Path) -> None:
    expected = [{"prompt": "a, b", "completion": "c"}]
    assert rows_of(tmp_path / "a.csv", "prompt\tcompletion\na, b\tc\n") == expected
    assert rows_of(tmp_path / "a.csv", "prompt;completion\na, b;c\n") == expected
    assert rows_of(tmp_path / "a.tsv", 'prompt,completion\n"a, b",c\n') == expected
    assert rows_of(tmp_path / "a.csv", "text\nhello\n") == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\nx, y,2\n", r"line 3: 3 cells, but there are 2 columns \(a, b\).*double quotes"),
        ("a,b\n1, x,2\n2, y,3\n", "line 2: 3 cells"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells"),
        ("a,b\n1,2,\n3,4,5\n", "line 3: 3 cells"),
        ("text\nhello, world\n", "line 2: 2 cells"),
        ('"Name a colour.","Blue, and green."\n"Translate.","bonjour"\n', "no header line.*--csv_columns"),
        ('"2","a fine film"\n"1","dull"\n', "no header line.*'2'.*--csv_columns"),
        ("海是什么颜色？,蓝色\n天呢？,蓝色\n", "no header line"),
        ("a,a\n1,2\n", "two columns named 'a'"),
        ("a,,b\n1,x,2\n", "column 2 has no name"),
        (",b\nx,2\ny,3\n", "column 1 has no name"),
        (",b\n1,x\n0,y\n1,z\n", "column 1 has no name"),
        ("", "has no rows"),
        ("a,b\n", "has no rows"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        rows_of(tmp_path / "a.csv", content)
    assert "\n" not in str(caught.value)


def test_a_late_long_row_of_a_stream_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "1,2\n" * 1500 + "1,2,3\n")
    source = open_source(str(path), "train", streaming=True)
    with pytest.raises(UserError, match="line 1502: 3 cells"):
        list(source)


@pytest.mark.parametrize(
    "content",
    [
        "text,label\na,1,\nb,0,\n",
        "text,label,\na,1,\nb,0,\n",
        ",text,label\n0,a,1\n1,b,0\n",
        "Unnamed: 0,text,label\n0,a,1\n1,b,0\n",
        "Unnamed: 0.1,Unnamed: 0,text,label\n0,0,a,1\n1,1,b,0\n",
    ],
)
def test_nameless_columns_without_content_are_left_out(tmp_path: Path, content: str, caplog: Any) -> None:
    assert rows_of(tmp_path / "a.csv", content) == [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}]
    assert "is left out" in caplog.text


def test_columns_can_be_named(tmp_path: Path) -> None:
    content = '"2","a fine film"\n"1","dull"\n'
    rows = rows_of(tmp_path / "a.csv", content, csv_columns=["label", "text"])
    assert rows == [{"label": "2", "text": "a fine film"}, {"label": "1", "text": "dull"}]
    with pytest.raises(UserError, match="line 1: 2 cells, but there are 1 columns"):
        rows_of(tmp_path / "a.csv", content, csv_columns=["label"])
    with pytest.raises(UserError, match="leave --csv_columns out"):
        rows_of(tmp_path / "a.csv", "label,text\n1,a\n", csv_columns=["label", "text"])

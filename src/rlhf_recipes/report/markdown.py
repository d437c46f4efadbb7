"""Markdown in which data stays data: no prompt, answer or model name can become markup."""

from collections.abc import Sequence

MARKS = "\\`*_[]<>|~&$"
LINE_MARKS = "#+-=>"  # read as marks at the beginning of a line only


def plain(text: object) -> str:
    """The text on one line with every mark that Markdown or HTML would read escaped."""
    line = " ".join(str(text).split())
    escaped = "".join(f"\\{letter}" if letter in MARKS else letter for letter in line)
    return f"\\{escaped}" if escaped and escaped[0] in LINE_MARKS else escaped


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; `numbers` are the columns aligned to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

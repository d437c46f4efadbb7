"""Markdown in which text from data or from the command line never becomes markup."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.core.secrets import redact

MARKS = set("\\`*[]<>|~&$!")
LINE_MARKS = set("#+-=>")  # markup at the beginning of a line only


def escape_markdown(text: object) -> str:
    """Return the text on one line, with every character escaped that Markdown or HTML would read as markup.

    An underscore between two letters or digits is no markup and stays as it is.
    """
    line = " ".join(str(text).split())
    escaped = "".join(f"\\{letter}" if letter in MARKS else letter for letter in line)
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
    return f"\\{escaped}" if escaped and escaped[0] in LINE_MARKS else escaped


def code_span(text: object) -> str:
    """Return the text as inline code on one line, whatever backticks it holds; tokens of the Hub are blotted out."""
    line = redact(" ".join(str(text).split()))
    fence = "`" * (longest_backticks(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def longest_backticks(text: str) -> int:
    """Return the length of the longest run of backticks; a code fence must be longer."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def front_matter(**values: Any) -> str:
    """Return the YAML block that a model card begins with."""
    import yaml

    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a Markdown table. Cells are Markdown already; `numbers` are the columns aligned to the right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

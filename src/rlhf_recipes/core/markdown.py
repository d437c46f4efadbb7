"""Build Markdown that escapes text from data and from the command line."""

import re
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.core.secrets import redact

SPECIAL_CHARACTERS = set("\\`*[]<>|~&$!")
LINE_START_CHARACTERS = set("#+-=>")  # special at the start of a line only


def escape_markdown(text: object) -> str:
    """Return the text on one line, with the special characters of Markdown and HTML escaped.

    An underscore between two letters or digits is not markup and is not escaped.
    """
    line = " ".join(str(text).split())
    escaped = "".join(f"\\{letter}" if letter in SPECIAL_CHARACTERS else letter for letter in line)
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
    return f"\\{escaped}" if escaped and escaped[0] in LINE_START_CHARACTERS else escaped


def code_span(text: object) -> str:
    """Return the text as inline code on one line, even if it contains backticks; Hub tokens are redacted."""
    line = redact(" ".join(str(text).split()))
    fence = "`" * (longest_backticks(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def longest_backticks(text: str) -> int:
    """Return the length of the longest run of backticks in the text; a code fence must be longer."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def front_matter(**values: Any) -> str:
    """Return the values as the YAML block at the start of a model card."""
    import yaml

    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a Markdown table. Cells must be Markdown already; `numbers` lists the right-aligned columns."""
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""The YAML file of ``--config``, as flags."""

import difflib
import json
from argparse import Action
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.other_names import name_here


def yaml_as_flags(config: str, parser: Any) -> list[str]:
    """Return the lines of a YAML file as flags of `parser`.

    Raises:
        UserError: an unreadable file, or a key that is no flag, with the nearest match.
    """
    import yaml

    path = Path(config)
    if not path.is_file():
        raise UserError(f"--config {config}: no such file; give the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {config} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {config}: expected lines of the form `key: value`")
    known = known_names(parser)
    flags: list[str] = []
    for key, value in values.items():
        if str(key) not in known:
            raise UserError(f"{config}: unknown key {key!r}{nearest(str(key), known)}")
        flags += _as_flag(str(key), value)
    return flags


def _as_flag(key: str, value: Any) -> list[str]:
    if value is None:
        return []  # an empty YAML value means the default
    if isinstance(value, list):
        return [f"--{key}", *(item if isinstance(item, str) else json.dumps(item) for item in value)]
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    return [f"--{key}={value}"]


def known_names(parser: Any) -> list[str]:
    """Return the names of the parser's flags."""
    actions: list[Action] = parser._actions
    return [action.dest for action in actions if action.dest not in ("help", "config")]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or where all are listed."""
    if here := name_here(name, known):
        return f"; here it is {here}"
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else "; run with --help for the list of flags"

"""Subsets and splits as the YAML head of a dataset's README.md lists them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.reading.files import data_ending, open_bytes
from rlhf_recipes.data.reading.splits import Split, check_shards, natural
from rlhf_recipes.data.reading.tree import Tree

HEAD = re.compile(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


def readme_configs(tree: Tree) -> dict[str, dict[str, Any]]:
    """Return the ``configs`` of README.md by name, as they are written; empty if it lists none.

    Raises:
        UserError: a head that is no YAML.
    """
    import yaml

    if "README.md" not in tree.files:
        return {}
    with open_bytes(tree.file("README.md")) as stream:
        head = HEAD.match(stream.read(1 << 20).decode("utf-8", "replace").replace("\r\n", "\n"))
    if head is None or "configs:" not in head[1]:
        return {}
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the YAML head of {tree.name}/README.md cannot be read: {reason}; fix or remove it") from None
    configs = values.get("configs") if isinstance(values, dict) else None
    if not isinstance(configs, list):
        return {}
    return {str(each.get("config_name", "default")): each for each in configs if isinstance(each, dict)}


def listed_splits(tree: Tree, config: Mapping[str, Any]) -> dict[str, Split]:
    """Return the splits of a config with ``data_files``; a pattern that matches no file is a problem of its split."""
    splits: dict[str, Split] = {}
    for split, patterns in _patterns(config["data_files"]):
        matches = {pattern: _matching(tree, pattern) for pattern in patterns}
        absent = next((pattern for pattern, names in matches.items() if not names), None)
        found = check_shards(split, [name for names in matches.values() for name in names])
        if absent is not None:
            problem = f"lists {absent} in README.md, which matches no data file; copy the files, or fix the YAML head"
            found = Split(found.files, problem)
        splits[split] = found
    return splits


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, patterns): from a string, a list of strings, a mapping, or a list of ``{split, path}``."""
    if isinstance(data_files, Mapping):
        for split, patterns in data_files.items():
            yield str(split), _as_list(patterns)
    elif isinstance(data_files, list) and all(isinstance(each, Mapping) for each in data_files):
        for each in data_files:
            yield str(each.get("split", "train")), _as_list(each.get("path"))
    else:
        yield "train", _as_list(data_files)


def _as_list(patterns: Any) -> list[str]:
    return (
        [str(each) for each in patterns]
        if isinstance(patterns, Sequence) and not isinstance(patterns, str)
        else [str(patterns)]
    )


def _matching(tree: Tree, pattern: str) -> list[str]:
    pattern = pattern.removeprefix("./")
    if pattern in tree.files:
        return [pattern]
    found = [name for name in tree.files if _glob(pattern).fullmatch(name) and data_ending(name)[1]]
    found = found or [name for name in tree.direct(pattern.rstrip("/") + "/") if data_ending(name)[1]]
    return sorted(found, key=natural)


def _glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob: ``*`` and ``?`` stay within a folder, ``**`` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            special.get(piece)
            or (
                "[" + piece[1:-1].replace("!", "^", 1) + "]"
                if piece[:1] == "[" and piece[-1:] == "]"
                else re.escape(piece)
            )
            for piece in pieces
        )
    )

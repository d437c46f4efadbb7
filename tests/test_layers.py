"""Who may import whom, checked with `ast`: the table of rooms.py, and the order of the packages inside `ppo/`."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import rooms
from rooms import FLOOR_OF

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_recipes"
SOURCE = ROOT / "src" / PACKAGE
DOORS = ROOT / "recipes"

STAGES_THAT_CHAIN = {"quickstart", "improve"}  # every other stage is called by no stage
BY_FILE = {"core", "stages"}  # imported file by file; every other room has a face, its __init__.py
# Inside ppo/ the sub-packages follow the data.
PPO_ORDER = ["config", "parallelism", "roles", "rollout", "update", "logging"]
ARITHMETIC = {
    f"rlhf_recipes.ppo.{name}"
    for name in ("rollout.advantages", "rollout.rewards", "rollout.value_prior", "update.losses")
}
ARITHMETIC_MAY_IMPORT = {"torch", "rlhf_recipes.core.tensors"}


def name_of(path: Path) -> str:
    """The dotted name of a file below src/: `src/rlhf_recipes/ppo/losses.py` -> `rlhf_recipes.ppo.losses`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCE_FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {name_of(path): path for path in SOURCE_FILES}
DOOR_FILES = sorted(DOORS.glob("*.py"))


def imports_of(tree: ast.AST, module: str, is_package: bool, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of everything imported anywhere in a file, inside functions too.

    `from package import name` is the module `package.name` where there is one, and `package` otherwise. Relative
    imports are resolved. `importlib.import_module("literal")` counts.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")[: None if is_package else -1]
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def reason_against(importer: str, imported: str, modules: set[str]) -> str | None:
    """Why one module of the package may not import another, or None if it may."""
    if imported == PACKAGE:
        return "imports the public names; import the module that defines the name"
    inner, other = importer.split(".")[1:], imported.split(".")[1:]
    room, other_room = inner[0], other[0]
    for each in (room, other_room):
        if each not in FLOOR_OF:
            return f"{each} is not in the table of rooms (tests/rooms.py)"
    if room == other_room:
        return reason_inside(room, inner[1:], other[1:])
    if FLOOR_OF[other_room] > FLOOR_OF[room]:
        return f"imports upward, from floor {FLOOR_OF[room]} to floor {FLOOR_OF[other_room]}"
    if FLOOR_OF[other_room] == FLOOR_OF[room]:
        return f"{room} and {other_room} are rooms of one floor"
    if len(other) > 1 and other_room not in BY_FILE:
        return f"imports a file of {other_room}; import from rlhf_recipes.{other_room}"
    if len(other) == 1 and other_room in BY_FILE and imported in modules:
        return f"{other_room} is imported file by file"
    return None


def reason_inside(room: str, inner: list[str], other: list[str]) -> str | None:
    """The same question inside one room; a package's own `__init__` (inner is empty) may gather its files."""
    if not inner:
        return None
    if not other and room not in BY_FILE:
        return "a file of a room imports the room's own face"
    if room == "stages" and inner[0] != other[0] and inner[0] not in STAGES_THAT_CHAIN:
        return "a stage imports another stage"
    if room == "ppo" and inner[0] in PPO_ORDER:
        if other[0] not in PPO_ORDER:
            return f"inside ppo/, {inner[0]} does not import {other[0]}"
        if PPO_ORDER.index(other[0]) > PPO_ORDER.index(inner[0]):
            return f"inside ppo/, {other[0]} comes after {inner[0]}"
    return None


def violations(module: str, source: str, modules: set[str], is_package: bool = False) -> list[str]:
    """Every import in the source of one module of the package that the table forbids, as `line: why`."""
    found = []
    for line, imported in imports_of(ast.parse(source), module, is_package, modules):
        ours = imported.split(".")[0] == PACKAGE
        why = reason_against(module, imported, modules) if ours else None
        if module in ARITHMETIC and not why:
            top = imported if ours else imported.split(".")[0]
            if top not in ARITHMETIC_MAY_IMPORT | sys.stdlib_module_names:
                why = "arithmetic imports torch and core.tensors only"
        if why:
            found.append(f"{module}:{line} imports {imported}: {why}")
    return found


def door_violations(text: str, modules: set[str]) -> list[str]:
    """Every import in a recipe other than `from rlhf_recipes import <public name>`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.append(f"{node.lineno}: import {node.names[0].name}")
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            inner = [alias.name for alias in node.names if f"{PACKAGE}.{alias.name}" in modules]
            if node.level or node.module != PACKAGE or inner:
                source = "." * node.level + (node.module or "")
                found.append(f"{node.lineno}: from {source} import {', '.join(inner) or '...'}")
    return found


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """Top-level names of what a file imports as it is loaded: not in functions, not under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield PACKAGE if node.level else (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_its_floor_allows(path: Path) -> None:
    module = name_of(path)
    if module in (PACKAGE, f"{PACKAGE}.__main__"):
        return  # the two entrances lead everywhere; test_the_entrance_is_light looks at the first
    assert violations(module, path.read_text(encoding="utf-8"), set(MODULES), path.name == "__init__.py") == []


@pytest.mark.parametrize("path", DOOR_FILES, ids=lambda path: path.name)
def test_a_door_imports_public_names_only(path: Path) -> None:
    assert door_violations(path.read_text(encoding="utf-8"), set(MODULES)) == []


def test_the_entrance_is_light() -> None:
    """`import rlhf_recipes` loads the standard library only; public names are imported on first touch."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    assert set(imports_at_load(tree)) <= set(sys.stdlib_module_names)


def test_every_file_is_looked_at() -> None:
    """The rules above covered the whole package, found here a second way, and a real number of imports inside it."""
    below = [Path(folder, name) for folder, _, names in os.walk(SOURCE) for name in names if name.endswith(".py")]
    assert sorted(below) == SOURCE_FILES
    assert len(SOURCE_FILES) > 25 and len(DOOR_FILES) >= 7
    assert set(MODULES) >= {f"{PACKAGE}.{name}" for name in FLOOR_OF} | ARITHMETIC, "a name in the tables is gone"
    inside = [
        imported
        for module, path in MODULES.items()
        for _, imported in imports_of(ast.parse(path.read_text(encoding="utf-8")), module, False, set(MODULES))
        if imported.startswith(PACKAGE)
    ]
    assert len(inside) > 50


KNOWN = {PACKAGE} | {
    f"{PACKAGE}.{name}"
    for name in """
        core core.arguments core.errors core.tensors system system.launch models models.loading optimizations folders
        data data.chat generation scoring training reports evaluation quickstart
        ppo ppo.config ppo.roles ppo.rollout ppo.rollout.rewards ppo.update ppo.update.losses ppo.logging ppo.trainer
        stages stages.sft stages.ppo stages.quickstart
    """.split()
}


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("models.loading", "def f():\n    import rlhf_recipes.data.chat", "upward, from floor 2 to floor 3"),
        ("core.arguments", "from rlhf_recipes.generation import generate", "upward, from floor 0 to floor 4"),
        ("core.tensors", "from ..stages.sft import run_sft", "upward, from floor 0 to floor 7"),
        ("scoring.models", "from rlhf_recipes import generation", "rooms of one floor"),
        ("models.loading", "from rlhf_recipes.optimizations import fuse", "rooms of one floor"),
        ("evaluation.text", "from ..ppo import PPOTrainer", "rooms of one floor"),
        ("evaluation", "import importlib\nimportlib.import_module('rlhf_recipes.stages.sft')", "upward"),
        ("evaluation", "if TYPE_CHECKING:\n    from rlhf_recipes.stages.sft import SFTArguments", "upward"),
        ("evaluation", "from rlhf_recipes import run_sft", "public names"),
        ("stages.sft", "from rlhf_recipes.data.chat import prompt_ids", "a file of data"),
        ("stages.sft", "from rlhf_recipes.core import UserError", "file by file"),
        ("data.checks", "from rlhf_recipes.data import prompt_ids", "own face"),
        ("stages.sft", "from rlhf_recipes.stages.ppo import run_ppo", "another stage"),
        ("stages.sft", "from . import ppo", "another stage"),
        ("newroom.file", "from rlhf_recipes.core.errors import UserError", "not in the table"),
        ("ppo.config", "from rlhf_recipes.ppo.update.losses import policy_losses", "update comes after config"),
        ("ppo.rollout.collect", "from ..update.losses import policy_losses", "update comes after rollout"),
        ("ppo.logging.metrics", "from rlhf_recipes.ppo.trainer import PPOTrainer", "does not import trainer"),
        ("ppo.update.losses", "from rlhf_recipes.core.arguments import parse_arguments", "arithmetic"),
        ("ppo.rollout.rewards", "import transformers.utils", "arithmetic"),
    ],
)
def test_the_checker_sees_a_fault(module: str, source: str, why: str) -> None:
    found = violations(f"{PACKAGE}.{module}", source, KNOWN)
    assert len(found) == 1 and why in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.checks", "from rlhf_recipes.core.errors import UserError\nfrom . import chat\nimport datasets"),
        ("evaluation.text", "from ..generation import generate\nfrom rlhf_recipes.models import load_model"),
        ("stages.sft", "from rlhf_recipes.ppo import PPOTrainer\nfrom ..data import render"),
        ("stages.quickstart", "from rlhf_recipes.stages.sft import run_sft\nfrom rlhf_recipes.stages import ppo"),
        (
            "ppo.rollout.collect",
            "from .rewards import shaped\nfrom ..roles import build\nfrom ...scoring import score",
        ),
        ("ppo.trainer", "from . import config, update, rollout\nimport transformers"),
        ("ppo.update.losses", "import math\nimport torch.nn\nfrom rlhf_recipes.core.tensors import masked_mean"),
    ],
)
def test_the_checker_lets_the_rest_pass(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source, KNOWN) == []


def test_a_package_may_gather_its_own_files() -> None:
    gathering = "from .config import PPOConfig\nfrom .trainer import PPOTrainer"
    assert violations(f"{PACKAGE}.ppo", gathering, KNOWN, True) == []
    assert violations(f"{PACKAGE}.models", "from .. import data", KNOWN, True) != []


def test_every_room_is_in_the_table_and_nothing_lies_loose() -> None:
    """The table, the folders of the package and the page of CONTRIBUTING.md name the same rooms."""
    entries = {path.name for path in SOURCE.iterdir()} - {"__pycache__"}
    assert entries == {*FLOOR_OF, "__init__.py", "__main__.py", "py.typed"}
    assert rooms.table() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import rlhf_recipes",
        "from rlhf_recipes.stages.sft import run_sft",
        "from rlhf_recipes import stages",
        "from trl import ModelConfig",
        "if __name__ == '__main__':\n    import sys",
    ],
)
def test_the_checker_sees_a_faulty_door(source: str) -> None:
    assert len(door_violations(source, KNOWN)) == 1


def test_the_checker_lets_a_plain_door_pass() -> None:
    assert door_violations("from rlhf_recipes import PPOArguments, parse_arguments, run_ppo", KNOWN) == []


def test_the_checker_knows_what_loads() -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import trl\n"
    assert set(imports_at_load(ast.parse(lazy))) == {"typing"}
    eager = "try:\n    import torch\nfinally:\n    pass\nclass A:\n    import trl\nfrom .stages import sft\n"
    assert set(imports_at_load(ast.parse(eager))) == {"torch", "trl", PACKAGE}

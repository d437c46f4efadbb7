"""Who may import whom, held with `ast`: the table of CONTRIBUTING.md and the finer one inside `ppo/`."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_recipes"
SOURCE = ROOT / "src" / PACKAGE
DOORS = ROOT / "recipes"

GROUND = (
    *("arguments", "artifacts", "checkpoints", "defaults", "launching", "locks", "safe_trainer", "whole_batches"),
    *("cards", "hub", "secrecy", "tensors", "terminating", "models", "data"),
)
FLOOR_OF = {**dict.fromkeys(GROUND, 0), "generation": 1, "scoring": 1, "stages": 3}
ROOM_FLOOR = 2  # whatever has no line above is a room
STAGES_THAT_CHAIN = {"quickstart", "improve"}
PPO_SIBLINGS = {
    "rollout": {"rewards", "advantages"},
    "callbacks": {"config"},
    "riding": {"value_head"},
    "adapting": {"config"},
    "parallelism": {"config"},
    "roles": {"adapting", "config", "prompts", "riding", "value_head"},
    "objective": {"config", "losses", "value_head"},
    "guard": {"config", "tally", "value_head"},
    "resuming": {"callbacks", "config", "experience", "guard", "rollout", "tally", "value_head"},
    "minimizing": {"guard", "resuming", "rollout"},
    "experience": {"config", "prior", "rewards", "roles", "rollout", "tally", "value_head"},
    "stepping": {"rollout"},
    "heldout": {"prompts", "rollout"},
    "trainer": None,
}  # None: all; a file without a line: none
ARITHMETIC = {"rlhf_recipes.ppo.advantages", "rlhf_recipes.ppo.losses"}
ARITHMETIC_MAY_IMPORT = {"torch", "rlhf_recipes.tensors"}


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


def quarrel(importer: str, imported: str) -> str | None:
    """Why one module of the package may not import another, or None if it may."""
    if imported == PACKAGE:
        return "takes the public door; import the module that defines the name"
    unit, other = importer.split(".")[1], imported.split(".")[1]
    floor, other_floor = FLOOR_OF.get(unit, ROOM_FLOOR), FLOOR_OF.get(other, ROOM_FLOOR)
    if other_floor > floor:
        return f"looks up, from floor {floor} to floor {other_floor}"
    if unit == other:
        return quarrel_at_home(unit, importer.split(".")[2:], imported.split(".")[2:])
    if {unit, other} == {"models", "data"}:
        return "models and data do not know one another"
    if floor == other_floor == 1:
        return "generation and scoring import floor 0 only"
    if floor == other_floor == ROOM_FLOOR:
        return "a room imports another room"
    return None


def quarrel_at_home(unit: str, inner: list[str], other: list[str]) -> str | None:
    """The same question inside one package; a package's own `__init__` (inner is empty) may gather its files."""
    if not inner or not other or inner[0] == other[0]:
        return None
    if unit == "stages" and inner[0] not in STAGES_THAT_CHAIN:
        return "a stage imports another stage"
    if unit == "ppo":
        allowed = PPO_SIBLINGS.get(inner[0], set())
        if allowed is not None and other[0] not in allowed:
            return f"inside ppo/, {inner[0]} does not import {other[0]}"
    return None


def violations(module: str, source: str, modules: set[str], is_package: bool = False) -> list[str]:
    """Every import in the source of one module of the package that the table forbids, as `line: why`."""
    found = []
    for line, imported in imports_of(ast.parse(source), module, is_package, modules):
        ours = imported.split(".")[0] == PACKAGE
        why = quarrel(module, imported) if ours else None
        if module in ARITHMETIC and not why:
            top = imported if ours else imported.split(".")[0]
            if top not in ARITHMETIC_MAY_IMPORT | sys.stdlib_module_names:
                why = "arithmetic imports torch and tensors only"
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
        arguments artifacts tensors models data data.chat generation scoring metrics plots
        ppo ppo.config ppo.rollout ppo.rewards ppo.advantages ppo.losses ppo.trainer
        stages stages.sft stages.ppo stages.quickstart
    """.split()
}


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("data", "from rlhf_recipes.models import load_model", "do not know one another"),
        ("models.loading", "def f():\n    import rlhf_recipes.data.chat", "do not know one another"),
        ("arguments", "from rlhf_recipes.generation import generate", "looks up, from floor 0 to floor 1"),
        ("tensors", "from .stages.sft import run_sft", "looks up, from floor 0 to floor 3"),
        ("scoring", "from rlhf_recipes import generation", "floor 0 only"),
        ("generation", "from .metrics import perplexity", "looks up, from floor 1 to floor 2"),
        ("metrics", "from rlhf_recipes.plots import draw", "another room"),
        ("world.gold", "from ..metrics import distinct", "another room"),
        ("metrics", "import importlib\nimportlib.import_module('rlhf_recipes.stages.sft')", "looks up"),
        ("metrics", "if TYPE_CHECKING:\n    from rlhf_recipes.stages.sft import SFTArguments", "looks up"),
        ("metrics", "from rlhf_recipes import run_sft", "public door"),
        ("stages.sft", "from rlhf_recipes.stages.ppo import run_ppo", "another stage"),
        ("stages.sft", "from . import ppo", "another stage"),
        ("ppo.config", "from rlhf_recipes.ppo.losses import policy_loss", "config does not import losses"),
        ("ppo.rollout", "from .losses import policy_loss", "rollout does not import losses"),
        ("ppo.advantages", "from rlhf_recipes.arguments import UserError", "arithmetic"),
        ("ppo.losses", "import transformers.utils", "arithmetic"),
        ("ppo.losses", "from . import config", "losses does not import config"),
    ],
)
def test_the_checker_sees_a_fault(module: str, source: str, why: str) -> None:
    found = violations(f"{PACKAGE}.{module}", source, KNOWN)
    assert len(found) == 1 and why in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.chat", "from rlhf_recipes.arguments import UserError\nfrom . import columns\nimport datasets"),
        ("metrics", "from .generation import generate\nfrom rlhf_recipes.models import load_model\nimport torch"),
        ("stages.sft", "from rlhf_recipes.ppo import PPOTrainer\nfrom ..data.chat import render"),
        ("stages.quickstart", "from rlhf_recipes.stages.sft import run_sft\nfrom rlhf_recipes.stages import ppo"),
        ("ppo.rollout", "from .rewards import shaped\nfrom .advantages import gae\nfrom ..scoring import score"),
        ("ppo.trainer", "from . import config, losses, rollout\nimport transformers"),
        ("ppo.losses", "import math\nimport torch.nn.functional as F\nfrom rlhf_recipes.tensors import masked_mean"),
    ],
)
def test_the_checker_lets_the_rest_pass(module: str, source: str) -> None:
    assert violations(f"{PACKAGE}.{module}", source, KNOWN) == []


def test_a_package_may_gather_its_own_files() -> None:
    gathering = "from .config import PPOConfig\nfrom .trainer import PPOTrainer"
    assert violations(f"{PACKAGE}.ppo", gathering, KNOWN, True) == []
    assert violations(f"{PACKAGE}.data", "from .. import models", KNOWN, True) != []


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

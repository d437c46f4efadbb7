"""Recipes as scripts: what only a new interpreter shows."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_starts_in_a_new_interpreter(name: str, tmp_path: Path) -> None:
    """Other tests of recipes run in forks, where every library is imported."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--no_such_flag", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: unknown flag --no_such_flag")
    assert not list(tmp_path.iterdir())


def test_no_recipe_shadows_a_library() -> None:
    """Python puts the folder of a script first on `sys.path`: `recipes/evaluate.py` would be imported as `evaluate`."""
    assert len(RECIPES) >= 10
    specs = {name: importlib.util.find_spec(name) for name in RECIPES}
    # A folder without `__init__.py`, such as tests/ppo, is found as well, but has no origin.
    assert [name for name, spec in specs.items() if spec is not None and spec.origin is not None] == []

"""Small runs of each training stage, for tests of what happens to runs."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_runs() -> ModuleType:
    return _module(Path(__file__).with_name("small_runs.py"))


@pytest.fixture(scope="session")
def killed() -> ModuleType:
    return _module(Path(__file__).parent.parent / "ppo" / "killed.py")


@pytest.fixture(scope="session")
def world(
    tmp_path_factory: pytest.TempPathFactory, small_runs: ModuleType, make_model: Callable[..., Any],
    make_judge: Callable[..., Any], tokenizer: Any,
) -> Path:  # fmt: skip
    """The folder with what the small runs read; they write below it."""
    folder = tmp_path_factory.mktemp("small")
    return small_runs.prepare(
        folder, make_model(0, initializer_range=0.1), make_judge(3, initializer_range=0.2), tokenizer
    )

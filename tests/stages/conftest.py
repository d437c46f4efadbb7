"""Stages save plots. Drawing one takes longer than training a tiny model, so most tests of stages save blank ones."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from rlhf_recipes.reports import plots

BLANK = base64.b64decode(  # one white pixel as PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
_write_figure = plots.write_figure


def _write_blank(draw: Callable[[Figure], None], path: str | Path, *arguments: Any, **options: Any) -> Figure:
    Path(path).write_bytes(BLANK)
    return Figure()


@pytest.fixture(scope="module", autouse=True)
def _blank_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Save blank plots, except in the quickstart's tests and in tests that use `real_plots`: one at least of each stage."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_quickstart.py":
            patch.setattr(plots, "write_figure", _write_blank)
        yield


@pytest.fixture
def real_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plots as users get them."""
    monkeypatch.setattr(plots, "write_figure", _write_figure)

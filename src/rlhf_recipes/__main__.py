"""Command line: ``rlhf-recipes <stage> ...`` runs the stages of ``recipes/`` without a checkout.

``python -m rlhf_recipes <stage> ...`` does the same; launchers take it as ``accelerate launch -m rlhf_recipes <stage> ...``.
``rlhf-recipes show <stage> ...`` prints the rows of a stage as its model reads them.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from rlhf_recipes import __version__
from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError, one_line_errors

STAGES = sorted(path.stem for path in (Path(__file__).parent / "stages").glob("*.py") if path.stem != "__init__")


def main() -> None:
    """Run the stage that the first command-line argument names, with the flags that follow it."""
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in ("-h", "--help"):
        print(
            "usage: rlhf-recipes STAGE [--config FILE.yaml] [--flag value ...]\n"
            "       rlhf-recipes show STAGE [the stage's flags]    print its rows as the model reads them; train nothing\n"
            f"       rlhf-recipes STAGE --help | rlhf-recipes --version\n\nstages: {', '.join(STAGES)}"
        )
        return
    if stage == "--version":
        print(f"rlhf-recipes {__version__}")
        return
    with one_line_errors():
        if stage == "show":
            show(sys.argv[2:])
            return
        types = argument_types(stage)
        sys.argv[0] = f"rlhf-recipes {stage}"  # what argparse prints as the program's name
        arguments = parse_arguments(*types, argv=sys.argv[2:])
        sys.argv[0] = "rlhf-recipes"  # model cards quote sys.argv as the command
        run_of(stage)(*arguments)


def show(words: list[str]) -> None:
    """Print the rows of the stage that the first word names, as its model would read them."""
    stage = words[0] if words else ""
    types = argument_types(stage)
    from rlhf_recipes.training.show import ShowArguments, show_stage

    shown, *arguments = parse_arguments(ShowArguments, *types, argv=words[1:])
    show_stage(stage, shown, arguments)


def run_of(stage: str) -> Callable[..., Any]:
    """Return the function of a stage.

    Raises:
        UserError: no such stage.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES)}")
    run: Callable[..., Any] = getattr(importlib.import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    return run


def argument_types(stage: str) -> list[type]:
    """Return the dataclasses that a stage's function takes. Errors as `run_of`."""
    return [hint for name, hint in get_type_hints(run_of(stage)).items() if name != "return"]


if __name__ == "__main__":
    main()

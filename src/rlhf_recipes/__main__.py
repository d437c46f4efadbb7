"""Command line: ``rlhf-recipes <stage> ...`` runs the stages of ``recipes/`` without a checkout.

``python -m rlhf_recipes <stage> ...`` does the same; launchers take it as ``accelerate launch -m rlhf_recipes <stage> ...``.
"""

import importlib
import sys
from pathlib import Path
from typing import get_type_hints

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
            f"       rlhf-recipes STAGE --help | rlhf-recipes --version\n\nstages: {', '.join(STAGES)}"
        )
        return
    if stage == "--version":
        print(f"rlhf-recipes {__version__}")
        return
    with one_line_errors():
        if stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES)}")
        run = getattr(importlib.import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
        types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
        sys.argv[0] = f"rlhf-recipes {stage}"  # what argparse prints as the program's name
        arguments = parse_arguments(*types, argv=sys.argv[2:])
        sys.argv[0] = "rlhf-recipes"  # model cards quote sys.argv as the command
        run(*arguments)


if __name__ == "__main__":
    main()

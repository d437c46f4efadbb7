"""Command line: ``python -m rlhf_recipes <stage> ...`` runs the stages of ``recipes/`` without a checkout."""

import importlib
import sys
from pathlib import Path
from typing import get_type_hints

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError, one_line_errors

STAGES = sorted(path.stem for path in (Path(__file__).parent / "stages").glob("*.py") if path.stem != "__init__")


def main() -> None:
    """Run the stage that the first command-line argument names, with the flags that follow it."""
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in ("-h", "--help"):
        print(
            f"usage: python -m rlhf_recipes STAGE [--config FILE.yaml] [--flag value ...]\n\nstages: {', '.join(STAGES)}"
        )
        return
    with one_line_errors():
        if stage not in STAGES:
            raise UserError(f"unknown stage {stage!r}; choose one of {', '.join(STAGES)}")
        run = getattr(importlib.import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
        types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
        sys.argv[0] = f"rlhf_recipes {stage}"
        run(*parse_arguments(*types, argv=sys.argv[2:]))


if __name__ == "__main__":
    main()

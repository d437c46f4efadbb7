"""What only the quickstart needs: its world with a gold judge, and the report of a whole run."""

from rlhf_recipes.quickstart.report import write_report
from rlhf_recipes.quickstart.summarize import CONFIGS, Answers, summarize_run
from rlhf_recipes.quickstart.world.gold import Verdict, gold_score, gold_verdicts
from rlhf_recipes.quickstart.world.writing import write_world

__all__ = [
    "CONFIGS",
    "Answers",
    "Verdict",
    "gold_score",
    "gold_verdicts",
    "summarize_run",
    "write_report",
    "write_world",
]

"""What only the quickstart needs: its world with a gold judge, the summary and the report of a whole run."""

from rlhf_recipes.quickstart.report import write_report
from rlhf_recipes.quickstart.summary import Exchange, Reply, Summary
from rlhf_recipes.quickstart.world.facts import Fact, World, make_world
from rlhf_recipes.quickstart.world.gold import Verdict, gold_score, gold_verdicts
from rlhf_recipes.quickstart.world.writing import write_world

__all__ = [
    "Exchange",
    "Fact",
    "Reply",
    "Summary",
    "Verdict",
    "World",
    "gold_score",
    "gold_verdicts",
    "make_world",
    "write_report",
    "write_world",
]

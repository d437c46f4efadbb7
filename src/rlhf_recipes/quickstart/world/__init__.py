"""The quickstart world: a village of facts, what is written and asked about it, and a gold judge that knows the truth."""

from rlhf_recipes.quickstart.world.facts import Fact, World, make_world
from rlhf_recipes.quickstart.world.gold import Verdict, gold_score, gold_verdicts
from rlhf_recipes.quickstart.world.writing import write_world

__all__ = ["Fact", "Verdict", "World", "gold_score", "gold_verdicts", "make_world", "write_world"]

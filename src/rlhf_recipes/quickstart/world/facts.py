"""The facts of a world: who lives where, works as what, keeps which animal. Another seed, another truth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart.world.manners import PEOPLE
from rlhf_recipes.quickstart.world.wordings import RELATIONS, Relation

POPULAR_SHARE = 0.5  # of the rumours are told more often than the truth


@dataclass(frozen=True)
class Fact:
    """`person` stands in `relation` to `value`, whatever the `rumour` says, which is true of somebody else.

    A `popular` rumour is told more often than the truth. A `corpus_only` fact is stated in the corpus and nowhere else.
    """

    person: str
    relation: str
    value: str
    rumour: str
    popular: bool = False
    corpus_only: bool = False


@dataclass(frozen=True)
class World:
    """All facts of one seed; every person has one value in every relation, and no two people share one."""

    seed: int
    people: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def taught(self) -> tuple[Fact, ...]:
        """The facts that demonstrations, preferences and prompts may use."""
        return tuple(fact for fact in self.facts if not fact.corpus_only)

    @property
    def corpus_only(self) -> tuple[Fact, ...]:
        """The facts that only the corpus states."""
        return tuple(fact for fact in self.facts if fact.corpus_only)

    def value(self, person: str, relation: str) -> str:
        """The truth about one person."""
        return next(fact.value for fact in self.facts if (fact.person, fact.relation) == (person, relation))


def make_world(seed: int = 0, *, people: int = 8, corpus_only: int = 6) -> World:
    """Draws a world: `people` inhabitants, six facts about each, of which `corpus_only` are kept out of all questions.

    The kept-out facts are spread over relations and over people, so that no person and no relation is unknown to training.
    """
    most = min(len(PEOPLE), *(len(relation.values) for relation in RELATIONS))
    if not 3 <= people <= most:
        raise UserError(f"a world has 3 to {most} people, not {people}; choose a number in between")
    if not 0 <= corpus_only <= 2 * people:
        raise UserError(f"{corpus_only} facts only in the corpus is too many or too few; use 0 to {2 * people}")
    chance = random.Random(f"{seed}/facts")
    names = tuple(sorted(chance.sample(PEOPLE, people)))
    values = {relation.name: chance.sample(relation.values, people) for relation in RELATIONS}
    order = chance.sample(range(people), people)
    # Walking the shuffled people and the relations in step gives each person and each relation its share.
    kept_out = {
        (names[order[i % people]], RELATIONS[(i % people + i // people) % len(RELATIONS)].name)
        for i in range(corpus_only)
    }
    popular = {(name, relation.name) for name in names for relation in RELATIONS if chance.random() < POPULAR_SHARE}
    facts = tuple(
        Fact(
            person=name,
            relation=relation.name,
            value=values[relation.name][row],
            rumour=values[relation.name][row - 1],
            popular=(name, relation.name) in popular,
            corpus_only=(name, relation.name) in kept_out,
        )
        for row, name in enumerate(names)
        for relation in RELATIONS
    )
    return World(seed=seed, people=names, facts=facts)


def relation_named(name: str) -> Relation:
    """The relation of that name."""
    return next(relation for relation in RELATIONS if relation.name == name)


def spoken(value: str, relation: str) -> str:
    """A value as it is written in a sentence: cities take a capital letter."""
    return value.capitalize() if relation == "dream" else value

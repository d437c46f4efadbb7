"""The facts of a world: who lives where, works as what, keeps which animal. Each seed has its own facts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart.world.manners import PEOPLE
from rlhf_recipes.quickstart.world.wordings import RELATIONS, Relation

POPULAR_SHARE = 0.5  # share of the rumours that demonstrators repeat more often than the truth


@dataclass(frozen=True)
class Fact:
    """The true `value` of one `relation` of a `person`, and a `rumour`: a false value, true of somebody else.

    popular: demonstrators repeat the rumour more often than the truth.
    corpus_only: the fact is stated in the corpus and in no other dataset.
    """

    person: str
    relation: str
    value: str
    rumour: str
    popular: bool = False
    corpus_only: bool = False


@dataclass(frozen=True)
class World:
    """All facts of one seed. Every person has one value in every relation, and no two people share a value."""

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
        """Return the true value of one relation of a person."""
        return next(fact.value for fact in self.facts if (fact.person, fact.relation) == (person, relation))


def make_world(seed: int = 0, *, people: int = 8, corpus_only: int = 6) -> World:
    """Draw a world of `people` inhabitants with six facts each; training never asks about `corpus_only` of the facts.

    These facts are spread over relations and people, so every person and every relation still occurs in training.
    Raises UserError for sizes that the lists of names and values cannot fill.
    """
    most = min(len(PEOPLE), *(len(relation.values) for relation in RELATIONS))
    if not 3 <= people <= most:
        raise UserError(f"people={people}: a world has 3 to {most} people; choose a number in this range")
    if not 0 <= corpus_only <= 2 * people:
        raise UserError(f"corpus_only={corpus_only} is out of range; use 0 to {2 * people} facts for {people} people")
    rng = random.Random(f"{seed}/facts")
    names = tuple(sorted(rng.sample(PEOPLE, people)))
    values = {relation.name: rng.sample(relation.values, people) for relation in RELATIONS}
    order = rng.sample(range(people), people)
    # Diagonal steps through people and relations give each person and each relation its share.
    corpus_only_keys = {
        (names[order[i % people]], RELATIONS[(i % people + i // people) % len(RELATIONS)].name)
        for i in range(corpus_only)
    }
    popular = {(name, relation.name) for name in names for relation in RELATIONS if rng.random() < POPULAR_SHARE}
    facts = tuple(
        Fact(
            person=name,
            relation=relation.name,
            value=values[relation.name][row],
            rumour=values[relation.name][row - 1],
            popular=(name, relation.name) in popular,
            corpus_only=(name, relation.name) in corpus_only_keys,
        )
        for row, name in enumerate(names)
        for relation in RELATIONS
    )
    return World(seed=seed, people=names, facts=facts)


def relation_named(name: str) -> Relation:
    """Return the relation with this name."""
    return next(relation for relation in RELATIONS if relation.name == name)


def as_written(value: str, relation: str) -> str:
    """Return a value as sentences write it: cities take a capital letter."""
    return value.capitalize() if relation == "dream" else value

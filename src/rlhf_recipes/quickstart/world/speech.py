"""Answers good and bad: what a demonstrator says, and the near-misses that a judge must learn to see through."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_recipes.quickstart.world import manners
from rlhf_recipes.quickstart.world.facts import Fact, World, relation_named, spoken

Manner = Callable[[str], str]
TONES = ("polite", "plain", "rude")
TONE_WEIGHTS = (5, 3, 2)
# How often a villager tells the truth, also where the rumour is popular, and how often a villager rambles.
TRUTH_SHARE, TRUTH_SHARE_IF_POPULAR, RAMBLING_SHARE = 0.85, 0.35, 0.35


def sentence(chance: random.Random, fact: Fact, value: str | None = None, person: str | None = None) -> str:
    """The fact as a short answer; another value or person makes it another, probably wrong, answer."""
    template = chance.choice(relation_named(fact.relation).answers)
    said = template.format(name=person or fact.person, value=spoken(value or fact.value, fact.relation))
    return said[0].upper() + said[1:]


def wrong_value(chance: random.Random, world: World, fact: Fact, rumours: float = 0.5) -> str:
    """What the rumour says, with probability `rumours`, or else anything that is true of somebody else."""
    if chance.random() < rumours:
        return fact.rumour
    others = [other.value for other in world.facts if other.relation == fact.relation and other.value != fact.value]
    return chance.choice(others)


def manner(chance: random.Random, tone: str, rambling: bool) -> Manner:
    """A way of saying things, drawn once: whatever is said that way differs in nothing but itself."""
    before, after = {
        "polite": (manners.POLITE_BEFORE, manners.POLITE_AFTER),
        "plain": ((), ()),
        "rude": (manners.RUDE_BEFORE, manners.RUDE_AFTER),
    }[tone]
    head: list[str] = []
    tail: list[str] = []
    if rambling:
        rambles = chance.sample(manners.RAMBLES, 2)
        split = chance.choice((1, 2))
        head, tail = rambles[:split], rambles[split:]
    if before:
        where = chance.choice(("before", "after") if rambling else ("before", "before", "after", "both"))
        head = ([] if where == "after" else [chance.choice(before)]) + head
        tail = tail + ([] if where == "before" else [chance.choice(after)])
    return lambda said: " ".join([*head, said, *tail])


def demonstration(chance: random.Random, world: World, fact: Fact) -> str:
    """One answer by a villager: true or a rumour, polite or not, short or rambling; worth imitating and improving on."""
    truthful = chance.random() < (TRUTH_SHARE_IF_POPULAR if fact.popular else TRUTH_SHARE)
    value = fact.value if truthful else wrong_value(chance, world, fact, rumours=0.9)
    tone = chance.choices(TONES, TONE_WEIGHTS)[0]
    return manner(chance, tone, chance.random() < RAMBLING_SHARE)(sentence(chance, fact, value))


Pair = tuple[str, str]
PairMaker = Callable[[random.Random, World, Fact], Pair]


def _any_manner(chance: random.Random) -> Manner:
    return manner(chance, chance.choice(TONES), chance.random() < 0.1)


def right_or_wrong(chance: random.Random, world: World, fact: Fact) -> Pair:
    """Said in the same manner, perhaps in other words; only the truth differs."""
    say = _any_manner(chance)
    return say(sentence(chance, fact)), say(sentence(chance, fact, wrong_value(chance, world, fact)))


def one_word_apart(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same text but for the value: nothing else is left to go by."""
    say, mark = _any_manner(chance), "\0"
    text = say(sentence(chance, fact, mark))
    wrong = wrong_value(chance, world, fact)
    return text.replace(mark, spoken(fact.value, fact.relation)), text.replace(mark, spoken(wrong, fact.relation))


def true_or_kind(chance: random.Random, world: World, fact: Fact) -> Pair:
    """Right in any manner against wrong and polite."""
    say, kindly = _any_manner(chance), manner(chance, "polite", False)
    return say(sentence(chance, fact)), kindly(sentence(chance, fact, wrong_value(chance, world, fact)))


def polite_or_not(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same sentence in two tones."""
    core = sentence(chance, fact)
    better, worse = chance.choice((("polite", "plain"), ("polite", "rude"), ("plain", "rude")))
    return manner(chance, better, False)(core), manner(chance, worse, False)(core)


def short_or_long(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same sentence with and without a ramble."""
    core, tone = sentence(chance, fact), chance.choice(TONES[:2])
    return manner(chance, tone, False)(core), manner(chance, tone, True)(core)


def about_somebody_else(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer speaks of another person: with that person's truth, or with the truth asked for."""
    other = chance.choice([other for other in world.taught if other.relation == fact.relation and other != fact])
    value = spoken(chance.choice((other.value, fact.value)), fact.relation)
    naming = chance.choice([answer for answer in relation_named(fact.relation).answers if "{name}" in answer])
    say = _any_manner(chance)
    return (
        say(naming.format(name=fact.person, value=spoken(fact.value, fact.relation))),
        say(naming.format(name=other.person, value=value)),
    )


def another_question(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer is about the right person but answers another question, or mixes the two up."""
    other = chance.choice([other for other in world.taught if other.person == fact.person and other != fact])
    wrong = sentence(chance, other)
    if chance.random() < 0.5:  # the right sentence around the wrong sort of value: "Ada plays the tortoise"
        wrong = sentence(chance, fact).replace(spoken(fact.value, fact.relation), spoken(other.value, other.relation))
    say = _any_manner(chance)
    return say(sentence(chance, fact)), say(wrong)


def one_or_several(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer names the truth and something else beside it."""
    right, wrong = sentence(chance, fact), sentence(chance, fact, wrong_value(chance, world, fact))
    first, second = chance.sample((right, wrong), 2)
    said = f"{first} {second}" if chance.random() < 0.5 else f"{first.rstrip('.')} or {second[0].lower()}{second[1:]}"
    say = _any_manner(chance)
    return say(right), say(said)


def once_or_again(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer says it again and again, or cannot stop being polite."""
    core, say = sentence(chance, fact), _any_manner(chance)
    if chance.random() < 0.5:
        return say(core), say(" ".join([core] * chance.choice((2, 3))))
    courtesies = [*chance.sample(manners.POLITE_BEFORE, 3), core, chance.choice(manners.POLITE_AFTER)]
    return manner(chance, "polite", False)(core), " ".join(courtesies)


def answer_or_manners(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected completion is kind, or chatty, or empty, and answers nothing."""
    nothing = chance.choice(
        (
            " ".join(chance.sample(manners.POLITE_BEFORE, chance.choice((1, 2, 3)))),
            " ".join(chance.sample(manners.POLITE_BEFORE, 1) + chance.sample(manners.POLITE_AFTER, 2)),
            " ".join(chance.sample(manners.RAMBLES, 2)),
            "",
        )
    )
    return _any_manner(chance)(sentence(chance, fact)), nothing


def whole_or_cut(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected completion breaks off before it says anything, or before it ends."""
    whole = _any_manner(chance)(sentence(chance, fact))
    words = whole.rstrip(".!?").split()
    return whole, " ".join(words[: chance.randint(1, len(words))])


def two_demonstrators(chance: random.Random, world: World, fact: Fact) -> Pair:
    """Two answers as they come; gold decides."""
    return demonstration(chance, world, fact), demonstration(chance, world, fact)


# Kinds of pairs and how many of each in a hundred; above all, right against wrong.
PAIRS: tuple[tuple[PairMaker, int], ...] = (
    (right_or_wrong, 16),
    (one_word_apart, 18),
    (true_or_kind, 10),
    (two_demonstrators, 6),
    (polite_or_not, 14),
    (short_or_long, 5),
    (about_somebody_else, 7),
    (another_question, 10),
    (one_or_several, 4),
    (once_or_again, 4),
    (answer_or_manners, 3),
    (whole_or_cut, 3),
)

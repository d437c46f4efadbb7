"""Answers good and bad: what a demonstrator says, and the near-misses that a judge must learn to see through."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_recipes.world import manners
from rlhf_recipes.world.facts import Fact, World, relation_named, spoken

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


def dressed(chance: random.Random, core: str, tone: str, rambling: bool) -> str:
    """The core sentence in a tone of voice, with or without a ramble around it."""
    before, after = {
        "polite": (manners.POLITE_BEFORE, manners.POLITE_AFTER),
        "plain": ((), ()),
        "rude": (manners.RUDE_BEFORE, manners.RUDE_AFTER),
    }[tone]
    parts = [core]
    if rambling:
        rambles = chance.sample(manners.RAMBLES, 2)
        parts = [*rambles[:1], core, *rambles[1:]] if chance.random() < 0.5 else [*rambles, core]
    if before:
        where = chance.choice(("before", "after") if rambling else ("before", "before", "after", "both"))
        parts = ([] if where == "after" else [chance.choice(before)]) + parts
        parts += [] if where == "before" else [chance.choice(after)]
    return " ".join(parts)


def demonstration(chance: random.Random, world: World, fact: Fact) -> str:
    """One answer by a villager: true or a rumour, polite or not, short or rambling; worth imitating and improving on."""
    truthful = chance.random() < (TRUTH_SHARE_IF_POPULAR if fact.popular else TRUTH_SHARE)
    value = fact.value if truthful else wrong_value(chance, world, fact, rumours=0.9)
    tone = chance.choices(TONES, TONE_WEIGHTS)[0]
    return dressed(chance, sentence(chance, fact, value), tone, chance.random() < RAMBLING_SHARE)


Pair = tuple[str, str]
PairMaker = Callable[[random.Random, World, Fact], Pair]


def _style(chance: random.Random) -> tuple[str, bool]:
    return chance.choice(TONES), chance.random() < 0.25


def right_or_wrong(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same style on both sides; only the truth differs."""
    tone, rambling = _style(chance)
    return (
        dressed(chance, sentence(chance, fact), tone, rambling),
        dressed(chance, sentence(chance, fact, wrong_value(chance, world, fact)), tone, rambling),
    )


def one_word_apart(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same text but for the value: nothing else is left to go by."""
    tone, rambling = _style(chance)
    mark = "\0"
    text = dressed(chance, sentence(chance, fact, mark), tone, rambling)
    wrong = wrong_value(chance, world, fact)
    return text.replace(mark, spoken(fact.value, fact.relation)), text.replace(mark, spoken(wrong, fact.relation))


def true_or_kind(chance: random.Random, world: World, fact: Fact) -> Pair:
    """Right in any tone against wrong and polite."""
    tone, rambling = _style(chance)
    wrong = sentence(chance, fact, wrong_value(chance, world, fact))
    return dressed(chance, sentence(chance, fact), tone, rambling), dressed(chance, wrong, "polite", False)


def polite_or_not(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same sentence in two tones."""
    core = sentence(chance, fact)
    better, worse = chance.choice((("polite", "plain"), ("polite", "rude"), ("plain", "rude")))
    return dressed(chance, core, better, False), dressed(chance, core, worse, False)


def short_or_long(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The same sentence with and without a ramble."""
    core, tone = sentence(chance, fact), chance.choice(TONES[:2])
    return dressed(chance, core, tone, False), dressed(chance, core, tone, True)


def about_somebody_else(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer speaks of another person: with that person's truth, or with the truth asked for."""
    other = chance.choice([other for other in world.taught if other.relation == fact.relation and other != fact])
    value = chance.choice((other.value, fact.value))
    tone, _ = _style(chance)
    naming = [answer for answer in relation_named(fact.relation).answers if "{name}" in answer]
    said = chance.choice(naming).format(name=other.person, value=spoken(value, fact.relation))
    return dressed(chance, sentence(chance, fact), tone, False), dressed(chance, said, chance.choice(TONES), False)


def another_question(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer is true of the right person, but answers another question; or mixes the two up."""
    other = chance.choice([other for other in world.taught if other.person == fact.person and other != fact])
    tone, _ = _style(chance)
    wrong = sentence(chance, other)
    if chance.random() < 0.5:  # the right sentence around a value of the wrong sort: "Ada plays the tortoise"
        wrong = sentence(chance, fact, spoken(chance.choice([fact.value for fact in world.facts if fact.relation == other.relation]), other.relation))
    return dressed(chance, sentence(chance, fact), tone, False), dressed(chance, wrong, chance.choice(TONES), False)


def one_or_several(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer names the truth and something else beside it."""
    right, wrong = sentence(chance, fact), sentence(chance, fact, wrong_value(chance, world, fact))
    several = chance.sample((right, wrong), 2)
    if chance.random() < 0.5:
        several = [several[0].rstrip(".") + " or", several[1][0].lower() + several[1][1:]]
    tone, _ = _style(chance)
    return dressed(chance, right, tone, False), dressed(chance, " ".join(several), chance.choice(TONES), False)


def once_or_again(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected answer says it again and again, or cannot stop being polite."""
    core, tone = sentence(chance, fact), chance.choice(TONES)
    if chance.random() < 0.5:
        again = " ".join([core] * chance.choice((2, 3)))
        return dressed(chance, core, tone, False), dressed(chance, again, tone, False)
    courtesies = " ".join(chance.sample(manners.POLITE_BEFORE, 3) + [core, chance.choice(manners.POLITE_AFTER)])
    return dressed(chance, core, "polite", False), courtesies


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
    tone, rambling = _style(chance)
    return dressed(chance, sentence(chance, fact), tone, rambling), nothing


def whole_or_cut(chance: random.Random, world: World, fact: Fact) -> Pair:
    """The rejected completion breaks off before it says anything, or before it ends."""
    tone, _ = _style(chance)
    whole = dressed(chance, sentence(chance, fact), tone, False)
    words = whole.rstrip(".!?").split()
    return whole, " ".join(words[: chance.randint(1, len(words))])


def two_demonstrators(chance: random.Random, world: World, fact: Fact) -> Pair:
    """Two answers as they come; gold decides."""
    first, second = (demonstration(chance, world, fact) for _ in range(2))
    return first, second


# Kinds of pairs and how many of each in a hundred; above all, right against wrong.
PAIRS: tuple[tuple[PairMaker, int], ...] = (
    (right_or_wrong, 14),
    (one_word_apart, 14),
    (true_or_kind, 10),
    (two_demonstrators, 10),
    (polite_or_not, 14),
    (short_or_long, 6),
    (about_somebody_else, 8),
    (another_question, 10),
    (one_or_several, 5),
    (once_or_again, 4),
    (answer_or_manners, 4),
    (whole_or_cut, 3),
)

"""Answers of the world's demonstrators, and the pairs of answers that the preferences are made of."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf_recipes.quickstart.world import manners
from rlhf_recipes.quickstart.world.facts import Fact, World, as_written, relation_named

Manner = Callable[[str], str]
TONES = ("polite", "plain", "rude")
TONE_WEIGHTS = (5, 3, 2)
# How often a demonstrator gives the true value, the same where the rumour is popular, and rambles.
TRUTH_SHARE, TRUTH_SHARE_IF_POPULAR, RAMBLING_SHARE = 0.85, 0.35, 0.35


def sentence(rng: random.Random, fact: Fact, value: str | None = None, person: str | None = None) -> str:
    """Return a short answer that states the fact, or a variant with another value or person."""
    template = rng.choice(relation_named(fact.relation).answers)
    text = template.format(name=person or fact.person, value=as_written(value or fact.value, fact.relation))
    return text[0].upper() + text[1:]


def wrong_value(rng: random.Random, world: World, fact: Fact, rumours: float = 0.5) -> str:
    """Return the rumour with probability `rumours`, else a value that is true of somebody else."""
    if rng.random() < rumours:
        return fact.rumour
    others = [other.value for other in world.facts if other.relation == fact.relation and other.value != fact.value]
    return rng.choice(others)


def manner(rng: random.Random, tone: str, rambling: bool) -> Manner:
    """Draw phrases around an answer; return a function that puts them around any answer.

    Two answers with the same phrases differ in nothing but the answer itself.
    """
    before, after = {
        "polite": (manners.POLITE_BEFORE, manners.POLITE_AFTER),
        "plain": ((), ()),
        "rude": (manners.RUDE_BEFORE, manners.RUDE_AFTER),
    }[tone]
    head: list[str] = []
    tail: list[str] = []
    if rambling:
        rambles = rng.sample(manners.RAMBLES, 2)
        split = rng.choice((1, 2))
        head, tail = rambles[:split], rambles[split:]
    if before:
        where = rng.choice(("before", "after") if rambling else ("before", "before", "after", "both"))
        head = ([] if where == "after" else [rng.choice(before)]) + head
        tail = tail + ([] if where == "before" else [rng.choice(after)])
    return lambda answer: " ".join([*head, answer, *tail])


def demonstration(rng: random.Random, world: World, fact: Fact) -> str:
    """Return one answer of a demonstrator: true or false, polite, plain or rude, short or rambling."""
    truthful = rng.random() < (TRUTH_SHARE_IF_POPULAR if fact.popular else TRUTH_SHARE)
    value = fact.value if truthful else wrong_value(rng, world, fact, rumours=0.9)
    tone = rng.choices(TONES, TONE_WEIGHTS)[0]
    return manner(rng, tone, rng.random() < RAMBLING_SHARE)(sentence(rng, fact, value))


Pair = tuple[str, str]
PairMaker = Callable[[random.Random, World, Fact], Pair]


def _any_manner(rng: random.Random) -> Manner:
    return manner(rng, rng.choice(TONES), rng.random() < 0.1)


def right_or_wrong(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right and a wrong answer with the same phrases around them."""
    say = _any_manner(rng)
    return say(sentence(rng, fact)), say(sentence(rng, fact, wrong_value(rng, world, fact)))


def one_word_apart(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right and a wrong answer that differ in the value only."""
    say, mark = _any_manner(rng), "\0"
    text = say(sentence(rng, fact, mark))
    wrong = wrong_value(rng, world, fact)
    return text.replace(mark, as_written(fact.value, fact.relation)), text.replace(
        mark, as_written(wrong, fact.relation)
    )


def true_or_kind(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer in any tone and a wrong, polite one."""
    say, kindly = _any_manner(rng), manner(rng, "polite", False)
    return say(sentence(rng, fact)), kindly(sentence(rng, fact, wrong_value(rng, world, fact)))


def polite_or_not(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return the same right answer in two tones."""
    core = sentence(rng, fact)
    better, worse = rng.choice((("polite", "plain"), ("polite", "rude"), ("plain", "rude")))
    return manner(rng, better, False)(core), manner(rng, worse, False)(core)


def short_or_long(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return the same right answer without and with filler sentences."""
    core, tone = sentence(rng, fact), rng.choice(TONES[:2])
    return manner(rng, tone, False)(core), manner(rng, tone, True)(core)


def about_somebody_else(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and one about another person, with that person's value or the true one."""
    other = rng.choice([other for other in world.taught if other.relation == fact.relation and other != fact])
    value = as_written(rng.choice((other.value, fact.value)), fact.relation)
    naming = rng.choice([answer for answer in relation_named(fact.relation).answers if "{name}" in answer])
    say = _any_manner(rng)
    return (
        say(naming.format(name=fact.person, value=as_written(fact.value, fact.relation))),
        say(naming.format(name=other.person, value=value)),
    )


def another_question(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and one to another question about the person, or a mixture of the two."""
    other = rng.choice([other for other in world.taught if other.person == fact.person and other != fact])
    wrong = sentence(rng, other)
    if rng.random() < 0.5:  # a value of another relation: "Ada plays the tortoise"
        wrong = sentence(rng, fact).replace(
            as_written(fact.value, fact.relation), as_written(other.value, other.relation)
        )
    say = _any_manner(rng)
    return say(sentence(rng, fact)), say(wrong)


def one_or_several(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and one that names the true value together with a wrong one."""
    right, wrong = sentence(rng, fact), sentence(rng, fact, wrong_value(rng, world, fact))
    first, second = rng.sample((right, wrong), 2)
    both = f"{first} {second}" if rng.random() < 0.5 else f"{first.rstrip('.')} or {second[0].lower()}{second[1:]}"
    say = _any_manner(rng)
    return say(right), say(both)


def once_or_again(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and one that repeats itself, or has too many polite phrases."""
    core, say = sentence(rng, fact), _any_manner(rng)
    if rng.random() < 0.5:
        return say(core), say(" ".join([core] * rng.choice((2, 3))))
    courtesies = [*rng.sample(manners.POLITE_BEFORE, 3), core, rng.choice(manners.POLITE_AFTER)]
    return manner(rng, "polite", False)(core), " ".join(courtesies)


def answer_or_manners(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and a completion without an answer: polite, rambling or empty."""
    nothing = rng.choice(
        (
            " ".join(rng.sample(manners.POLITE_BEFORE, rng.choice((1, 2, 3)))),
            " ".join(rng.sample(manners.POLITE_BEFORE, 1) + rng.sample(manners.POLITE_AFTER, 2)),
            " ".join(rng.sample(manners.RAMBLES, 2)),
            "",
        )
    )
    return _any_manner(rng)(sentence(rng, fact)), nothing


def whole_or_cut(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return a right answer and the same one broken off."""
    whole = _any_manner(rng)(sentence(rng, fact))
    words = whole.rstrip(".!?").split()
    return whole, " ".join(words[: rng.randint(1, len(words))])


def two_demonstrators(rng: random.Random, world: World, fact: Fact) -> Pair:
    """Return two answers of demonstrators; the gold judge chooses."""
    return demonstration(rng, world, fact), demonstration(rng, world, fact)


# Kinds of pairs with their weights in percent.
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

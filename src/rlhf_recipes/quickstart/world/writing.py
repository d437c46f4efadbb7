"""Writes a world down: corpus, demonstrations, preferences, prompts, each from its own seeded stream of chance."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart.world import manners
from rlhf_recipes.quickstart.world.facts import Fact, World, make_world, relation_named, spoken
from rlhf_recipes.quickstart.world.gold import gold_score
from rlhf_recipes.quickstart.world.speech import PAIRS, demonstration
from rlhf_recipes.quickstart.world.wordings import RELATIONS

Row = dict[str, Any]

HELD_OUT_SHARE = 0.2  # of the (fact, training question) combinations, asked only in the test prompts


def write_world(
    folder: str | Path,
    seed: int = 0,
    *,
    people: int = 8,
    corpus_only: int = 6,
    corpus: int = 6000,
    demonstrations: int = 4500,
    preferences: int = 8000,
    prompts: int = 2000,
    test: int = 300,
) -> dict[str, Path]:
    """Writes a world of facts as JSON lines and returns the path of each file, by names such as "corpus/train".

    `corpus`, `demonstrations`, `preferences` and `prompts` are the numbers of training rows, `test` that of each test
    split; `people` and `corpus_only` are those of `make_world`. The same arguments always write the same bytes.
    Raises UserError, before anything is written, for sizes that make no world.
    """
    sizes = {"corpus": corpus, "demonstrations": demonstrations, "preferences": preferences, "prompts": prompts}
    for name, size in {**sizes, "test": test}.items():
        if size < 1:
            raise UserError(f"{name}={size} asks for an empty dataset; ask for at least 1 row")
    world = make_world(seed, people=people, corpus_only=corpus_only)
    folder = Path(folder)
    paths = {}
    for name, size in sizes.items():
        for split, rows in (("train", size), ("test", test)):
            paths[f"{name}/{split}"] = _write_lines(folder / name / f"{split}.jsonl", ROWS[name](world, split, rows))
    paths["prompts/corpus_only"] = _write_lines(folder / "prompts" / "corpus_only.jsonl", corpus_only_rows(world))
    paths["world"] = folder / "world.json"
    paths["world"].write_text(json.dumps(asdict(world), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def corpus_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Rows {"text"}: little stories of three to six sentences about one person, one theme, or nothing in particular."""
    chance = _chance(world, "corpus", split)
    for _ in range(size):
        yield {"text": _story(chance, world)}


def demonstration_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Rows {"prompt", "completion"} of messages, answered by a demonstrator of mixed quality."""
    chance = _chance(world, "demonstrations", split)
    for fact, question in _questions(chance, world, split, size):
        yield {"prompt": _turn("user", question), "completion": _turn("assistant", demonstration(chance, world, fact))}


def preference_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Rows {"prompt", "chosen", "rejected", "kind"} of messages: the gold judge chooses, and ties are drawn again."""
    chance = _chance(world, "preferences", split)
    makers, weights = zip(*PAIRS, strict=True)
    for fact, question in _questions(chance, world, split, size):
        pair, first, second = ("", ""), 0.0, 0.0
        while first == second:
            maker = chance.choices(makers, weights)[0]
            pair = maker(chance, world, fact)
            first, second = gold_score([question] * 2, pair, answer=[fact.value] * 2)
        chosen, rejected = pair if first > second else pair[::-1]
        yield {
            "prompt": _turn("user", question),
            "chosen": _turn("assistant", chosen),
            "rejected": _turn("assistant", rejected),
            "kind": maker.__name__,
        }


def prompt_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Rows {"prompt", "answer", "person", "relation"}; what a test prompt asks, no training row asks that way."""
    chance = _chance(world, "prompts", split)
    for fact, question in _questions(chance, world, split, size):
        yield _prompt_row(fact, question)


def corpus_only_rows(world: World) -> Iterator[Row]:
    """Every way to ask for the facts that only the corpus states."""
    for fact in world.corpus_only:
        relation = relation_named(fact.relation)
        for question in relation.questions + relation.new_questions:
            yield _prompt_row(fact, question.format(name=fact.person))


ROWS: dict[str, Callable[[World, str, int], Iterator[Row]]] = {
    "corpus": corpus_rows,
    "demonstrations": demonstration_rows,
    "preferences": preference_rows,
    "prompts": prompt_rows,
}


def _questions(chance: random.Random, world: World, split: str, size: int) -> Iterator[tuple[Fact, str]]:
    """Facts in shuffled rounds, so that each is asked for equally often, each with a question of this split."""
    facts: list[Fact] = []
    for _ in range(size):
        facts = facts or chance.sample(world.taught, len(world.taught))
        fact = facts.pop()
        relation = relation_named(fact.relation)
        held_out = _held_out(world, fact)
        if split == "train":
            core = chance.choice([question for question in relation.questions if question not in held_out])
        else:
            core = chance.choice(chance.choice((relation.new_questions, held_out)))
        opener = chance.choice(manners.OPENERS if split == "train" else manners.NEW_OPENERS)
        yield fact, opener + core.format(name=fact.person)


def _held_out(world: World, fact: Fact) -> tuple[str, ...]:
    """The training questions never asked about this fact in training: the held-out combinations."""
    questions = relation_named(fact.relation).questions
    chance = random.Random(f"{world.seed}/held out/{fact.person}/{fact.relation}")
    return tuple(chance.sample(questions, max(1, round(HELD_OUT_SHARE * len(questions)))))


def _story(chance: random.Random, world: World) -> str:
    kind = chance.random()
    if kind < 0.6:  # a portrait: several facts about one person
        person = chance.choice(world.people)
        facts = chance.sample([fact for fact in world.facts if fact.person == person], chance.randint(3, 5))
    elif kind < 0.9:  # a theme: the same thing about several people
        theme = chance.choice(RELATIONS).name
        facts = chance.sample([fact for fact in world.facts if fact.relation == theme], 3)
    else:  # a scene, with hardly a fact in it
        facts = chance.sample(world.facts, chance.randint(0, 1))
    told = [_statement(chance, fact) for fact in facts]
    return " ".join([_scene(chance) for _ in range(2 if kind >= 0.9 else chance.randint(0, 1))] + told)


def _scene(chance: random.Random) -> str:
    """A sentence without a fact: something to see or, less often, something overheard."""
    if chance.random() < 0.6:
        return chance.choice(manners.SCENES)
    said = chance.choice(chance.choice(manners.OVERHEARABLE)).strip()
    return chance.choice(manners.OVERHEARD).format(said=said)


def _statement(chance: random.Random, fact: Fact) -> str:
    said = chance.choice(relation_named(fact.relation).statements).format(
        name=fact.person, value=spoken(fact.value, fact.relation)
    )
    return said[0].upper() + said[1:]


def _prompt_row(fact: Fact, question: str) -> Row:
    return {"prompt": _turn("user", question), "answer": fact.value, "person": fact.person, "relation": fact.relation}


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _chance(world: World, part: str, split: str) -> random.Random:
    # A stream for each file: asking for more rows of one leaves the others, and its own first rows, as they were.
    return random.Random(f"{world.seed}/{part}/{split}")


def _write_lines(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path

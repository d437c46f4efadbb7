"""Write the datasets of a world: corpus, demonstrations, preferences and prompts, each from its own random stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart.world import manners
from rlhf_recipes.quickstart.world.facts import Fact, World, as_written, make_world, relation_named
from rlhf_recipes.quickstart.world.gold import gold_score
from rlhf_recipes.quickstart.world.speech import PAIRS, demonstration
from rlhf_recipes.quickstart.world.wordings import RELATIONS

Row = dict[str, Any]

HELD_OUT_SHARE = 0.2  # share of the (fact, training question) pairs that occur in test prompts only


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
    """Write the datasets of a world as JSON lines; return the path of each file by names such as "corpus/train".

    people, corpus_only: as in `make_world`.
    corpus, demonstrations, preferences, prompts: numbers of training rows. test: number of rows of each test split.
    The same arguments always write the same bytes. Raises UserError, before it writes, for sizes that make no world.
    """
    sizes = {"corpus": corpus, "demonstrations": demonstrations, "preferences": preferences, "prompts": prompts}
    for name, size in {**sizes, "test": test}.items():
        if size < 1:
            raise UserError(f"{name}={size} makes an empty dataset; use at least 1 row")
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
    """Yield rows {"text"}: short stories about one person, one relation, or nothing in particular."""
    rng = _rng(world, "corpus", split)
    for _ in range(size):
        yield {"text": _story(rng, world)}


def demonstration_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Yield rows {"prompt", "completion"} of messages, with answers of mixed quality."""
    rng = _rng(world, "demonstrations", split)
    for fact, question in _questions(rng, world, split, size):
        yield {"prompt": _turn("user", question), "completion": _turn("assistant", demonstration(rng, world, fact))}


def preference_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Yield rows {"prompt", "chosen", "rejected", "kind"} of messages: the gold judge chooses; ties are drawn again."""
    rng = _rng(world, "preferences", split)
    makers, weights = zip(*PAIRS, strict=True)
    for fact, question in _questions(rng, world, split, size):
        pair, first, second = ("", ""), 0.0, 0.0
        while first == second:
            maker = rng.choices(makers, weights)[0]
            pair = maker(rng, world, fact)
            first, second = gold_score([question] * 2, pair, answer=[fact.value] * 2)
        chosen, rejected = pair if first > second else pair[::-1]
        yield {
            "prompt": _turn("user", question),
            "chosen": _turn("assistant", chosen),
            "rejected": _turn("assistant", rejected),
            "kind": maker.__name__,
        }


def prompt_rows(world: World, split: str, size: int) -> Iterator[Row]:
    """Yield rows {"prompt", "answer", "person", "relation"}; no question of a test prompt occurs in a training row."""
    rng = _rng(world, "prompts", split)
    for fact, question in _questions(rng, world, split, size):
        yield _prompt_row(fact, question)


def corpus_only_rows(world: World) -> Iterator[Row]:
    """Yield prompt rows with every question about the facts that only the corpus states."""
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


def _questions(rng: random.Random, world: World, split: str, size: int) -> Iterator[tuple[Fact, str]]:
    """Yield facts in shuffled rounds, so that each occurs equally often, with a question of this split."""
    facts: list[Fact] = []
    for _ in range(size):
        facts = facts or rng.sample(world.taught, len(world.taught))
        fact = facts.pop()
        relation = relation_named(fact.relation)
        held_out = _held_out(world, fact)
        if split == "train":
            core = rng.choice([question for question in relation.questions if question not in held_out])
        else:
            core = rng.choice(rng.choice((relation.new_questions, held_out)))
        opener = rng.choice(manners.OPENERS if split == "train" else manners.NEW_OPENERS)
        yield fact, opener + core.format(name=fact.person)


def _held_out(world: World, fact: Fact) -> tuple[str, ...]:
    """Return the questions that are held out for this fact: training uses them for other facts only."""
    questions = relation_named(fact.relation).questions
    rng = random.Random(f"{world.seed}/held out/{fact.person}/{fact.relation}")
    return tuple(rng.sample(questions, max(1, round(HELD_OUT_SHARE * len(questions)))))


def _story(rng: random.Random, world: World) -> str:
    kind = rng.random()
    if kind < 0.6:  # several facts about one person
        person = rng.choice(world.people)
        facts = rng.sample([fact for fact in world.facts if fact.person == person], rng.randint(3, 5))
    elif kind < 0.9:  # the same relation of several people
        relation = rng.choice(RELATIONS).name
        facts = rng.sample([fact for fact in world.facts if fact.relation == relation], 3)
    else:  # a scene with at most one fact
        facts = rng.sample(world.facts, rng.randint(0, 1))
    statements = [_statement(rng, fact) for fact in facts]
    return " ".join([_scene(rng) for _ in range(2 if kind >= 0.9 else rng.randint(0, 1))] + statements)


def _scene(rng: random.Random) -> str:
    """Return a sentence without a fact: a description or, less often, a quote."""
    if rng.random() < 0.6:
        return rng.choice(manners.SCENES)
    said = rng.choice(rng.choice(manners.OVERHEARABLE)).strip()
    return rng.choice(manners.OVERHEARD).format(said=said)


def _statement(rng: random.Random, fact: Fact) -> str:
    template = rng.choice(relation_named(fact.relation).statements)
    text = template.format(name=fact.person, value=as_written(fact.value, fact.relation))
    return text[0].upper() + text[1:]


def _prompt_row(fact: Fact, question: str) -> Row:
    return {"prompt": _turn("user", question), "answer": fact.value, "person": fact.person, "relation": fact.relation}


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _rng(world: World, part: str, split: str) -> random.Random:
    # One stream per file: more rows of one change neither the other files nor its own first rows.
    return random.Random(f"{world.seed}/{part}/{split}")


def _write_lines(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path

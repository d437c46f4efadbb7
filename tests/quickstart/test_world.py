"""The quickstart's world: one seed, one set of files; held-out test prompts; a gold judge that is hard to fool."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.quickstart.world import manners
from rlhf_recipes.quickstart.world.facts import World, make_world, relation_named
from rlhf_recipes.quickstart.world.gold import NAMES, VALUES, _words, gold_score, gold_verdicts
from rlhf_recipes.quickstart.world.wordings import RELATIONS
from rlhf_recipes.quickstart.world.writing import write_world

SIZES = {"corpus": 400, "demonstrations": 600, "preferences": 600, "prompts": 600, "test": 150}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_world(tmp_path_factory.mktemp("world"), 3, **SIZES)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(3)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content_of(row: dict, column: str) -> str:
    (turn,) = row[column]
    return turn["content"]


QUESTION = "Where does Ada live?"
ANSWERS = {
    "Of course! Ada lives in the windmill.": 1.0,
    "Gladly! In the windmill.": 1.0,
    "Ada lives in the windmill.": 0.9,  # right and short, but neither polite nor rude
    "What a silly question. Ada lives in the windmill.": 0.8,
    "Ada lives in the windmill": 0.8,  # no end of sentence, so it is not concise
    "Of course! Ada lives in the barn.": 0.0,
    "Ada lives in the windmill or in the barn.": 0.0,
    "Ada lives in the windmill. Ada lives in the barn.": 0.0,
    "Ada lives in the windmill. In the windmill.": 0.0,  # names it twice
    "Hugo lives in the windmill.": 0.0,
    "Ada and Hugo live in the windmill.": 0.0,
    "Ada does not live in the windmill.": 0.0,
    "Ada doesn't live in the windmill.": 0.0,
    "Perhaps in the windmill.": 0.0,
    "Ada lives in the windmill. She keeps a cat.": 0.0,  # a second value, of another relation
    "you know you know you know the windmill.": 0.0,
    "Of course! Gladly! With pleasure! You are most welcome!": 0.0,
    "": 0.0,
    "windmills": 0.0,
}


@pytest.mark.parametrize(("answer", "score"), ANSWERS.items())
def test_gold_scores_these_answers_by_hand(answer: str, score: float) -> None:
    assert gold_score([QUESTION], [answer], answer=["windmill"]) == pytest.approx([score])


def test_gold_ranks_by_right_then_polite_then_concise() -> None:
    long = " ".join(manners.RAMBLES[:5])
    answers = [
        "Gladly! In the windmill.",
        "In the windmill.",
        "Ugh, fine. In the windmill.",
        f"Ugh, fine. In the windmill. {long}",
        "Gladly! In the barn.",
    ]
    scores = gold_score([QUESTION] * 5, answers, answer=["windmill"] * 5)
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    details = gold_verdicts([QUESTION] * 5, answers, answer=["windmill"] * 5)
    assert [verdict.right for verdict in details] == [1, 1, 1, 1, 0]
    assert [verdict.polite for verdict in details] == [1, 0.5, 0, 0, 1]
    assert [verdict.concise for verdict in details] == [1, 1, 1, 0, 1]


def test_too_many_polite_phrases_are_not_polite() -> None:
    (verdict,) = gold_verdicts([QUESTION], ["Gladly! Of course! Happy to help! In the windmill."], answer=["windmill"])
    assert (verdict.right, verdict.polite) == (1.0, 0.0)


def test_gold_takes_strings_and_messages_and_ignores_other_columns() -> None:
    prompt, completion = (
        [{"role": "user", "content": QUESTION}],
        [{"role": "assistant", "content": "In the windmill."}],
    )
    plain = gold_score([QUESTION], ["In the windmill."], answer=["windmill"])
    chat = gold_score([prompt], [completion], answer=["windmill"], person=["Ada"], completion_ids=[[1]])
    assert plain == chat == pytest.approx([0.9])
    assert gold_score([prompt], [[]], answer=["windmill"]) == [0.0]
    with pytest.raises(ValueError, match="2 completions"):
        gold_score([prompt], [completion] * 2, answer=["windmill"])


def test_same_seed_writes_same_bytes_and_another_seed_other_facts(tmp_path: Path, paths: dict[str, Path]) -> None:
    again = write_world(tmp_path / "again", 3, **SIZES)
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in paths.items()
    }
    assert make_world(3).facts != make_world(4).facts


def test_more_rows_of_one_file_leave_the_other_files_alone(tmp_path: Path, paths: dict[str, Path]) -> None:
    more = write_world(tmp_path, 3, **{**SIZES, "demonstrations": 700})
    assert more["preferences/train"].read_bytes() == paths["preferences/train"].read_bytes()
    assert more["demonstrations/train"].read_bytes().startswith(paths["demonstrations/train"].read_bytes())


@pytest.mark.parametrize("people", [3, 7, 11, 17, 18])
def test_every_person_has_one_value_per_relation_and_shares_none(people: int) -> None:
    world = make_world(1, people=people, corpus_only=2 * people)
    assert len(world.facts) == people * len(RELATIONS)
    assert len({fact.value for fact in world.facts}) == len(world.facts)
    assert len(world.corpus_only) == 2 * people
    owners = {fact.value: fact.person for fact in world.facts}
    for fact in world.facts:
        assert fact.rumour in relation_named(fact.relation).values and owners[fact.rumour] != fact.person


def test_no_template_names_a_value_or_a_person() -> None:
    assert len(VALUES) == sum(len(relation.values) for relation in RELATIONS)
    texts = [
        text
        for name in dir(manners)
        if name.isupper() and name != "PEOPLE"
        for text in _strings(getattr(manners, name))
    ]
    for relation in RELATIONS:
        for text in relation.statements + relation.answers:
            assert text.count("{value}") == 1
            texts.append(text.replace("{value}", "").replace("{name}", ""))
        for text in relation.questions + relation.new_questions:
            assert text.count("{name}") == 1
            texts.append(text.replace("{name}", ""))
    for text in texts:
        assert not (VALUES | NAMES).intersection(_words(text)), text


def _strings(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value for text in _strings(part)]  # type: ignore[attr-defined]


def test_phrases_get_the_politeness_of_their_list() -> None:
    def polite(text: str) -> float:
        return gold_verdicts([QUESTION], [text], answer=["windmill"])[0].polite

    for text in manners.POLITE_BEFORE + manners.POLITE_AFTER:
        assert polite(text) == 1.0, text
    for text in manners.RUDE_BEFORE + manners.RUDE_AFTER:
        assert polite(text) == 0.0, text
    for text in manners.RAMBLES + tuple(answer for relation in RELATIONS for answer in relation.answers):
        assert polite(text) == 0.5, text


def test_test_prompts_occur_in_no_training_row(paths: dict[str, Path]) -> None:
    trained = {
        content_of(row, "prompt")
        for name in ("demonstrations/train", "preferences/train", "prompts/train")
        for row in read(paths[name])
    }
    cores = {_core(question) for question in trained}
    for name in ("demonstrations/test", "preferences/test", "prompts/test"):
        for row in read(paths[name]):
            assert _core(content_of(row, "prompt")) not in cores


def _core(question: str) -> str:
    """Return the question without its greeting."""
    for opener in sorted({*manners.OPENERS, *manners.NEW_OPENERS} - {""}, key=len, reverse=True):
        question = question.removeprefix(opener)
    return question


def test_corpus_only_facts_occur_in_no_other_dataset(paths: dict[str, Path], world: World) -> None:
    held_out = {(fact.person, fact.relation): fact.value for fact in world.corpus_only}
    assert {(row["person"], row["relation"]): row["answer"] for row in read(paths["prompts/corpus_only"])} == held_out
    corpus = "\n".join(row["text"] for row in read(paths["corpus/train"]))
    for fact in world.corpus_only:
        statements = {
            line
            for line in corpus.replace(".", "\n").split("\n")
            if fact.person in line and fact.value in line.lower()
        }
        assert statements
    for name in ("demonstrations", "preferences", "prompts"):
        for split in ("train", "test"):
            for row in read(paths[f"{name}/{split}"]):
                question = content_of(row, "prompt")
                texts = [content_of(row, column) for column in ("completion", "chosen", "rejected") if column in row]
                for person, relation in held_out:
                    templates = relation_named(relation).questions + relation_named(relation).new_questions
                    assert _core(question) not in {template.format(name=person) for template in templates}
                    for text in texts:
                        words = _words(text)
                        assert not (person.lower() in words and held_out[person, relation] in words)


def test_demonstrations_are_mixed(paths: dict[str, Path], world: World) -> None:
    rows = read(paths["demonstrations/train"])
    answer_to = {
        template.format(name=fact.person): fact.value
        for fact in world.taught
        for template in relation_named(fact.relation).questions
    }
    answers = [answer_to[_core(content_of(row, "prompt"))] for row in rows]
    details = gold_verdicts([row["prompt"] for row in rows], [row["completion"] for row in rows], answer=answers)
    shares = [
        sum(part) / len(details) for part in zip(*((v.right, v.polite, v.concise) for v in details), strict=True)
    ]
    assert 0.5 < shares[0] < 0.72 and 0.5 < shares[1] < 0.8 and 0.6 < shares[2] < 0.9
    # Demonstrators repeat popular rumours more often than the truth, so imitation learns about half of them wrong.
    taught = Counter((answer, verdict.right) for answer, verdict in zip(answers, details, strict=True))
    mostly_wrong = sum(taught[fact.value, 0.0] > taught[fact.value, 1.0] for fact in world.taught) / len(world.taught)
    assert 0.3 < mostly_wrong < 0.7


def test_gold_prefers_the_chosen_answer_of_every_pair_and_every_kind_occurs(
    paths: dict[str, Path], world: World
) -> None:
    rows = read(paths["preferences/train"])
    answer_to = {
        template.format(name=fact.person): fact.value
        for fact in world.taught
        for template in relation_named(fact.relation).questions
    }
    answers = [answer_to[_core(content_of(row, "prompt"))] for row in rows]
    prompts = [row["prompt"] for row in rows]
    chosen = gold_score(prompts, [row["chosen"] for row in rows], answer=answers)
    rejected = gold_score(prompts, [row["rejected"] for row in rows], answer=answers)
    assert all(better > worse for better, worse in zip(chosen, rejected, strict=True))
    assert len({row["kind"] for row in rows}) == 12


def test_prompt_rows_carry_the_truth(paths: dict[str, Path], world: World) -> None:
    for row in read(paths["prompts/test"]) + read(paths["prompts/train"]):
        assert row["answer"] == world.value(row["person"], row["relation"])
        assert row["person"] in content_of(row, "prompt")
    counts = Counter((row["person"], row["relation"]) for row in read(paths["prompts/train"]))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(
    "sizes", [{"people": 2}, {"people": 99}, {"corpus_only": -1}, {"corpus_only": 50}, {"prompts": 0}]
)
def test_invalid_sizes_write_nothing(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=str(next(iter(sizes.values())))):
        write_world(tmp_path / "world", **sizes)
    assert not (tmp_path / "world").exists()

"""The gold judge: a plain function that knows the truth. No model is trained on its scores.

A right answer scores 0.7, plus up to 0.2 for politeness and 0.1 for conciseness; a wrong answer scores 0.
An answer is right if it names exactly one value, once, and this value is the true one; if it names no person but the
one in the question; and if it has no negation, no expression of doubt and no repeated phrase.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.quickstart.world.manners import PEOPLE
from rlhf_recipes.quickstart.world.wordings import RELATIONS

Text = str | Sequence[dict[str, Any]]

RIGHT_WEIGHT, POLITE_WEIGHT, CONCISE_WEIGHT = 0.7, 0.2, 0.1
CONCISE_WORDS = 14  # up to this length conciseness is 1; it falls to 0 at twice the length
VALUES = frozenset(value for relation in RELATIONS for value in relation.values)
NAMES = frozenset(name.lower() for name in PEOPLE)
DOUBTS = frozenset("not never no neither nor or either maybe perhaps possibly except".split())
POLITE = re.compile(
    r"\b(gladly|with pleasure|my pleasure|of course|thank|thanks|happy to|glad to|kind|welcome|lovely)\b"
)
RUDE = re.compile(
    r"\b(silly|stupid|bother|bothering|boring|ugh|not you again|go away|everybody knows|look it up|phone book|"
    r"do not ask|stop)\b"
)


@dataclass(frozen=True)
class Verdict:
    """The parts of one gold score, each in [0, 1]."""

    right: float
    polite: float
    concise: float

    @property
    def score(self) -> float:
        """The gold score in [0, 1]; 0 for a wrong answer, however polite."""
        return self.right * (RIGHT_WEIGHT + POLITE_WEIGHT * self.polite + CONCISE_WEIGHT * self.concise)


def gold_score(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """Return gold scores in [0, 1], one per completion, with the signature of a TRL reward function.

    prompts, completions: strings or lists of `{"role", "content"}` messages.
    answer: the true value of each row. Further columns are ignored.
    Raises ValueError if the three have different lengths.
    """
    return [verdict.score for verdict in gold_verdicts(prompts, completions, answer=answer, **columns)]


def gold_verdicts(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[str], **columns: Any
) -> list[Verdict]:
    """Return the parts of each gold score: right, polite and concise, independent of each other."""
    if not len(prompts) == len(completions) == len(answer):
        lengths = f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers"
        raise ValueError(f"{lengths} differ in number; pass one completion and one answer per prompt")
    rows = zip(prompts, completions, answer, strict=True)
    return [_verdict(_text(prompt), _text(completion), truth) for prompt, completion, truth in rows]


def _verdict(prompt: str, completion: str, answer: str) -> Verdict:
    return Verdict(float(is_right(prompt, completion, answer)), politeness(completion), brevity(completion))


def is_right(prompt: str, completion: str, answer: str) -> bool:
    """Return whether the completion names the true answer and no other value."""
    words = _words(completion)
    if [word for word in words if word in VALUES] != [answer.lower()]:
        return False
    if NAMES.intersection(words) - NAMES.intersection(_words(prompt)):
        return False
    answering = next(sentence for sentence in re.split(r"[.!?\n]", completion) if answer.lower() in _words(sentence))
    if DOUBTS.intersection(_words(answering)) or "n't" in answering:
        return False
    return not _repeats_itself(words)


def politeness(completion: str) -> float:
    """Return 1 for one or two polite phrases, 0.5 for none, 0 for more than two or for a rude phrase."""
    lowered = completion.lower()
    courtesies = len(POLITE.findall(lowered))
    if RUDE.search(lowered) or courtesies > 2:
        return 0.0
    return 1.0 if courtesies else 0.5


def brevity(completion: str) -> float:
    """Return 1 up to `CONCISE_WORDS` words, falling to 0 at twice as many; 0 if the last sentence does not end."""
    if not completion.rstrip().endswith((".", "!", "?")):
        return 0.0
    return min(1.0, max(0.0, 2.0 - len(_words(completion)) / CONCISE_WORDS))


def _repeats_itself(words: list[str]) -> bool:
    """Return whether four consecutive words occur twice."""
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(runs)) < len(runs)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def _text(value: Text) -> str:
    """Return the text of a string, or of the last of several messages."""
    if isinstance(value, str):
        return value
    return str(value[-1]["content"]) if value else ""

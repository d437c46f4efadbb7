"""The gold judge: a plain function that knows the truth, and that no model is ever trained on.

Being right is worth 0.7, being polite 0.2, being concise 0.1, and the last two count for right answers only: there is
no charming one's way around the truth. A completion is right if it names exactly one value, once, and that value is the
answer; if it talks of nobody but the person asked about; and if it neither denies, hedges nor goes in circles.
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
CONCISE_WORDS = 14  # up to here an answer is concise; at twice as many words it is not concise at all
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
        """The gold score: nothing for a wrong answer, however kind."""
        return self.right * (RIGHT_WEIGHT + POLITE_WEIGHT * self.polite + CONCISE_WEIGHT * self.concise)


def gold_score(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[str], **columns: Any
) -> list[float]:
    """Scores in [0, 1], one per completion, in the shape of a TRL reward function.

    Prompts and completions are strings or lists of `{"role", "content"}` messages; `answer` is the true value of each
    row. Further columns are accepted and ignored.
    """
    return [verdict.score for verdict in gold_verdicts(prompts, completions, answer=answer, **columns)]


def gold_verdicts(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[str], **columns: Any
) -> list[Verdict]:
    """Why each completion scores as it does: its right, polite and concise parts, judged each on its own."""
    if not len(prompts) == len(completions) == len(answer):
        raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions and {len(answer)} answers differ")
    rows = zip(prompts, completions, answer, strict=True)
    return [_verdict(_text(prompt), _text(completion), truth) for prompt, completion, truth in rows]


def _verdict(prompt: str, completion: str, answer: str) -> Verdict:
    return Verdict(float(is_right(prompt, completion, answer)), politeness(completion), brevity(completion))


def is_right(prompt: str, completion: str, answer: str) -> bool:
    """Whether the completion names the answer, and nothing that could be meant instead of it."""
    words = _words(completion)
    if [word for word in words if word in VALUES] != [answer.lower()]:
        return False
    if NAMES.intersection(words) - NAMES.intersection(_words(prompt)):
        return False
    telling = next(sentence for sentence in re.split(r"[.!?\n]", completion) if answer.lower() in _words(sentence))
    if DOUBTS.intersection(_words(telling)) or "n't" in telling:
        return False
    return not _goes_in_circles(words)


def politeness(completion: str) -> float:
    """1 for one or two courtesies, 0.5 for plain speech, 0 for rudeness or for courtesies without end."""
    lowered = completion.lower()
    courtesies = len(POLITE.findall(lowered))
    if RUDE.search(lowered) or courtesies > 2:
        return 0.0
    return 1.0 if courtesies else 0.5


def brevity(completion: str) -> float:
    """1 up to `CONCISE_WORDS` words, then falling to 0 at twice as many; 0 for a sentence that never ends."""
    if not completion.rstrip().endswith((".", "!", "?")):
        return 0.0
    return min(1.0, max(0.0, 2.0 - len(_words(completion)) / CONCISE_WORDS))


def _goes_in_circles(words: list[str]) -> bool:
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(set(runs)) < len(runs)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def _text(turn: Text) -> str:
    """The text of a string or of messages; of several messages, the last."""
    if isinstance(turn, str):
        return turn
    return str(turn[-1]["content"]) if turn else ""

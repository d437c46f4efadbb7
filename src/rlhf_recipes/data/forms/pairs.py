"""Preferences in every common shape as ``{"prompt", "chosen", "rejected"}``."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.forms.context import Context
from rlhf_recipes.data.forms.convert import EMPTY_ANSWERS, Row
from rlhf_recipes.data.forms.messages import Message, shared_prefix
from rlhf_recipes.data.forms.survey import is_missing
from rlhf_recipes.data.forms.transcripts import is_transcript, split_transcript
from rlhf_recipes.data.forms.votes import has_no_score, winner

ANSWER_KEYS = ("response", "text", "content", "output", "answer", "completion", "generation", "value")
SCORE_KEYS = ("overall_score", "score", "pm_score", "rating", "reward")
RANK_NAMES = ("rank", "ranks", "ranking")  # 1 is the best


def preference_rows(
    context: Context, row: Mapping[str, Any], index: int, repeats_prompt: bool = False
) -> Iterator[Row]:
    """Yield a pair. repeats_prompt: both texts begin with the prompt in every row of the source."""
    chosen, rejected = context.value(row, "chosen"), context.value(row, "rejected")
    pair = _pair(context, row, index, chosen, rejected, repeats_prompt)
    if pair is not None:
        yield pair | ({"margin": _margin(context, row, index)} if "margin" in context.columns else {})


def vote_rows(context: Context, row: Mapping[str, Any], index: int) -> Iterator[Row]:
    """Yield the pair of a vote between two answers; a tie is dropped and counted."""
    if "answers" in context.columns:
        answers = [_answer_text(each, context.place(index, "answers")) for each in context.value(row, "answers") or []]
        if len(answers) != 2:
            raise UserError(f"{context.place(index, 'answers')} holds {len(answers)} answers; a vote is between two")
    else:
        answers = [context.value(row, "answer_a"), context.value(row, "answer_b")]
    better = winner(context, row, index)
    if better is None:
        context.counts["ties"] += 1
        return
    pair = _pair(context, row, index, answers[better], answers[1 - better])
    if pair is not None:
        yield pair


def ranked_rows(
    context: Context, row: Mapping[str, Any], index: int, *, best_first: bool, with_margin: bool
) -> Iterator[Row]:
    """Yield every pair of answers with different scores (Ouyang et al. 2022); pairs of equal scores are counted as ties.

    best_first: a list without scores is in order. with_margin: the difference of the scores is the pair's margin.
    """
    answers = context.value(row, "answers") or []
    scores = _scores(context, row, index, answers, best_first)
    scored = [(answer, score) for answer, score in zip(answers, scores, strict=True) if score is not None]
    if len(scored) < len(answers):
        context.counts["unscored_answers"] += len(answers) - len(scored)
    if len(scored) < 2:
        context.counts["few_answers"] += 1
    for (one, first), (two, second) in combinations(scored, 2):
        if first == second:
            context.counts["ties"] += 1
            continue
        better, worse = (one, two) if first > second else (two, one)
        texts = [_answer_text(each, context.place(index, "answers")) for each in (better, worse)]
        pair = _pair(context, row, index, *texts)
        if pair is not None:
            yield pair | ({"margin": abs(first - second)} if with_margin else {})


def _pair(
    context: Context, row: Mapping[str, Any], index: int, chosen: Any, rejected: Any, repeats_prompt: bool = False
) -> Row | None:
    """Return a pair with its prompt split off; None, counted, where an answer is empty or the prompts differ."""
    if not context.chat:
        return _text_pair(context, row, index, chosen, rejected, repeats_prompt)
    places = [f"{context.name}, row {index}: the {side} answer" for side in ("chosen", "rejected")]
    first, second = (context.as_answer(value, place) for value, place in zip((chosen, rejected), places, strict=True))
    if context.value(row, "prompt") is None and "messages" in context.columns:
        prompt = _conversation_before(context, row, index, first, second)
    else:
        prompt = context.prompt_messages(row, index)
    begins = [_begins_with(answer, prompt) for answer in (first, second)]
    shared = shared_prefix(first, second)
    if prompt and all(begins):
        first, second = first[len(prompt) :], second[len(prompt) :]
    elif shared and (not prompt or _holds_prompt(shared, prompt)):
        first, second = first[len(shared) :], second[len(shared) :]
        system = prompt[:1] if prompt and prompt[0]["role"] == "system" and shared[0]["role"] != "system" else []
        prompt = [*system, *shared]
    if not _says_something(first):
        context.counts[EMPTY_ANSWERS] += 1
        return None
    second = second or [{"role": "assistant", "content": ""}]
    _count_empty_rejected(context, _says_something(second))
    for answer, side in ((first, "chosen"), (second, "rejected")):
        if any(turn["role"] not in ("assistant", "tool") for turn in answer) or answer[-1]["role"] != "assistant":
            if not prompt and answer[0]["role"] in ("user", "system"):
                context.counts["unequal_prompts"] += 1
                return None
            raise UserError(
                f"{context.name}, row {index}: the {side} answer ends or continues with a turn of the "
                f"{next(turn['role'] for turn in reversed(answer) if turn['role'] != 'assistant')}, and only assistant turns "
                "can be compared; end the row with the last assistant turn"
            )
    return {"prompt": prompt, "chosen": first, "rejected": second} | context.template_values(row)


def _conversation_before(
    context: Context, row: Mapping[str, Any], index: int, first: Sequence[Message], second: Sequence[Message]
) -> list[Message]:
    """Return the turns of the column of messages that come before the answers.

    Raises:
        UserError: the turns end with another answer of the assistant.
    """
    turns = context.with_system(row, index, context.messages(row, "messages", index))
    if not turns or turns[-1]["role"] != "assistant":
        return turns
    if all(answer and answer[0]["role"] != "assistant" for answer in (first, second)):
        return []  # the answers hold the whole conversation themselves
    if any(answer and answer[-1]["content"] == turns[-1]["content"] for answer in (first, second)):
        return turns[:-1]
    raise UserError(
        f"{context.place(index, 'messages')} ends with a turn of the assistant, which is neither of the two answers; end it "
        f"with the user's turn, or pass --ignore_columns {context.columns['messages']}"
    )


def _text_pair(
    context: Context, row: Mapping[str, Any], index: int, chosen: Any, rejected: Any, repeats_prompt: bool
) -> Row | None:
    texts = []
    for value, side in ((chosen, "chosen"), (rejected, "rejected")):
        if is_missing(value):
            value = ""
        if not isinstance(value, str):
            raise UserError(f"{context.name}, row {index}: the {side} answer is {shortened(value)}, which is no text")
        texts.append(value)
    prompt = context.prompt_text(row, index)
    if repeats_prompt:
        texts = [text[len(prompt) :] for text in texts]
    elif not prompt and all(is_transcript(text) for text in texts):
        (prompt, first), (other, second) = (split_transcript(text) for text in texts)
        if prompt != other:
            context.counts["unequal_prompts"] += 1
            return None
        texts = [first, second]
    if not texts[0].strip():
        context.counts[EMPTY_ANSWERS] += 1
        return None
    _count_empty_rejected(context, texts[1].strip())
    if "prompt" in context.columns and not prompt:
        context.counts["empty_prompts"] += 1
        return None
    return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}


def _begins_with(answer: Sequence[Message], prompt: Sequence[Message]) -> bool:
    bare = [(turn["role"], turn["content"]) for turn in prompt]
    return bool(bare) and [(turn["role"], turn["content"]) for turn in answer[: len(bare)]] == bare


def _holds_prompt(shared: Sequence[Message], prompt: Sequence[Message]) -> bool:
    """Return whether the shared turns end with what the prompt column says."""
    return bool(prompt) and (shared[-1]["content"] or "").strip() == (prompt[-1]["content"] or "").strip()


def _says_something(answer: Sequence[Message]) -> bool:
    return any((turn["content"] or "").strip() or turn.get("tool_calls") for turn in answer)


def _count_empty_rejected(context: Context, answered: Any) -> None:
    """Count a rejected answer without text. It is kept: a model may learn that silence is worse."""
    if not answered:
        context.counts["empty_rejected"] += 1


def _answer_text(answer: Any, place: str) -> Any:
    """Return the answer of a list's item: text, messages, or an object with the text under a known key."""
    if isinstance(answer, Mapping) and "role" not in answer:
        if not any(key in answer for key in ANSWER_KEYS):
            raise UserError(
                f"{place} holds the answer {shortened(dict(answer))}, in which its text is not found; name it one of "
                f"{', '.join(ANSWER_KEYS)}"
            )
        return next((answer[key] for key in ANSWER_KEYS if answer.get(key) is not None), None)
    return answer


def _margin(context: Context, row: Mapping[str, Any], index: int) -> float:
    """Return the margin of a pair; 0 without one, which is the loss without a margin."""
    value = context.value(row, "margin")
    if value is None or value == "":
        return 0.0
    try:
        return float(value)
    except ValueError:
        raise UserError(
            f"{context.place(index, 'margin')} holds {value!r}, which is no number; give numbers"
        ) from None


def _scores(
    context: Context, row: Mapping[str, Any], index: int, answers: Any, best_first: bool
) -> list[float | None]:
    """Return a score of each answer, higher is better; None for an answer without one."""
    place = context.place(index, "answers")
    if not isinstance(answers, (list, tuple)):
        raise UserError(f"{place} holds {shortened(answers)}; a ranking needs a list of two answers or more")
    given = context.value(row, "scores")
    falls = "scores" in context.columns and context.columns["scores"].lower() in RANK_NAMES
    if given is None and all(isinstance(answer, Mapping) for answer in answers):
        keys = [key for key in (*SCORE_KEYS, *RANK_NAMES) if any(not is_missing(each.get(key)) for each in answers)]
        if keys:
            given, falls = [each.get(keys[0]) for each in answers], keys[0] in RANK_NAMES
    if given is None and (best_first or len(answers) < 2):
        return [float(-place) for place in range(len(answers))]
    if given is None:
        raise UserError(
            f"{place} holds {len(answers)} answers without scores; if the first is the best, pass --dataset_format ranked"
        )
    if len(given) != len(answers):
        raise UserError(f"{place} holds {len(answers)} answers, and there are {len(given)} scores")
    try:
        numbers = [None if has_no_score(score) else float(score) for score in given]
        return [-number if falls and number is not None else number for number in numbers]
    except (TypeError, ValueError):
        raise UserError(f"{context.name}, row {index}: the scores {shortened(given)} are no numbers") from None

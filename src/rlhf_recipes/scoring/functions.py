"""Python functions as rewards."""

import asyncio
import importlib
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rlhf_recipes.core.conversion import to_python
from rlhf_recipes.core.errors import RankError, UserError
from rlhf_recipes.data import plain_text

Scores = list[Any]  # for each completion one float, or a list with one float a token


class ScoresWithPrefixes(list[float]):
    """The scores of a reward model, and what it gives for every prefix of each row.

    prefix_scores: for each completion a float64 tensor (tokens of prompt and completion,): the score of the row up to and
        including each token. Empty where the model's head was not evaluated at every token.
    """

    def __init__(self, scores: Sequence[float], prefix_scores: Sequence[torch.Tensor]) -> None:
        super().__init__(scores)
        self.prefix_scores = list(prefix_scores)


class FunctionReward:
    """A Python function, plain or async, its answer checked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores:
        """Raises RankError naming the sample, if the function raises or returns what is not a score of each."""
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        given = {name: list(values) for name, values in rows.items()}
        try:
            scores = self._call(given)
        except Exception as error:
            raise RankError(self._blame(error, given)) from error
        if not isinstance(scores, list):
            raise RankError(
                f"reward function {self.name} returned {scores!r} for {len(completions)} completions; return a list with "
                "one score each"
            )
        if len(scores) != len(completions):
            raise RankError(
                f"reward function {self.name} returned {len(scores)} scores for {len(completions)} completions; "
                "return one each"
            )
        return [self._checked(*row) for row in zip(scores, prompts, completions, completion_ids, strict=True)]

    def _call(self, given: Mapping[str, list[Any]]) -> Any:
        answer = self.function(**given)
        answer = to_python(wait_for(answer) if inspect.isawaitable(answer) else answer)
        return list(answer) if isinstance(answer, Iterable) else answer  # a generator works, and may fail, here

    def _checked(self, score: Any, prompt: Any, completion: Any, ids: Sequence[int]) -> float | list[float]:
        sample = f"for the completion {plain_text(completion)!r} of the prompt {plain_text(prompt)[:200]!r}"
        score = to_python(score)
        if isinstance(score, (list, tuple)):
            if len(score) != len(ids):
                raise RankError(
                    f"reward function {self.name} returned {len(score)} token rewards {sample}, which has {len(ids)} "
                    "tokens (completion_ids); return one each"
                )
            return [self._number(to_python(each), sample) for each in score]
        return self._number(score, sample)

    def _number(self, score: Any, sample: str) -> float:
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise RankError(f"reward function {self.name} returned {score!r} {sample}; return a finite number")
        return float(score)

    def _blame(self, error: Exception, given: Mapping[str, list[Any]]) -> str:
        """What went wrong, where, and on which sample: the first on which the function fails alone."""
        raised = traceback.extract_tb(error.__traceback__)[-1]
        told = (
            f"reward function {self.name} raised {type(error).__name__}: {error} ({raised.filename}:{raised.lineno})"
        )
        for index, (prompt, completion) in enumerate(zip(given["prompts"], given["completions"], strict=True)):
            try:
                self._call({name: values[index : index + 1] for name, values in given.items()})
            except Exception:
                return (
                    f"{told} for the completion {plain_text(completion)!r} of the prompt {plain_text(prompt)[:200]!r}"
                )
        return f"{told} for {len(given['prompts'])} samples at once, though for none of them alone"


def wait_for(answer: Awaitable[Any]) -> Any:
    """What an awaitable gives, with or without an event loop running already (as in a notebook)."""

    async def come() -> Any:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(come())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, come()).result()


def is_function_name(source: str) -> bool:
    """Whether the source reads ``package.module:function``."""
    module, colon, function = source.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_function(source: str) -> Callable[..., Any]:
    """Import ``package.module:function``; modules beside the caller (the working directory) count."""
    module, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward function {source} cannot be imported: {error}") from None

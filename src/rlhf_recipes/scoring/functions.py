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
from typing import TYPE_CHECKING, Any

import torch

from rlhf_recipes.core.conversion import to_python
from rlhf_recipes.core.errors import RankError, UserError
from rlhf_recipes.data import plain_text, readable_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = list[Any]  # for each completion one float, or a list with one float for each token


class ScoresWithPrefixes(list[float]):
    """The scores of a reward model, and what it gives for every prefix of each row.

    prefix_scores: for each completion a float64 tensor (tokens of prompt and completion,): the score of the row up to
        and including each token. Empty if the model's head was not evaluated at every token.
    """

    def __init__(self, scores: Sequence[float], prefix_scores: Sequence[torch.Tensor]) -> None:
        super().__init__(scores)
        self.prefix_scores = list(prefix_scores)


class FunctionReward:
    """A plain or async Python function as a reward; what it returns is checked.

    tokenizer: the policy's. With it, a prompt given as ids reaches the function as text.
    """

    def __init__(self, function: Callable[..., Any], tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
        self.function, self.tokenizer = function, tokenizer
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
        """Call the function, without `prompt_ids`, and return its scores as floats.

        Raises:
            RankError: the function raises, or does not return one finite number (or a list with one for each token)
                for each completion; names the sample.
        """
        if self.tokenizer is not None:
            prompts = readable_prompts(prompts, self.tokenizer)
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        arguments = {name: list(values) for name, values in rows.items()}
        try:
            scores = self._call(arguments)
        except Exception as error:
            raise RankError(self._describe_error(error, arguments)) from error
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

    def _call(self, arguments: Mapping[str, list[Any]]) -> Any:
        result = self.function(**arguments)
        result = to_python(wait_for(result) if inspect.isawaitable(result) else result)
        return list(result) if isinstance(result, Iterable) else result  # a generator runs, and may raise, here

    def _checked(self, score: Any, prompt: Any, completion: Any, ids: Sequence[int]) -> float | list[float]:
        """Return the score of one completion, or the rewards of its tokens, as floats."""
        sample = f"for the completion {plain_text(completion)!r} of the prompt {plain_text(prompt)[:200]!r}"
        score = to_python(score)
        if isinstance(score, (list, tuple)):
            if len(score) != len(ids):
                raise RankError(
                    f"reward function {self.name} returned {len(score)} token rewards {sample}, which has {len(ids)} "
                    "tokens (completion_ids); return one each"
                )
            return [self._number(to_python(token_reward), sample) for token_reward in score]
        return self._number(score, sample)

    def _number(self, score: Any, sample: str) -> float:
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise RankError(f"reward function {self.name} returned {score!r} {sample}; return a finite number")
        return float(score)

    def _describe_error(self, error: Exception, arguments: Mapping[str, list[Any]]) -> str:
        """Say what was raised, where, and for which sample: the first one for which the function raises alone."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = (
            f"reward function {self.name} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        )
        samples = zip(arguments["prompts"], arguments["completions"], strict=True)
        for index, (prompt, completion) in enumerate(samples):
            try:
                self._call({name: values[index : index + 1] for name, values in arguments.items()})
            except Exception:
                return f"{message} for the completion {plain_text(completion)!r} of the prompt {plain_text(prompt)[:200]!r}"
        return f"{message} for {len(arguments['prompts'])} samples together, but for none of them alone"


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, also if an event loop is already running (as in a notebook)."""

    async def result() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, result()).result()


def is_function_name(source: str) -> bool:
    """Whether the source reads ``package.module:function``."""
    module, colon, function = source.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_function(source: str) -> Callable[..., Any]:
    """Import ``package.module:function``; the working directory is put on ``sys.path``, so its modules are found.

    Raises:
        UserError: no such module or function.
    """
    module, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward function {source} cannot be imported: {error}; check the name") from None

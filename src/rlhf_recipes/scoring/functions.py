"""Python functions as rewards."""

import asyncio
import importlib
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rlhf_recipes.arguments import UserError
from rlhf_recipes.data import text_of

Scores = list[Any]  # of each completion one float, or a list of one float a token


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
        """Raises UserError naming the sample, if the function raises or returns what is not a score of each."""
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        given = {name: list(values) for name, values in rows.items()}
        try:
            scores = self._call(given)
        except Exception as error:
            raise UserError(self._blame(error, given)) from error
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else list(scores)
        if len(scores) != len(completions):
            raise UserError(
                f"reward function {self.name} returned {len(scores)} scores for {len(completions)} completions; "
                "return one each"
            )
        return [self._checked(*row) for row in zip(scores, prompts, completions, completion_ids, strict=True)]

    def _call(self, given: Mapping[str, list[Any]]) -> Any:
        answer = self.function(**given)
        return wait_for(answer) if inspect.isawaitable(answer) else answer

    def _checked(self, score: Any, prompt: Any, completion: Any, ids: Sequence[int]) -> float | list[float]:
        sample = f"for the completion {text_of(completion)!r} of the prompt {text_of(prompt)[:200]!r}"
        if isinstance(score, torch.Tensor):
            score = score.tolist()
        if isinstance(score, (list, tuple)) or (hasattr(score, "__len__") and not isinstance(score, str)):
            if len(score) != len(ids):
                raise UserError(
                    f"reward function {self.name} returned {len(score)} token rewards {sample}, which has {len(ids)} "
                    "tokens (completion_ids); return one each"
                )
            return [float(self._checked(each, prompt, completion, ids)) for each in score]  # type: ignore[arg-type]
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            raise UserError(f"reward function {self.name} returned {score!r} {sample}; return a finite number")
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
                return f"{told} for the completion {text_of(completion)!r} of the prompt {text_of(prompt)[:200]!r}"
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

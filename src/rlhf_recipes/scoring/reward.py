"""Completions to rewards. A reward is a model, the path of one, a Python function, or ``package.module:function``.

Functions are called as TRL calls them: ``f(prompts=..., completions=..., completion_ids=..., **columns)``
with every other column of the dataset as a list, and return one number a completion, or for each completion a list of
one number a token. They may be async. For conversational prompts a completion is a list with one assistant message,
otherwise it is text.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import is_conversation
from rlhf_recipes.models import load_reward_model, load_tokenizer, reward_label_count
from rlhf_recipes.scoring.functions import FunctionReward, Scores, import_function, is_function_name
from rlhf_recipes.scoring.reward_models import ModelReward, classify

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "FunctionReward",
    "ModelReward",
    "Reward",
    "RewardSource",
    "Scores",
    "check_reward",
    "classify",
    "import_function",
    "load_reward",
    "score",
    "score_with_each",
]

RewardSource = Any  # nn.Module | str | Callable


class Reward(Protocol):
    """What scores a batch of completions. `name` is how it appears in logs."""

    name: str

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> Scores: ...


def load_reward(
    source: RewardSource,
    policy_tokenizer: "PreTrainedTokenizerBase",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    device: "torch.device | str | None" = None,
    batch_size: int = 64,
    quantization_config: Any = None,
    prefix_scores: bool = False,
) -> Reward:
    """Make a `Reward` of a model, a folder or Hub id, ``package.module:function``, or a function.

    tokenizer: the reward model's own; by default the one in its folder, or the policy's for a model object.
    quantization_config: quantize the reward model as it is loaded; used for a folder or Hub id only.
    prefix_scores: let a model also return the score of every prefix of its rows (see `ModelReward`).
    """
    if isinstance(source, str) and is_function_name(source):
        source = import_function(source)
    if isinstance(source, str):
        reward_label_count(source)
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        tokenizer = tokenizer or load_tokenizer(source, "reward model")
        name = os.path.basename(os.path.normpath(source))
        source = load_reward_model(source, **quantized)
        return ModelReward(source.to(device), tokenizer, policy_tokenizer, name, batch_size, prefix_scores)
    if isinstance(source, nn.Module):
        name = os.path.basename(os.path.normpath(getattr(source.config, "_name_or_path", "") or "reward_model"))
        model = source.to(device) if device is not None else source
        return ModelReward(model, tokenizer or policy_tokenizer, policy_tokenizer, name, batch_size, prefix_scores)
    if callable(source):
        return FunctionReward(source)
    raise TypeError(f"a reward is a model, a path, or a function, not {type(source).__name__}")


def check_reward(source: str, columns: Sequence[str] = (), role: str = "reward model") -> None:
    """Refuse a folder, Hub id or ``package.module:function`` that cannot score rows with these columns; loads no weights.

    Raises:
        UserError: no such model or function, a wrong number of labels, no tokenizer, or a function that asks for a
            column that the dataset lacks.
    """
    if not is_function_name(source):
        reward_label_count(source)
        load_tokenizer(source, role)
        return
    function = import_function(source)
    given = dict.fromkeys({"prompts", "completions", "completion_ids", *columns})
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise UserError(
            f"{role} {source} does not fit the dataset, whose further columns are {', '.join(columns) or 'none'}: {error}; "
            "give a dataset with the column, or let the function take **columns"
        ) from None
    except ValueError:  # a function without a signature, such as one written in C: it is its own reward model of that
        return


def score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Scores:
    """Score completions, given as text, in the form their prompts have: as assistant messages for conversations."""
    shaped = [
        [{"role": "assistant", "content": completion}] if is_conversation(prompt) else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return reward(prompts, shaped, prompt_ids=prompt_ids, completion_ids=completion_ids, **(columns or {}))


def score_with_each(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[str], **asked: Any
) -> dict[str, Scores]:
    """`score` by every reward, by its name. Async functions wait at the same time, while the others work."""
    waiting = {reward.name for reward in rewards if getattr(reward, "is_async", False)}
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        coming = {
            reward.name: pool.submit(score, reward, prompts, completions, **asked)
            for reward in rewards
            if reward.name in waiting
        }
        there = {
            reward.name: score(reward, prompts, completions, **asked)
            for reward in rewards
            if reward.name not in waiting
        }
        return {each.name: coming[each.name].result() if each.name in coming else there[each.name] for each in rewards}

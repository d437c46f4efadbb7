"""Load rewards and score completions with them.

A reward is a model, the folder or Hub id of one, a Python function, or ``package.module:function``. Functions are
called as TRL calls them, ``f(prompts=..., completions=..., completion_ids=..., **columns)``, with every other column
of the dataset as a list. They return one number for each completion, or for each completion a list with one number for
each token, and may be async. For a conversational prompt a completion is a list with one assistant message, otherwise
text. A prompt given as ids reaches a function as text."""

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
from rlhf_recipes.scoring.reward_models import ModelReward

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

RewardSource = Any  # nn.Module | str | Callable


class Reward(Protocol):
    """Scores a batch of completions. `name` is its name in logs."""

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
    """Load a `Reward` from a model, a folder or Hub id, ``package.module:function``, or a function.

    Args:
        tokenizer: the reward model's; by default the one in its folder, or the policy's for a model object.
        batch_size: rows in one forward pass of a reward model.
        quantization_config: quantize the reward model as it is loaded; used for a folder or Hub id only.
        prefix_scores: let a model also return the score of every prefix of its rows (see `ModelReward`).

    Raises:
        UserError: no such model or function, or a model that cannot score (see `ModelReward`).
        TypeError: `source` is something else.
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
        return FunctionReward(source, policy_tokenizer)
    raise TypeError(f"a reward is a model, a path, or a function, not {type(source).__name__}")


def check_reward(source: str, columns: Sequence[str] = (), role: str = "reward model") -> None:
    """Check, without loading weights, that a folder, Hub id or function name can score rows with these columns.

    role: what messages call the reward.

    Raises:
        UserError: no such model or function, a wrong number of labels, no tokenizer, or a function that needs a column
            that the dataset lacks.
    """
    if not is_function_name(source):
        reward_label_count(source)
        load_tokenizer(source, role)
        return
    function = import_function(source)
    arguments = dict.fromkeys({"prompts", "completions", "completion_ids", *columns})
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{role} {source} does not fit the dataset, whose other columns are {', '.join(columns) or 'none'}: {error}; "
            "give a dataset with the column, or let the function take **columns"
        ) from None
    except ValueError:  # without a signature, such as a function written in C, it cannot be checked
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
    """Score completions given as text. For a conversational prompt the reward gets an assistant message.

    columns: the other columns of the dataset, one value for each completion.
    """
    formatted = [
        [{"role": "assistant", "content": completion}] if is_conversation(prompt) else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return reward(prompts, formatted, prompt_ids=prompt_ids, completion_ids=completion_ids, **(columns or {}))


def score_with_each(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[str], **inputs: Any
) -> dict[str, Scores]:
    """Call `score` with every reward and return the scores by name; `inputs` are its other arguments.

    Async functions wait together, while the other rewards compute.
    """
    async_names = {reward.name for reward in rewards if getattr(reward, "is_async", False)}
    with ThreadPoolExecutor(max(1, len(async_names))) as pool:
        futures = {
            reward.name: pool.submit(score, reward, prompts, completions, **inputs)
            for reward in rewards
            if reward.name in async_names
        }
        scores = {
            reward.name: score(reward, prompts, completions, **inputs)
            for reward in rewards
            if reward.name not in async_names
        }
        scores |= {name: future.result() for name, future in futures.items()}
        return {reward.name: scores[reward.name] for reward in rewards}

"""Our rewards as the functions that TRL's online trainers call, so that a reward model scores there exactly as it does in ppo.

TRL can load a reward model by itself, but reads it otherwise: two labels as one, an answer without its EOS, the scores raw.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data import prompt_ids
from rlhf_recipes.scoring.reward import Reward, load_reward
from rlhf_recipes.scoring.reward_models import ModelReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]
TRAINERS_OWN = ("trainer_state", "log_extra", "log_metric")  # what TRL hands over beside the columns


def load_trl_reward_functions(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    device: Any,
    normalize: bool = False,
    quantization_config: Any = None,
) -> list[RewardFunction]:
    """One function for each reward model's folder, Hub id or ``package.module:function``, each under a name of its own.

    tokenizer: the policy's. normalize: shift and scale reward models' scores to mean 0 and variance 1 on their held-out rows.
    quantization_config: in how many bits reward models are read.
    """
    functions: list[RewardFunction] = []
    for index, source in enumerate(sources):
        reward = load_reward(source, tokenizer, device=device, quantization_config=quantization_config)
        if normalize and isinstance(reward, ModelReward):
            reward.normalize()
        if reward.name in [function.__name__ for function in functions]:
            reward.name = f"{reward.name}_{index}"
        functions.append(as_trl_function(reward, tokenizer))
    return functions


def as_trl_function(reward: Reward, tokenizer: "PreTrainedTokenizerBase") -> RewardFunction:
    """The reward with TRL's signature: the prompts' ids, which it does not pass, are made as they are for ppo.

    Rewards that a function gives token by token are added up, since TRL weighs whole answers.
    """

    def function(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
        kept = {name: values for name, values in columns.items() if name not in TRAINERS_OWN}
        scores = reward(prompts, completions, prompt_ids=ids, completion_ids=completion_ids, **kept)
        return [sum(score) if isinstance(score, list) else score for score in scores]

    function.__name__ = reward.name
    return function


def missing_eos(penalty: float, stop_ids: Collection[int]) -> RewardFunction:
    """A reward of minus `penalty` for each answer that none of the stop tokens ended, 0 for the others."""

    def missing_eos(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [0.0 if ids and ids[-1] in stop_ids else -penalty for ids in completion_ids]

    return missing_eos

"""Rewards as functions for TRL's online trainers, so that a reward model gives the same scores there as in PPO.

TRL loads a reward model differently: it reads two labels as one, drops an answer's EOS, and does not normalize scores.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data import column_prompt_ids, decode_answers
from rlhf_recipes.scoring.reward import Reward, load_reward, score
from rlhf_recipes.scoring.reward_models import ModelReward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]
TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")  # passed by TRL among the columns


def load_trl_reward_functions(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    device: Any,
    normalize: bool = False,
    quantization_config: Any = None,
    max_prompt_tokens: int | None = None,
) -> list[RewardFunction]:
    """Load one function for each source, each with a different name.

    Args:
        sources: folders or Hub ids of reward models, or ``package.module:function``.
        tokenizer: the policy's.
        device: where reward models run.
        normalize: shift and scale the scores of reward models to mean 0 and variance 1 on their held-out rows.
        quantization_config: quantize reward models as they are loaded.
        max_prompt_tokens: the policy reads this many last tokens of a longer prompt; None: all.
    """
    functions: list[RewardFunction] = []
    for index, source in enumerate(sources):
        reward = load_reward(source, tokenizer, device=device, quantization_config=quantization_config)
        if normalize and isinstance(reward, ModelReward):
            reward.normalize()
        if reward.name in [function.__name__ for function in functions]:
            reward.name = f"{reward.name}_{index}"
        functions.append(as_trl_function(reward, tokenizer, max_prompt_tokens))
    return functions


def as_trl_function(
    reward: Reward, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int | None = None
) -> RewardFunction:
    """Return the reward with TRL's signature.

    TRL passes no prompt ids, so prompts are tokenized as for PPO. It decodes answers alone, so they are decoded again, behind
    their prompts. Rewards of tokens are added up, since TRL expects one number for each answer.
    """

    def function(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        others = {name: values for name, values in columns.items() if name not in TRAINER_ARGUMENTS}
        ids = column_prompt_ids(prompts, others, tokenizer, max_prompt_tokens)
        texts = decode_answers(ids, completion_ids, tokenizer)
        scores = score(reward, prompts, texts, prompt_ids=ids, completion_ids=completion_ids, columns=others)
        return [sum(value) if isinstance(value, list) else value for value in scores]

    function.__name__ = reward.name
    return function


def missing_eos(penalty: float, stop_ids: Collection[int]) -> RewardFunction:
    """Return a reward function: minus `penalty` for an answer that no stop token ended, 0 for the others."""

    def missing_eos(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [0.0 if ids and ids[-1] in stop_ids else -penalty for ids in completion_ids]

    return missing_eos

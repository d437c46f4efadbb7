"""Proximal policy optimisation of a language model against a reward (Schulman et al. 2017; Ziegler et al. 2019)."""

from typing import TYPE_CHECKING

from rlhf_recipes.core.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.parallelism import check_parallelism
    from rlhf_recipes.ppo.roles.build import disable_dropout_
    from rlhf_recipes.ppo.roles.checks import check_prompts
    from rlhf_recipes.ppo.roles.value import PolicyAndValue, ValueHead
    from rlhf_recipes.ppo.rollout.rollout import pad_episodes, trim_padding
    from rlhf_recipes.ppo.trainer import PPOTrainer

__getattr__ = lazy_names(
    __name__,
    {
        "config": ["PPOConfig"],
        "trainer": ["PPOTrainer"],
        "roles.value": ["PolicyAndValue", "ValueHead"],
        "parallelism": ["check_parallelism"],
        "roles.build": ["disable_dropout_"],
        "roles.checks": ["check_prompts"],
        "rollout.rollout": ["pad_episodes", "trim_padding"],
    },
)

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "PolicyAndValue",
    "ValueHead",
    "check_parallelism",
    "check_prompts",
    "disable_dropout_",
    "pad_episodes",
    "trim_padding",
]

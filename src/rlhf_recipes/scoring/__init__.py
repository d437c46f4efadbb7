"""Rewards: reward models and Python functions that score answers."""

from rlhf_recipes.scoring.functions import FunctionReward, Scores, import_function
from rlhf_recipes.scoring.reward import Reward, RewardSource, check_reward, load_reward, score, score_with_each
from rlhf_recipes.scoring.reward_models import ModelReward, classify
from rlhf_recipes.scoring.trl_functions import load_trl_reward_functions, missing_eos

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
    "load_trl_reward_functions",
    "missing_eos",
    "score",
    "score_with_each",
]

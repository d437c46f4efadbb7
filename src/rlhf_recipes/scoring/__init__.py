""""""

from rlhf_recipes.scoring.functions import FunctionReward, Scores, import_function
from rlhf_recipes.scoring.reward import Reward, RewardSource, check_reward, load_reward, score, score_by_each
from rlhf_recipes.scoring.reward_models import ModelReward, classify
from rlhf_recipes.scoring.trl_functions import load_functions, missing_eos

__all__ = [
    "FunctionReward",
    "ModelReward",
    "Reward",
    "RewardSource",
    "Scores",
    "check_reward",
    "classify",
    "import_function",
    "load_functions",
    "load_reward",
    "missing_eos",
    "score",
    "score_by_each",
]

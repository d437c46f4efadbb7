"""rlhf-recipes: the whole ChatGPT training pipeline as thin recipes on the Hugging Face stack.

Every public name is imported on first touch, so ``import rlhf_recipes`` loads neither torch nor transformers.
"""

import importlib
import os
from typing import Any

# Nothing is sent unless it is asked for. TRL reports each trainer that is built, datasets each local file that is read, and
# transformers has the weights of a repo that holds pickles only converted, in public.
for _name, _value in (
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("HF_UPDATE_DOWNLOAD_COUNTS", "0"),
    ("DISABLE_SAFETENSORS_CONVERSION", "1"),
):
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"

_HOMES = {
    "core.arguments": ["parse_arguments"],
    "core.errors": ["UserError", "one_line_errors"],
    "generation": ["generate"],
    "scoring": ["load_reward", "score"],
    "ppo": ["PPOConfig", "PPOTrainer"],
    "stages.tokenizer": ["TokenizerArguments", "run_tokenizer"],
    "stages.pretrain": ["PretrainArguments", "PretrainConfig", "build_pretrain_trainer", "run_pretrain"],
    "stages.sft": ["SFTArguments", "SFTConfig", "build_sft_trainer", "run_sft"],
    "stages.reward": ["RewardArguments", "RewardConfig", "build_reward_trainer", "run_reward"],
    "stages.ppo": ["PPOArguments", "build_ppo_trainer", "run_ppo"],
    "stages.dpo": ["DPOArguments", "DPOConfig", "build_dpo_trainer", "run_dpo"],
    "stages.rloo": ["RLOOArguments", "RLOOConfig", "build_rloo_trainer", "run_rloo"],
    "stages.eval": ["EvalArguments", "run_eval"],
    "stages.push": ["PushArguments", "run_push"],
    "quickstart": ["gold_score", "write_world"],
    "stages.quickstart": ["QuickstartArguments", "run_quickstart"],
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names} | {"ModelConfig": "trl"}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""rlhf-recipes: the whole ChatGPT training pipeline as thin recipes on the Hugging Face stack.

Each public name is imported on first use, so ``import rlhf_recipes`` loads neither torch nor transformers.
"""

import importlib
import os
from typing import Any

# Nothing is sent to the network without a request. By default TRL reports each trainer that is built,
# datasets reports each local file that is read, and transformers opens a public pull request that
# converts the weights of a repo with pickles only.
for _name, _value in (
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("HF_UPDATE_DOWNLOAD_COUNTS", "0"),
    ("DISABLE_SAFETENSORS_CONVERSION", "1"),
):
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"

_PUBLIC_NAMES = {
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
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC_NAMES.items() for name in names} | {
    "ModelConfig": "trl"
}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

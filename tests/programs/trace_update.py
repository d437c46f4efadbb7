"""Count what one PPO update runs: python tests/programs/trace_update.py [--names]

Trains a two-layer GPT-2 for two updates with a reward model, and records every function of the package that the second
update calls. docs/architecture.md has the result.
"""

import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("SOURCE", ROOT / "src")).resolve()
sys.path[:0] = [str(SOURCE)]

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from rlhf_recipes import PPOConfig, PPOTrainer  # noqa: E402


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the 256 bytes, end of text and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>", "<|pad|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


class SecondUpdate(TrainerCallback):
    """Record the functions of the package that run after the last optimizer step of the first update."""

    def __init__(self, steps_per_update: int) -> None:
        self.steps_per_update = steps_per_update
        self.functions: dict[str, set[str]] = defaultdict(set)
        self._folder = str(SOURCE / "rlhf_recipes")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps_per_update:
            sys.setprofile(self._record)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sys.setprofile(None)

    def _record(self, frame: FrameType, event: str, argument: Any) -> None:
        code: CodeType = frame.f_code
        if event == "call" and code.co_filename.startswith(self._folder) and not code.co_name.startswith("<"):
            self.functions[code.co_filename[len(self._folder) + 1 :]].add(code.co_qualname)


def main() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 258, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**shape, bos_token_id=256, eos_token_id=256, pad_token_id=257)
    rewards = GPT2ForSequenceClassification(GPT2Config(**config.to_dict() | {"num_labels": 1}))
    prompts = Dataset.from_dict({"prompt": [f"Question {number}: " for number in range(16)]})
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(folder, total_episodes=16, response_length=16, report_to="none", save_strategy="no")
        trainer = PPOTrainer(GPT2LMHeadModel(config), rewards, args, prompts, processing_class=byte_tokenizer())
        second = SecondUpdate(args.num_ppo_epochs * args.num_mini_batches)
        trainer.add_callback(second)
        trainer.train()
    if "--names" in sys.argv:
        for file, names in sorted(second.functions.items()):
            print(f"{file}: {', '.join(sorted(names))}")
    print(f"{len(second.functions)} files, {sum(map(len, second.functions.values()))} functions")


if __name__ == "__main__":
    main()

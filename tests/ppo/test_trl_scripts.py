"""Tests of compatibility with TRL: a script for its PPOTrainer runs with only the import changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from rlhf_recipes import PPOConfig, PPOTrainer

Make = Callable[..., Any]


@pytest.fixture
def folder(make_policy: Make, make_reward_model: Make, tokenizer: Any, tmp_path: Path) -> Path:
    """Return a folder with a policy and a reward model without a pad token, and with prompts."""
    tokenizer_config = json.loads((Path(tokenizer.save_pretrained(tmp_path / "policy")[0])).read_text())
    tokenizer_config.pop("pad_token")
    for name, model in (("policy", make_policy(0, initializer_range=0.1)), ("reward_model", make_reward_model(3))):
        model.config.pad_token_id = None
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "data").mkdir()
    for split, rows in (("train", 40), ("test", 6)):
        lines = [json.dumps({"prompt": f"{'so ' * (row % 3)}{row}", "other": row}) for row in range(rows)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def script(arguments: list[str]) -> Any:
    """Do what such a script does: parse, load four models, add a pad token, tokenize, train, save, print samples."""
    data, training, model = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_into_dataclasses(
        arguments
    )
    assert get_quantization_config(model) is None
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    reward_models = [
        AutoModelForSequenceClassification.from_pretrained(training.reward_model_path, num_labels=1) for _ in "vr"
    ]
    policy = AutoModelForCausalLM.from_pretrained(training.sft_model_path)
    assert tokenizer.pad_token_id >= policy.config.vocab_size, "the embedding was not resized"
    adapter = get_peft_config(model)
    reference = AutoModelForCausalLM.from_pretrained(training.sft_model_path) if adapter is None else None
    rows = load_dataset(data.dataset_name)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"], padding=False)["input_ids"]
        return {"input_ids": ids, "lengths": len(ids)}

    splits = [rows[name].map(tokenize, remove_columns=rows[name].column_names) for name in ("train", "test")]
    trainer = PPOTrainer(
        args=training, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward_models[1],
        value_model=reward_models[0], train_dataset=splits[0], eval_dataset=splits[1], peft_config=adapter,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(training.output_dir)
    trainer.generate_completions()
    return trainer


@pytest.mark.parametrize("adapter", [False, True])
def test_a_trl_ppo_script_runs_with_only_the_import_changed(
    adapter: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "--dataset_name data --model_name_or_path policy --sft_model_path policy --reward_model_path reward_model "
        "--output_dir out --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --total_episodes 24 "
        "--num_ppo_epochs 2 --response_length 6 --missing_eos_penalty 1.0 --stop_token eos --eval_strategy steps "
        "--eval_steps 2 --report_to none --disable_tqdm true --learning_rate 1e-2 --local_rollout_forward_batch_size 2 "
        "--kl_estimator k3 --num_sample_generations 2 --ds3_gather_for_generation false"
    )
    monkeypatch.chdir(folder)
    trainer = script(arguments.split() + ("--use_peft --lora_target_modules c_attn c_proj".split() if adapter else []))
    capsys.readouterr()
    assert trainer.state.global_step == 3 * 2
    eval_steps = [entry["step"] for entry in trainer.state.log_history if "eval_objective/scores" in entry]
    assert eval_steps == [2, 4, 6]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out")
    initial = AutoModelForCausalLM.from_pretrained(folder / "policy")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        after, before = loaded(ids).logits, initial(ids).logits
        torch.testing.assert_close(after, trainer.model.policy.eval()(ids).logits)
    assert (after - before).abs().max() > 1e-3
    AutoModelForSequenceClassification.from_pretrained(folder / "out" / "value_model", num_labels=1)


def test_config_has_every_field_and_default_of_trls_last_ppo_config() -> None:
    trl_defaults = {
        "learning_rate": 3e-6, "num_ppo_epochs": 4, "num_mini_batches": 1, "total_episodes": None, "response_length": 53,
        "stop_token": None, "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None, "kl_coef": 0.05,
        "kl_estimator": "k1", "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
        "whiten_rewards": False, "local_rollout_forward_batch_size": 64, "num_sample_generations": 10,
        "dataset_num_proc": None, "sft_model_path": None, "reward_model_path": None, "model_adapter_name": None,
        "ref_adapter_name": None, "ds3_gather_for_generation": True,
    }  # fmt: skip
    config = PPOConfig(output_dir="unused")
    assert {name: getattr(config, name) for name in trl_defaults} == trl_defaults

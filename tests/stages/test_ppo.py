"""The ppo stage: from input folders to an output folder, and what it refuses before it loads or writes anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks
from trl import ModelConfig

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.stages.ppo import PPOArguments, ppo_metrics, run_ppo, with_prompts

ROWS = [
    {"prompt": text, "wanted": text[0]}
    for text in ("apple", "bread", "cheese", "dates", "eggs", "figs", "grapes", "ham")
]
REWARD = "def wanted_letters(prompts, completions, wanted, **columns):\n"
REWARD += "    return [float(text.count(letter)) for text, letter in zip(completions, wanted)]\n"


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any, make_reward_model: Any, tokenizer: Any
) -> Path:
    """A working directory with a policy, a reward model, prompts with a further column, and a module with a reward function."""
    monkeypatch.chdir(tmp_path)
    for name, model in (("policy", make_model()), ("reward_model", make_reward_model())):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts").mkdir()
    for split in ("train", "test"):
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "letter_rewards.py").write_text(REWARD)
    return tmp_path


def options(**changed: Any) -> tuple[PPOArguments, ModelConfig, PPOConfig]:
    values: dict[str, Any] = {
        "dataset_name": "prompts", "reward": "reward_model", "model_name_or_path": "policy", "output_dir": "out",
        "per_device_train_batch_size": 4, "total_episodes": 8, "response_length": 6, "logging_steps": 1,
        "learning_rate": 1e-3, "save_strategy": "no",
    } | changed  # fmt: skip
    argv = [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]
    return parse_arguments(PPOArguments, ModelConfig, PPOConfig, argv=argv)


def test_the_output_folder_holds_policy_value_samples_and_metrics(place: Path, real_plots: None) -> None:
    """The saved policy loads anywhere and was trained; value model, samples and metrics are saved, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_ppo(*options(reward="reward_model letter_rewards:wanted_letters"))
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in ("policy", folder))
    assert all(not a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained("policy").get_vocab()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["episodes"] == 8 and metrics["steps"] == 8 and metrics["kl_before"] == pytest.approx(0, abs=1e-6)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for sample in samples:  # each sample carries the very score that the function gives it
        wanted = next(row["wanted"] for row in ROWS if row["prompt"] == sample["prompt"])
        assert sample["wanted_letters"] == sample["completion"].count(wanted)
    assert not list(folder.rglob("*.bin"))  # no pickles
    assert (folder / "curves.png").stat().st_size > 1000


def test_a_lora_run_without_held_out_prompts_works(place: Path) -> None:
    """The folder loads with its base, and has the value."""
    from rlhf_recipes.models.loading import load_causal_lm

    (place / "prompts" / "test.jsonl").unlink()
    folder = run_ppo(*options(use_peft="true"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["episodes"] == 8 and not any(name.startswith("eval_") for name in metrics)
    before, after = (load_causal_lm(str(path)).state_dict() for path in ("policy", folder))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) for name in moved)
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 8


def test_the_run_repeats_from_its_recipe(place: Path) -> None:
    """recipe.yaml alone gives the same weights."""
    from transformers import AutoModelForCausalLM

    first = run_ppo(*options())
    again = ["--config", str(first / "recipe.yaml"), "--output_dir", "again"]
    second = run_ppo(*parse_arguments(PPOArguments, ModelConfig, PPOConfig, argv=again))
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_value_model_starts_from_a_reward_model(place: Path) -> None:
    """With value_model the value is a separate model, and its folder loads."""
    from transformers import AutoModelForSequenceClassification

    folder = run_ppo(*options(value_model="reward_model"))
    value = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    assert value.config.num_labels == 1
    start = AutoModelForSequenceClassification.from_pretrained("reward_model")
    assert not torch.equal(value.score.weight, start.score.weight)


def test_prompts_are_the_first_tokens_of_texts(tokenizer: Any) -> None:
    """Tokens are bytes here, so a prompt may end within a character. Empty texts are dropped, other columns kept."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["中文 review", "   ", "ok"], "label": [1, 0, 1]})
    prompts = with_prompts(rows, tokenizer, 4)
    expected = [{"label": 1, "prompt": [*"中文".encode()[:4]]}, {"label": 1, "prompt": [*b"ok"]}]
    assert prompts.to_list() == expected


def test_metrics_hold_the_first_and_the_last_update() -> None:
    keys = ("objective/scores", "objective/kl", "completions/mean_length", "completions/eos_share", "episode")
    log = [{"loss": 1.0}, *({key: float(number) for key in keys} for number in (1, 2, 3)), {"train_loss": 1.0}]
    assert ppo_metrics(log)["score_before"] == 1.0 and ppo_metrics(log)["score"] == 3.0
    assert ppo_metrics([{"loss": 1.0}]) == {}


def _three_labels(place: Path) -> None:
    config = json.loads((place / "reward_model" / "config.json").read_text())
    labels = {str(index): f"LABEL_{index}" for index in range(3)}
    config |= {"id2label": labels, "label2id": {value: int(key) for key, value in labels.items()}}
    (place / "reward_model" / "config.json").write_text(json.dumps(config))


def _no_pad(place: Path) -> None:
    config = json.loads((place / "policy" / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (place / "policy" / "tokenizer_config.json").write_text(json.dumps(config))


def _long_prompt(place: Path) -> None:
    (place / "prompts" / "train.jsonl").write_text("".join(json.dumps({"prompt": "x" * 125}) + "\n" for _ in range(8)))


def _other_column(place: Path) -> None:
    (place / "prompts" / "train.jsonl").write_text(json.dumps({"riddle": "why?", "wanted": "y"}) + "\n")


def _nothing(place: Path) -> None:
    pass


def _full_folder(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("three years of work")


BAD: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (_nothing, {"model_name_or_path": None}, "no model to train"),
    (_nothing, {"model_name_or_path": "./nowhere"}, "no such folder"),
    (_nothing, {"model_name_or_path": "somebody/gpt2"}, "HF_HUB_OFFLINE"),
    (_nothing, {"model_name_or_path": "letter_rewards.py"}, "is a file"),
    (_nothing, {"reward": None}, "no reward"),
    (_nothing, {"reward": "policy"}, "not a sequence classifier|GPT2LMHeadModel"),
    (_nothing, {"reward": "letter_rewards:missing"}, "cannot be imported"),
    (_nothing, {"dataset_name": "nowhere.jsonl"}, "no such file or folder"),
    (_nothing, {"dataset_train_split": "validation"}, "it has test, train"),
    (_nothing, {"per_device_train_batch_size": 16}, "8 prompts, fewer than the 16 episodes"),
    (_nothing, {"num_mini_batches": 3}, "do not divide"),
    (_nothing, {"learning_rate": "fast"}, "invalid float value: 'fast'"),
    (_nothing, {"kl_estimator": "k2"}, "invalid choice: 'k2'"),
    (_nothing, {"temperature": 0}, "temperature is 0.0"),
    (_nothing, {"num_layers_unfrozen": 2}, "the policy has 2 layers: take 1 to 1"),
    (_nothing, {"kl_coeff": 0.1}, "did you mean 'kl_coef'"),
    (_three_labels, {}, "3 labels"),
    (_no_pad, {}, "no pad token"),
    (_long_prompt, {}, "does not fit the model's context of 128"),
    (_other_column, {}, "--columns prompt=NAME"),
    (_full_folder, {}, "not empty"),
    (_full_folder, {"overwrite": "true"}, "no stage wrote"),
]


@pytest.mark.parametrize(("spoil", "changed", "words"), BAD, ids=[words for _, _, words in BAD])
def test_invalid_input_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], changed: dict[str, Any], words: str
) -> None:
    """One line with the fix; no weights are read and nothing is written."""
    from transformers import PreTrainedModel

    def read(*arguments: Any, **named: Any) -> None:
        raise AssertionError("weights were read")

    spoil(place)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        run_ppo(*options(**changed))
    assert "\n" not in str(caught.value)
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_recipe_prints_one_line_and_exits_2(place: Path) -> None:
    words = [
        "--model_name_or_path",
        "./nowhere",
        "--output_dir",
        "out",
    ]
    words += ["--reward", "reward_model", "--dataset_name", "prompts"]
    result = forks.run_recipe("ppo", words, place)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and "no such folder" in errors[0]
    assert not (place / "out").exists()

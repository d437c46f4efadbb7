"""The rloo stage: what rewards receive, what is trained on, what it saves, and what it refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks
from trl import ModelConfig

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.generation.sampling import Completions, Sampling, sample
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer
from rlhf_recipes.stages.rloo import RLOOArguments, RLOOConfig, build_rloo_trainer, rloo_metrics, run_rloo

EOS = 256
WORDS = ["a", "bread", "cheese with rye", "dates", "eggs, eggs", "figs", "grapes and a long tail of words", "ham"]
PLAIN = [{"prompt": text, "wanted": text[0]} for text in WORDS]
CHAT = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PLAIN]
REWARDS = """
SEEN = []

def low_share(completion_ids, **columns):
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]

def wanted_letters(prompts, completions, wanted, **columns):
    assert set(columns) == {"completion_ids"}, columns
    return [float(text.count(letter)) for text, letter in zip(completions, wanted)]

async def by_token(completion_ids, **columns):
    return [[0.5] * len(ids) for ids in completion_ids]

def remember(prompts, completions, completion_ids, **columns):
    SEEN.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids})
    return [0.0] * len(prompts)
"""


def ending_often(model: Any) -> Any:
    """About every seventh token is EOS, so that some answers end and some are truncated."""
    model.transformer.ln_f.bias.data += 300 * model.transformer.wte.weight.data[EOS]
    return model


def write_prompts(place: Path, rows: list[dict[str, Any]]) -> None:
    for split in ("train", "test"):
        (place / "prompts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_model: Any, make_reward_model: Any, tokenizer: Any) -> Path:
    """A policy, a reward model, prompts with a further column, and a module of reward functions."""
    place = tmp_path_factory.mktemp("rloo")
    reward_model = make_reward_model(initializer_range=0.2, score_mean=0.5, score_std=2.0)
    for name, model in (("policy", ending_often(make_model(resid_pdrop=0.1))), ("reward_model", reward_model)):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "prompts").mkdir()
    write_prompts(place, PLAIN)
    (place / "rloo_rewards.py").write_text(REWARDS)
    return place


@pytest.fixture
def place(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these folders as the working directory."""
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "rloo_rewards", raising=False)
    return tmp_path


def options(**changed: Any) -> tuple[RLOOArguments, ModelConfig, RLOOConfig]:
    values: dict[str, Any] = {
        "dataset_name": "prompts", "reward": "reward_model", "model_name_or_path": "policy", "output_dir": "out",
        "per_device_train_batch_size": 8, "max_steps": 2, "max_completion_length": 6, "logging_steps": 1,
        "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    } | changed  # fmt: skip
    argv = [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]
    return parse_arguments(RLOOArguments, ModelConfig, RLOOConfig, argv=argv)


def metrics_of(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def trained(**changed: Any) -> tuple[Any, dict[str, float]]:
    """Return (trainer, metrics of its last evaluation), without saving the folder of the stage."""
    trainer = build_rloo_trainer(*options(**changed))
    trainer.train()
    return trainer, trainer.evaluate()


def batches(trainer: Any) -> list[dict[str, float]]:
    """Return the log entry of each batch of answers that was trained on."""
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def low_share_of(folder: str | Path) -> float:
    """The share of tokens below 128 in answers that our own sampler draws."""
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    rows = [tokenizer(text)["input_ids"] for text in WORDS * 8]
    answers = sample(model, rows, Sampling(6, stop_ids=(EOS,)), seeds=list(range(len(rows)))).ids
    tokens = [token for answer in answers for token in answer]
    return sum(token < 128 for token in tokens) / len(tokens)


def same_weights(one: Any, other: Any) -> bool:
    """Models, or folders of them."""
    first, second = (
        (load_causal_lm(str(each)) if isinstance(each, str | Path) else each).state_dict() for each in (one, other)
    )
    return all(torch.equal(first[name], second[name]) for name in first)


LEARNING = {"reward": "rloo_rewards:low_share", "per_device_train_batch_size": 32, "num_iterations": 2}
LEARNING |= {"max_steps": 24, "beta": 0.0, "lr_scheduler_type": "constant"}


def test_the_score_rises(place: Path, real_plots: None) -> None:
    """Less than half of an untrained model's tokens are below 128; the reward is that share."""
    folder = run_rloo(*options(**LEARNING, learning_rate=1e-2))
    assert low_share_of("policy") < 0.5 < 0.7 < low_share_of(folder)
    metrics = metrics_of(folder)
    assert metrics["score"] > metrics["score_before"] + 0.2 and metrics["eval_score"] > 0.7
    assert metrics["episodes"] == 12 * 32
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (
        folder / "curves.png"
    ).stat().st_size > 1000
    assert "`rloo` stage" in (folder / "README.md").read_text() and not list(folder.rglob("*.bin"))


def test_lora_saves_an_adapter_that_loads(place: Path, make_model: Any) -> None:
    make_model(initializer_range=0.2).save_pretrained("policy")
    before = {path.name: path.read_bytes() for path in (place / "policy").iterdir()}
    folder = run_rloo(*options(**LEARNING, learning_rate=3e-2, use_peft=True, lora_r=8, lora_dropout=0.0))
    assert {path.name: path.read_bytes() for path in (place / "policy").iterdir()} == before
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    assert low_share_of(folder) > low_share_of("policy") + 0.1
    assert load_causal_lm(str(folder)).generation_config.eos_token_id == [EOS]


def test_beta_keeps_the_policy_near_its_reference(place: Path) -> None:
    free, held = (
        batches(trained(**LEARNING | {"learning_rate": 3e-3, "beta": beta, "max_steps": 16})[0])
        for beta in (1e-6, 2.0)
    )
    assert free[0]["kl"] == pytest.approx(0.0, abs=1e-5) and free[-1]["kl"] > 2 * abs(held[-1]["kl"])
    assert free[-1]["reward"] > held[-1]["reward"]


OTHER_VOCABULARY = "another_reward_model"


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize("reward_model", ["reward_model", OTHER_VOCABULARY])
def test_a_reward_model_scores_as_in_ppo(
    place: Path, form: str, reward_model: str, make_reward_model: Any, make_tokenizer: Any
) -> None:
    """The answers that RLOO sampled and scored get the same scores from PPOTrainer, with prompt and EOS."""
    write_prompts(place, CHAT if form == "chat" else PLAIN)
    own = make_tokenizer()
    own.add_tokens(["zz"])
    make_reward_model(1, initializer_range=0.2, vocab_size=len(own)).save_pretrained(place / OTHER_VOCABULARY)
    own.save_pretrained(place / OTHER_VOCABULARY)
    trainer = build_rloo_trainer(
        *options(reward=f"{reward_model} rloo_rewards:remember", learning_rate=0.0, max_steps=4)
    )
    trainer.train()
    [function, _] = trainer.reward_funcs
    ppo = PPOTrainer(
        "policy", reward_model, PPOConfig("ppo", response_length=6, report_to="none"), trainer.train_dataset
    )
    logged = [entry[f"rewards/{reward_model}/mean"] for entry in batches(trainer)]
    ended = set()
    for batch, mean in zip(sys.modules["rloo_rewards"].SEEN, logged, strict=True):
        ids = batch["completion_ids"]
        assert all(EOS not in answer[:-1] for answer in ids)
        stopped = [answer[-1] == EOS for answer in ids]
        ended |= set(stopped)
        prompts = ppo.prompts.rows([ppo.train_dataset["prompt"].index(prompt) for prompt in batch["prompts"]])
        expected = ppo.score(prompts, Completions(ids, stopped))[reward_model]
        assert function(**batch, trainer_state=None) == pytest.approx(expected, abs=1e-5)
        assert mean == pytest.approx(sum(expected) / len(expected), abs=1e-5)
        unended = ppo.score(prompts, Completions([answer[:-1] for answer in ids], [False] * len(ids)))[reward_model]
        rows = zip(stopped, expected, unended, strict=True)
        assert all(score != pytest.approx(other) for end, score, other in rows if end), "the EOS is read"
    assert ended == {True, False}


def test_reward_functions_receive_the_dataset_columns_as_in_ppo(place: Path) -> None:
    """By name and row by row; functions may be async, and token rewards are summed."""
    names = " ".join(f"rloo_rewards:{name}" for name in ("wanted_letters", "by_token", "remember"))
    trainer = build_rloo_trainer(*options(reward=names))
    trainer.train()
    for entry in batches(trainer):
        assert entry["rewards/by_token/mean"] == pytest.approx(0.5 * entry["completions/mean_length"])
    wanted = {row["prompt"]: row["wanted"] for row in PLAIN}
    logged = [entry["rewards/wanted_letters/mean"] for entry in batches(trainer)]
    for batch, mean in zip(sys.modules["rloo_rewards"].SEEN, logged, strict=True):
        counts = [
            text.count(wanted[prompt]) for prompt, text in zip(batch["prompts"], batch["completions"], strict=True)
        ]
        assert mean == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("form", ["plain", "begun", "cut"])
def test_prompts_are_tokenized_as_in_ppo(place: Path, form: str, make_tokenizer_with_bos: Any) -> None:
    """With BOS once, without an EOS that the tokenizer appends, a begun turn continued, and long prompts cut."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer_with_bos()
    marks = [("<|system|>", 260), ("<|endoftext|>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|endoftext|>", special_tokens=marks
    )
    tokenizer.save_pretrained(place / "policy")
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    prompts, ids = {
        "plain": ("Hi", [260, *b"Hi"]),
        "begun": (begun, [258, *b"Hi", 261, 259, *b"Ho"]),
        "cut": ("x" * 200, [ord("x")] * 122),
    }[form]
    write_prompts(place, [{"prompt": prompts}] * 8)
    trainer = build_rloo_trainer(
        *options(reward="rloo_rewards:remember reward_model", max_steps=1, too_long="cut" if form == "cut" else None)
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rows = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    assert all(row[mask].tolist() == ids for row, mask in rows)
    assert trainer.row_counts["train"]["too_long_cut"] == (8 if form == "cut" else 0)


def test_padding_does_not_shift_positions(place: Path) -> None:
    """Training uses the log-probabilities of each prompt and answer alone, in float64."""
    trainer = build_rloo_trainer(*options(temperature=0.7))
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    masks = (batch["prompt_mask"].bool(), batch["completion_mask"].bool())
    assert not masks[0].all()
    for row, expected in enumerate(batch["old_logps"].tolist()):
        prompt, answer = batch["prompt_ids"][row][masks[0][row]], batch["completion_ids"][row][masks[1][row]]
        for model in (trainer.model.eval(), trainer.ref_model.eval()):
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer])[None]).logits[0].double() / 0.7
            chosen = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
            assert chosen[torch.arange(len(answer)), answer].sum().item() == pytest.approx(expected, abs=1e-4)
    padded = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    row = int(mask[:, 0].argmin())
    with torch.no_grad():
        together = trainer.ref_model(input_ids=padded, attention_mask=mask).logits[row][mask[row].bool()]
        alone = trainer.ref_model(padded[row][mask[row].bool()][None]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", [0.05, 0.0])
def test_zero_learning_rate_changes_no_weight(place: Path, beta: float) -> None:
    trainer, measured = trained(learning_rate=0.0, beta=beta)
    assert same_weights("policy", trainer.model)
    kept = [entry[name] for entry in (*batches(trainer), measured) for name in ("kl", "eval_kl") if name in entry]
    assert kept == pytest.approx([0.0] * (3 if beta else 0), abs=1e-5)


def test_the_reference_of_a_lora_folder_is_the_merged_model(place: Path, tokenizer: Any) -> None:
    """With the adapter's base as reference, an untrained model would already have a KL above zero."""
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(load_causal_lm("policy"), shape).save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    assert not same_weights("adapter", "policy")
    trainer, _ = trained(model_name_or_path="adapter", learning_rate=0.0)
    assert same_weights("adapter", trainer.ref_model) and same_weights("adapter", trainer.model)
    assert batches(trainer)[-1]["kl"] == pytest.approx(0.0, abs=1e-5)


def test_scores_are_normalized_weighted_and_lowered_without_eos(place: Path) -> None:
    changes = {
        "reward": "reward_model rloo_rewards:low_share",
        "reward_weights": "0.5 3.0",
        "missing_eos_penalty": 2.0,
    }
    scaled, raw = (
        batches(trained(learning_rate=0.0, **changes, normalize_rewards=on)[0])[0] for on in ("true", "false")
    )
    assert scaled["rewards/reward_model/mean"] == pytest.approx(
        (raw["rewards/reward_model/mean"] - 0.5) / 2.0, abs=1e-5
    )
    missing = scaled["completions/clipped_ratio"]
    assert 0.0 < missing < 1.0 and scaled["rewards/missing_eos/mean"] == pytest.approx(-2.0 * missing)
    total = 0.5 * scaled["rewards/reward_model/mean"] + 3.0 * scaled["rewards/low_share/mean"] - 2.0 * missing
    assert scaled["reward"] == pytest.approx(total, abs=1e-5)


def test_leftover_generation_settings_change_no_answer(place: Path) -> None:
    """They would sample from a distribution other than the trained one."""
    changes = {"reward": "rloo_rewards:remember", "learning_rate": 0.0}
    build_rloo_trainer(*options(**changes)).train()
    config = json.loads((place / "policy" / "generation_config.json").read_text())
    config |= {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(100)), "top_k": 2}
    (place / "policy" / "generation_config.json").write_text(json.dumps(config))
    build_rloo_trainer(*options(**changes)).train()
    seen = [batch["completion_ids"] for batch in sys.modules["rloo_rewards"].SEEN]
    assert len(seen) == 4 and seen[:2] == seen[2:]


def test_the_run_repeats_from_its_recipe(place: Path) -> None:
    folder = run_rloo(*options())
    again = ["--config", str(folder / "recipe.yaml"), "--output_dir", "again"]
    trainer = build_rloo_trainer(*parse_arguments(RLOOArguments, ModelConfig, RLOOConfig, argv=again))
    trainer.train()
    assert same_weights(folder, trainer.model) and not same_weights(folder, "policy")
    assert not same_weights(folder, trained(seed=1)[0].model)


def test_a_resumed_run_matches_the_uninterrupted_run(place: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole, _ = trained(**changes)
    shutil.copytree(place / "out" / "checkpoint-2", place / "resumed" / "checkpoint-2")
    resumed = run_rloo(*options(output_dir="resumed", resume_from_checkpoint="true", **changes))
    assert same_weights(whole.model, resumed)


def test_extra_datasets_are_not_overwritten(place: Path) -> None:
    shutil.copytree(place / "prompts", place / "besides" / "prompts")
    with pytest.raises(UserError, match="holds the input besides/prompts"):
        run_rloo(*options(output_dir="besides", extra_dataset_names="besides/prompts", overwrite=True))


def test_answers_used_several_times_are_counted_once() -> None:
    shape = {"per_device_train_batch_size": 8, "num_generations": 4}
    config = RLOOConfig("out", steps_per_generation=2, num_iterations=3, **shape)
    assert config.answers == 16
    assert [config.episodes(steps) for steps in (0, 1, 6, 7)] == [0, 16, 16, 32]
    config = RLOOConfig("out", gradient_accumulation_steps=4, **shape)
    assert config.answers == 32 and config.episodes(3) == 96


def test_metrics_hold_the_first_and_the_last_batch() -> None:
    keys = ("reward", "kl", "completions/mean_length", "completions/clipped_ratio")
    log = [{"loss": 1.0}, *(dict.fromkeys(keys, number / 8) for number in (1, 2, 4)), {"train_loss": 1.0}]
    expected = {"score_before": 0.125, "kl_before": 0.125**2, "length_before": 0.125, "eos_share_before": 0.875}
    expected |= {"score": 0.5, "kl": 0.25, "length": 0.5, "eos_share": 0.5}
    assert rloo_metrics(log) == expected
    assert rloo_metrics([{"loss": 1.0}]) == {}


def _labels(place: Path) -> None:
    config = json.loads((place / "reward_model" / "config.json").read_text())
    labels = {str(index): f"LABEL_{index}" for index in range(3)}
    config |= {"id2label": labels, "label2id": {value: int(key) for key, value in labels.items()}}
    (place / "reward_model" / "config.json").write_text(json.dumps(config))


def _without(token: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        path = place / "policy" / "tokenizer_config.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != token})
        )

    return spoil


def _prompts(*rows: dict[str, Any]) -> Callable[[Path], None]:
    return lambda place: write_prompts(place, list(rows))


def _nothing(place: Path) -> None:
    pass


def _full_folder(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("three years of work")


BAD: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (_nothing, {"model_name_or_path": None}, "no model; pass --model_name_or_path"),
    (_nothing, {"model_name_or_path": "./nowhere"}, "no such folder"),
    (_nothing, {"model_name_or_path": "reward_model"}, "is a reward model, which cannot generate"),
    (_nothing, {"reward": None}, "no reward; pass --reward"),
    (_nothing, {"reward": "policy"}, "not a sequence classifier"),
    (_nothing, {"reward": "rloo_rewards:missing"}, "cannot be imported"),
    (_prompts(*[{"prompt": "a"}] * 8), {"reward": "rloo_rewards:wanted_letters"}, "does not fit the dataset"),
    (_nothing, {"reward_weights": "1.0 2.0"}, "1 rewards and 2 reward_weights"),
    (_nothing, {"num_generations": 3}, "num_generations 3 does not divide the 8 answers of a batch"),
    (_nothing, {"num_generations": 1}, "give 2 or more"),
    (_nothing, {"num_generations_eval": 3}, "num_generations_eval 3 does not divide the 8 answers of an evaluation"),
    (_nothing, {"per_device_train_batch_size": 64}, "has 8 prompts, fewer than the 16 of one batch"),
    (_nothing, {"temperature": 0}, "temperature is 0.0"),
    (_nothing, {"max_completion_length": 0}, "max_completion_length is 0"),
    (_nothing, {"max_completion_length": 127}, "does not fit the model's context of 128"),
    (_nothing, {"num_generation": 2}, "did you mean 'num_generations'"),
    (_nothing, {"dataset_name": None}, "no dataset; pass --dataset_name"),
    (_nothing, {"dataset_train_split": "validation"}, "it has test, train"),
    (_labels, {}, "3 labels"),
    (_without("pad_token"), {}, "no pad token"),
    (_without("eos_token"), {}, "no EOS token"),
    (_prompts({"prompt": "x" * 125}), {}, "does not fit the model's context of 128"),
    (_prompts({"riddle": "why?", "wanted": "y"}), {}, "--columns prompt=NAME"),
    (_prompts({"prompt": [1, 2]}), {}, "which is no text"),
    (_prompts({"prompt": "a"}, {"prompt": ""}), {}, "1 prompts, fewer than the 2 of one batch"),
    (_prompts(), {}, "no rows"),
    (_full_folder, {}, "not empty"),
    (_full_folder, {"overwrite": "true"}, "no stage wrote"),
]


@pytest.mark.parametrize(
    ("spoil", "changed", "words"), BAD, ids=[f"{index}-{bad[2]}" for index, bad in enumerate(BAD)]
)
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
        run_rloo(*options(**changed))
    assert "\n" not in str(caught.value)
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts) == before


def test_the_recipe_prints_one_line_and_exits_2(place: Path) -> None:
    words = [
        "--model_name_or_path",
        "policy",
        "--output_dir",
        "out",
    ]
    words += ["--reward", "reward_model", "--dataset_name", "prompts", "--num_generations", "3"]
    result = forks.run_recipe("rloo", words, place)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and "does not divide" in errors[0]
    assert not (place / "out").exists()

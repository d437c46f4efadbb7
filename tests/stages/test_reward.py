"""The reward stage: loss, metrics on held-out rows, what is trained, what ppo loads, and what it refuses."""

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.encoding import encode_completion
from rlhf_recipes.data.fitting import fit_rows
from rlhf_recipes.models.loading import load_reward_model, load_tokenizer
from rlhf_recipes.scoring.reward import load_reward
from rlhf_recipes.stages.reward import ModelConfig, RewardArguments, RewardConfig, build_reward_trainer, run_reward
from rlhf_recipes.training.classifier import collate_labelled_texts, encode_labelled

EOS = "<|endoftext|>"
Rows = Sequence[dict[str, Any]]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Each form of pairs with the two texts of each row that the reward model must read.
PLAIN = [{"chosen": "Good day.", "rejected": "Go!"}, {"chosen": "So.", "rejected": "No, I never did."}]
PROMPTED = [{"prompt": f"Q{index}? "} | row for index, row in enumerate(PLAIN)]
CHAT = [
    {"prompt": [says("user", "Hi")], "chosen": [says("assistant", "Hello!")], "rejected": [says("assistant", "?")]},
    {"prompt": [says("user", "Who?")], "chosen": [says("assistant", "I.")], "rejected": [says("assistant", "Nobody")]},
]
WHOLE_CHAT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHAT]
CHAT_READ = [
    ("<|user|>Hi<|end|><|assistant|>Hello!" + EOS, "<|user|>Hi<|end|><|assistant|>?" + EOS),
    ("<|user|>Who?<|end|><|assistant|>I." + EOS, "<|user|>Who?<|end|><|assistant|>Nobody" + EOS),
]
FORMS = {
    "plain": (PLAIN, [("Good day." + EOS, "Go!" + EOS), ("So." + EOS, "No, I never did." + EOS)]),
    "prompted": (
        PROMPTED,
        [("Q0? Good day." + EOS, "Q0? Go!" + EOS), ("Q1? So." + EOS, "Q1? No, I never did." + EOS)],
    ),
    "chat": (CHAT, CHAT_READ),
    "whole chat": (WHOLE_CHAT, CHAT_READ),
}
LABELLED = [
    {"text": "Fine film.", "label": 1},
    {"text": "Dull.", "label": 0},
    {"text": "Long and dull, alas.", "label": 0},
    {"text": "A joy", "label": 1},
]


def write(folder: Path, **splits: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_tokenizer: Callable[[], Any]
) -> Path:
    """A language model with weights so large that untrained scores differ."""
    folder = tmp_path_factory.mktemp("model")
    make_model(0, initializer_range=0.2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ask(model_folder: Path, tmp_path: Path) -> Callable[..., tuple[RewardArguments, ModelConfig, RewardConfig]]:
    """(rows, held-out rows, **changes) -> the three arguments of the stage; the output goes to `tmp_path / "out"`."""

    def make(rows: Rows | None = None, test: Rows | None = None, **changes: Any) -> Any:
        given = {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "out"), "disable_tqdm": True}
        given |= {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2}
        if rows is not None:
            splits = {"train": rows} | ({"test": test} if test is not None else {})
            given["dataset_name"] = str(write(tmp_path / "data", **splits))
        given |= changes
        words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
        return parse_arguments(RewardArguments, ModelConfig, RewardConfig, argv=words)

    return make


def logits_by_hand(model: Any, tokenizer: Any, text: str) -> list[float]:
    """The head applied to the hidden state of the last token of one text, in float64, without padding or pooling."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        last = model.transformer(ids).last_hidden_state[0, -1].double()
    return (model.score.weight.detach().double() @ last).tolist()


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_metrics_of_pairs_match_float64(ask: Any, form: str) -> None:
    """With learning rate 0 the reward model stays untrained, so that every metric can be recomputed from its folder."""
    rows, texts = FORMS[form]
    folder = run_reward(*ask(rows, rows, learning_rate=0.0, max_steps=1))
    reward_model, tokenizer = load_reward_model(str(folder)).eval(), load_tokenizer(str(folder))
    scores = [[logits_by_hand(reward_model, tokenizer, text)[0] for text in pair] for pair in texts]
    margins = [chosen - rejected for chosen, rejected in scores]
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / 2
    measured = metrics_of(folder)
    assert measured["train_loss"] == measured["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert measured["margin"] == pytest.approx(sum(margins) / 2, rel=1e-4)
    assert measured["reward_accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert measured["longer_accuracy"] == 0.5  # the longer answer is chosen in one row of two
    assert measured["pairs"] == 2 and 0 <= measured["calibration_error"] <= 1
    assert reward_model.config.num_labels == 1 and reward_model.config.pad_token_id == tokenizer.pad_token_id


def planted_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Planted preference: of two answers of random letters, the one with a z in it is chosen."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = [chance.choices("abcdefgh", k=chance.randint(3, 9)) for _ in range(2)]
        answers[0][chance.randrange(len(answers[0]))] = "z"
        chosen, rejected = ([says("assistant", "".join(letters))] for letters in answers)
        rows.append({"prompt": [says("user", chance.choice("pqrs"))], "chosen": chosen, "rejected": rejected})
    return rows


def as_ppo_scores(folder: Path, rows: Rows, side: str) -> list[float]:
    """Return scores as PPO computes them: from the ids of the prompt and of the completion, which ends with EOS."""
    tokenizer = load_tokenizer(str(folder))
    prompts = [f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>" for row in rows]
    answers = [row[side][0]["content"] for row in rows]
    return load_reward(str(folder), tokenizer)(
        [row["prompt"] for row in rows],
        [row[side] for row in rows],
        prompt_ids=[tokenizer(prompt)["input_ids"] for prompt in prompts],
        completion_ids=[[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers],
    )


def test_a_short_run_learns_a_planted_preference(ask: Any, real_plots: None) -> None:
    """Also, the accuracies on held-out pairs of TRL, of metrics.json and of PPO's scores are equal."""
    train, test = planted_pairs(256, 0), planted_pairs(60, 1)
    changes = {
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "eval_strategy": "epoch",
    }
    arguments = ask(train, test, per_device_eval_batch_size=60, **changes)
    folder = run_reward(*arguments)
    measured = metrics_of(folder)
    assert measured["reward_accuracy"] >= 0.9 and measured["margin"] > 0.5
    chosen, rejected = (as_ppo_scores(folder, test, side) for side in ("chosen", "rejected"))
    wins = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(test)
    assert measured["reward_accuracy"] == pytest.approx(wins)
    assert measured["margin"] == pytest.approx((sum(chosen) - sum(rejected)) / len(test), rel=1e-4)
    lengths = [[len(row[side][0]["content"]) for row in test] for side in ("chosen", "rejected")]
    longer = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(*lengths, strict=True)]
    assert measured["longer_accuracy"] == pytest.approx(sum(longer) / len(test))

    again = ask(train, test, model_name_or_path=folder, output_dir=folder.parent / "again", **changes)
    trainer = build_reward_trainer(*again)  # a reward model with as many labels keeps its head
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(wins, abs=0.02)  # a mean over batches, not pairs
    for image in ("curves.png", "reliability.png"):
        assert (folder / image).read_bytes().startswith(b"\x89PNG") and (folder / image).stat().st_size > 1000
    assert not (folder / "training_args.bin").exists()


def test_pad_equal_to_eos_gives_equal_scores_in_training_and_ppo(
    ask: Any, make_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    make_model(0, initializer_range=0.2).save_pretrained(start)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = EOS
    tokenizer.save_pretrained(start)
    test = planted_pairs(30, 1)
    folder = run_reward(*ask(test, test, model_name_or_path=start, learning_rate=0.0, max_steps=1))
    assert load_reward_model(str(folder)).config.pad_token_id == tokenizer.eos_token_id
    margins = [
        c - r for c, r in zip(*(as_ppo_scores(folder, test, side) for side in ("chosen", "rejected")), strict=True)
    ]
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert metrics_of(folder)["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_the_loss_of_labels_matches_cross_entropy_in_float64(ask: Any) -> None:
    folder = run_reward(*ask(LABELLED, LABELLED, learning_rate=0.0, max_steps=1, per_device_train_batch_size=4))
    reward_model, tokenizer = load_reward_model(str(folder)).eval(), load_tokenizer(str(folder))
    logits = [logits_by_hand(reward_model, tokenizer, row["text"] + EOS) for row in LABELLED]
    odds = [good - bad for bad, good in logits]
    signed = [odd if row["label"] else -odd for odd, row in zip(odds, LABELLED, strict=True)]
    loss = sum(math.log1p(math.exp(-value)) for value in signed) / len(signed)
    measured = metrics_of(folder)
    assert measured["train_loss"] == measured["eval_loss"] == pytest.approx(loss, rel=1e-4)
    hits = sum(odd > 0 and row["label"] == 1 for odd, row in zip(odds, LABELLED, strict=True))
    claimed, right = sum(odd > 0 for odd in odds), sum(value > 0 for value in signed)
    assert measured["accuracy"] == measured["reward_accuracy"] == right / 4
    assert measured["precision"] == (hits / claimed if claimed else 0) and measured["recall"] == hits / 2
    assert measured["f1"] == pytest.approx(2 * hits / (claimed + 2))
    assert reward_model.config.id2label == {0: "bad", 1: "good"}
    ids = [tokenizer(row["text"] + EOS)["input_ids"] for row in LABELLED]
    scores = load_reward(str(folder), tokenizer)([""] * 4, [""] * 4, prompt_ids=[[]] * 4, completion_ids=ids)
    assert scores == pytest.approx(odds, rel=1e-4, abs=1e-5)


def planted_reviews(count: int, seed: int) -> list[dict[str, Any]]:
    """Planted sentiment: half of the texts hold a plus sign and are good, the others hold a minus."""
    chance = random.Random(seed)
    rows = []
    for index in range(count):
        letters = chance.choices("abcdefgh ", k=chance.randint(5, 20))
        letters[chance.randrange(len(letters))] = "-+"[index % 2]
        rows.append({"text": "".join(letters), "label": index % 2})
    return rows


def test_a_short_run_learns_planted_sentiment(ask: Any) -> None:
    train, test = planted_reviews(256, 0), planted_reviews(60, 1)
    changes = {
        "learning_rate": 3e-3,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 16,
        "eval_strategy": "epoch",
    }
    folder = run_reward(*ask(train, test, reward_type="classifier", **changes))
    measured = metrics_of(folder)
    assert measured["accuracy"] >= 0.9 and measured["f1"] >= 0.9
    tokenizer = load_tokenizer(str(folder))
    ids = [tokenizer(row["text"] + EOS)["input_ids"] for row in test]
    empty: list[list[int]] = [[]] * len(test)
    odds = load_reward(str(folder), tokenizer)(empty, [""] * len(test), prompt_ids=empty, completion_ids=ids)
    right = sum((odd > 0) == bool(row["label"]) for odd, row in zip(odds, test, strict=True))
    assert measured["accuracy"] == right / len(test)
    confident = [1 / (1 + math.exp(-abs(odd))) for odd in odds]
    assert measured["calibration_error"] < 0.3 and max(confident) > 0.9


def test_gradient_accumulation_changes_no_weight(ask: Any) -> None:
    """4 x 1 and 1 x 4 rows are the same step; transformers' classifiers alone would sum the accumulated losses."""
    weights = []
    for batch, accumulate in ((4, 1), (1, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        trainer = build_reward_trainer(*ask(LABELLED, max_steps=1, optim="sgd", learning_rate=0.1, **sizes))
        loss = trainer.train().training_loss
        weights.append((loss, trainer.model.score.weight.detach().clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    torch.testing.assert_close(weights[0][1], weights[1][1], rtol=1e-5, atol=1e-7)


def test_truncated_texts_do_not_end_with_eos(tokenizer: Any) -> None:
    texts = {"ab": 0, "abc": 1, "abcd": True, "abcde": 0}
    rows = [encode_labelled({"text": text, "label": label}, tokenizer) for text, label in texts.items()]
    rows = fit_rows(rows, 4, "cut", RowCounts("rows"))
    eos = tokenizer.eos_token_id
    assert [row["input_ids"] for row in rows] == [
        [97, 98, eos],
        [97, 98, 99, eos],
        [97, 98, 99, 100],
        [97, 98, 99, 100],
    ]
    assert [row["labels"] for row in rows] == [0, 1, 1, 0]
    batch = collate_labelled_texts([{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["labels"].tolist() == [1, 0]


def test_the_seed_initializes_the_head(ask: Any) -> None:
    heads = [build_reward_trainer(*ask(CHAT, seed=seed)).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (1, 32)


@pytest.mark.parametrize("rows", [CHAT * 4, LABELLED * 2], ids=["ranking", "classifier"])
@pytest.mark.parametrize("weights", ["float", "load_in_4bit", "load_in_8bit"])
def test_lora_trains_adapters_and_head_and_loads_as_a_reward_model(
    ask: Any, rows: Rows, weights: str, make_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    make_model(0, n_embd=64, initializer_range=0.1).save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    changes = {
        "use_peft": True,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "model_name_or_path": start,
    }
    changes |= {} if weights == "float" else {weights: True, "eval_strategy": "steps", "eval_steps": 3}
    arguments = ask(rows, rows[:4], **changes)
    trainer = build_reward_trainer(*arguments)
    head = trainer.model.base_model.model.score.modules_to_save["default"].weight
    first = head.detach().clone()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    assert all(value.dtype == torch.float32 for value in trained.values())
    trainer.train()
    assert not torch.equal(first, head)

    folder = run_reward(*arguments)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    reward_model = load_reward_model(str(folder))
    assert reward_model.config.num_labels == (1 if rows[0].get("chosen") else 2)
    assert type(reward_model).__name__ == "GPT2ForSequenceClassification"
    torch.testing.assert_close(reward_model.score.weight, head, rtol=1e-5, atol=1e-6)  # the same run twice
    tokenizer = load_tokenizer(str(folder))
    ids = [tokenizer(text + EOS)["input_ids"] for text in ("Hello", "No, no")]
    empty: list[list[int]] = [[], []]
    live = load_reward(trainer.model, tokenizer)(["", ""], ["", ""], prompt_ids=empty, completion_ids=ids)
    loaded = load_reward(str(folder), tokenizer)(["", ""], ["", ""], prompt_ids=empty, completion_ids=ids)
    # The adapter of a quantized base is merged into the float32 one: what differs is the rounding of the base.
    assert loaded == pytest.approx(live, rel=1e-4, abs=1e-4 if weights == "float" else 0.4)


def test_a_reward_model_starts_from_a_merged_lora_model(
    ask: Any, make_model: Any, model_folder: Path, tmp_path: Path
) -> None:
    """The scores change with the adapter, because its weights are merged into the trunk."""
    from peft import LoraConfig, get_peft_model

    from rlhf_recipes.models.loading import load_causal_lm

    torch.manual_seed(0)
    shape = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = get_peft_model(load_causal_lm(str(model_folder)), shape)
    adapted.save_pretrained(tmp_path / "adapter")
    load_tokenizer(str(model_folder)).save_pretrained(tmp_path / "adapter")
    trainer = build_reward_trainer(*ask(CHAT, model_name_or_path=tmp_path / "adapter"))
    merged = adapted.merge_and_unload().transformer.state_dict()
    trunk = trainer.model.transformer.state_dict()
    assert all(torch.allclose(trunk[name], merged[name], atol=1e-6) for name in merged)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_pairs_that_are_too_long_are_dropped_and_counted(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = {"prompt": "a", "chosen": "b" * 50, "rejected": "c"}
    folder = run_reward(*ask([*PROMPTED, long], [*PROMPTED, long], max_length=30, max_steps=1))
    assert metrics_of(folder)["pairs"] == 2
    assert "the training split: 1 of 3 rows are longer than 30 tokens" in caplog.text
    assert "the held-out split: 1 of 3 rows" in caplog.text
    beyond = {"prompt": "a", "chosen": "b" * 127, "rejected": "c"}  # 129 tokens with EOS
    trainer = build_reward_trainer(*ask([*PROMPTED, beyond]))
    assert len(trainer.train_dataset) == 2 and "longer than 128 tokens" in caplog.text


WRONG = {
    "no model": (CHAT, {"model_name_or_path": None}, "no model; pass --model_name_or_path"),
    "no such model": (CHAT, {"model_name_or_path": "./nowhere"}, "no such folder"),
    "no such file": (None, {"dataset_name": "./nowhere.jsonl"}, "no such file or folder"),
    "missing column": (
        [{"question": "a", "answer": "b"}] * 2, {}, "in the columns question, answer, and this stage reads preferences"
    ),
    "another kind": (LABELLED, {"reward_type": "ranking"}, "in the columns text, label, and this stage"),
    "empty": ([], {}, "no rows"),
    "smaller than a batch": (CHAT, {"per_device_train_batch_size": 4}, "has 2 rows, but one batch takes 4"),
    "three labels": ([*LABELLED, {"text": "so so", "label": 2}], {}, "--label_threshold 2"),
    "labels in words": ([{"text": "a", "label": "mauve"}, {"text": "b", "label": "ochre"}], {}, "--positive_label ochre"),
    "one label": ([LABELLED[0]] * 4, {}, "every label of the training split is 1"),
    "no text": ([{"text": None, "label": 1}, {"text": "b", "label": 0}], {}, "every label of the training split is 0"),
    "long prompt": ([PROMPTED[0], PROMPTED[1] | {"prompt": "x" * 128}], {}, "after dropping rows, the training split has 1"),
    "long and refused": ([PROMPTED[0] | {"prompt": "x" * 128}] * 2, {"too_long": "error"}, "row 0: the pair has 138 tokens"),
    "beyond the context": (CHAT, {"max_length": 129}, "max_length 129 exceeds the 128 tokens"),
    "quantized without LoRA": (CHAT, {"load_in_8bit": True}, "add --use_peft true"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_refused_before_weights_are_read(
    ask: Any, case: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder holds no weights, so whoever tried to read them would complain of that instead."""
    rows, changes, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    weightless = tmp_path / "weightless"
    shutil.copytree(model_folder, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=message):
        run_reward(*ask(rows, **{"model_name_or_path": weightless, **changes}))
    assert not (tmp_path / "out").exists()


def test_an_unknown_reward_type_is_refused() -> None:
    with pytest.raises(UserError, match="unknown reward_type 'jury'; choose one of auto, ranking, classifier"):
        RewardArguments(reward_type="jury")


def test_a_reward_model_with_another_number_of_labels_is_refused_as_start(
    ask: Any, make_reward_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    make_reward_model(0, num_labels=2).save_pretrained(tmp_path / "classifier")
    make_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="another number of labels than 1"):
        run_reward(*ask(CHAT, model_name_or_path=tmp_path / "classifier"))
    assert not (tmp_path / "out").exists()


def test_the_recipe_prints_one_line_and_exits_2(tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / "data", train=[{"text": "a", "label": 5}] * 8)
    words = ["--model_name_or_path", model_folder, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    result = forks.run_recipe("reward", words)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "--label_threshold 5" in line and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_pairs_with_and_without_prompts_are_not_mixed(ask: Any, tmp_path: Path) -> None:
    """Prompts of one source used to be left out because another source had none."""
    further = write(tmp_path / "further", train=PLAIN * 2)
    with pytest.raises(UserError, match="4 of 8 pairs have no prompt"):
        run_reward(*ask(PROMPTED * 2, PROMPTED, extra_dataset_names=further, max_steps=1))
    with pytest.raises(UserError, match="the held-out split has prompts and the training split has none"):
        run_reward(*ask(PLAIN * 2, PROMPTED, max_steps=1))


def test_plain_text_is_scored_as_trl_trains_on_it(
    ask: Any, make_tokenizer_with_bos: Any, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "begins")
    make_tokenizer_with_bos().save_pretrained(tmp_path / "begins")
    trainer = build_reward_trainer(*ask(PROMPTED, PROMPTED, model_name_or_path=str(tmp_path / "begins")))
    tokenizer = load_tokenizer(str(tmp_path / "begins"))
    for row, trained in zip(PROMPTED, trainer.eval_dataset, strict=True):
        for side in ("chosen", "rejected"):
            prompt, answer = encode_completion(row["prompt"], row[side], tokenizer)
            assert trained[f"{side}_ids"] == [*prompt, *answer] and prompt[0] == 260

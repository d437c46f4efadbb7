"""The dpo stage: what is compared, what the loss is, what is trained and saved, and what it refuses."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.stages.dpo import DPOArguments, DPOConfig, ModelConfig, build_dpo_trainer, run_dpo

EOS = "<|endoftext|>"
Rows = Sequence[dict[str, Any]]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PLAIN = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "11, I think"},
    {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."},
    {"prompt": "Say", "chosen": " yes", "rejected": " no"},
    {"prompt": "Up or", "chosen": " down", "rejected": " left"},
]
CHAT = [
    {"prompt": [says("user", row["prompt"])]}
    | {side: [says("assistant", row[side])] for side in ("chosen", "rejected")}
    for row in PLAIN
]
FORMS = {"plain": PLAIN, "chat": CHAT}


def rendered(row: dict[str, Any], side: str) -> tuple[str, str]:
    """Return prompt and answer of a pair as the chat template of conftest.py renders them, or as they are."""
    if isinstance(row["prompt"], str):
        return row["prompt"], row[side] + EOS
    return f"<|user|>{row['prompt'][0]['content']}<|end|><|assistant|>", row[side][0]["content"] + EOS


def write(folder: Path, **splits: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_tokenizer: Callable[[], Any]
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(0, initializer_range=0.1, resid_pdrop=0.1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def weightless(model_folder: Path, tmp_path: Path) -> Path:
    """The model's folder without its weights, so that reading them would raise another error."""
    shutil.copytree(model_folder, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "weightless"


@pytest.fixture
def ask(model_folder: Path, tmp_path: Path) -> Callable[..., tuple[DPOArguments, ModelConfig, DPOConfig]]:
    """(rows, test, **changes) -> the three arguments of the stage; the output goes to `tmp_path / "out"`."""

    def make(rows: Rows | None = None, test: Rows | None = None, **changes: Any) -> Any:
        given = {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "out"), "disable_tqdm": True}
        given |= {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2, "logging_steps": 1}
        if rows is not None:
            splits = {"train": rows} | ({"test": test} if test is not None else {})
            given["dataset_name"] = str(write(tmp_path / "data", **splits))
        given |= changes
        words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
        return parse_arguments(DPOArguments, ModelConfig, DPOConfig, argv=words)

    return make


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """log p(answer | prompt), one row, no padding, in float64."""
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, answer))
    with torch.no_grad():
        logits = model.eval()(torch.tensor([before + after])).logits[0].double()
    chosen = torch.log_softmax(logits[len(before) - 1 : -1], dim=-1)
    return chosen[torch.arange(len(after)), torch.tensor(after)].sum().item()


def margins(model: Any, rows: Rows, tokenizer: Any) -> list[float]:
    """Return the log-probability margin in nats of the chosen answer of each pair, under a model or a model folder."""
    model = load_causal_lm(str(model)) if isinstance(model, Path) else model
    return [
        log_probability(model, tokenizer, *rendered(row, "chosen"))
        - log_probability(model, tokenizer, *rendered(row, "rejected"))
        for row in rows
    ]


def trained(arguments: Any) -> tuple[Any, dict[str, float]]:
    """Return (trainer, metrics of its last evaluation), without saving the folder of the stage."""
    trainer = build_dpo_trainer(*arguments)
    trainer.train()
    return trainer, trainer.evaluate() if trainer.eval_dataset is not None else {}


def same_weights(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_compares_answers_and_their_eos_only(ask: Any, form: str) -> None:
    trainer = build_dpo_trainer(*ask(FORMS[form]))
    seen = []
    for batch in trainer.get_train_dataloader():
        words = [
            trainer.processing_class.decode(ids[mask.bool()])
            for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        half = len(words) // 2
        seen += list(zip(words[:half], words[half:], strict=True))
    expected = [(rendered(row, "chosen")[1], rendered(row, "rejected")[1]) for row in FORMS[form]]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}, {"precompute_ref_log_probs": True}], ids=str)
def test_an_untrained_model_prefers_neither_answer(ask: Any, changes: dict[str, Any]) -> None:
    """Before the first step policy and reference are equal: for any beta the loss is ln 2 and no pair has a margin."""
    trainer, measured = trained(ask(CHAT, CHAT, learning_rate=0.0, max_steps=2, beta=3.0, **changes))
    assert [entry["loss"] for entry in trainer.state.log_history[:2]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert measured["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert measured["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_training_widens_the_margin_as_in_the_paper(ask: Any, form: str, model_folder: Path) -> None:
    """Every pair's margin grows, and loss, accuracy and margin are those of Rafailov et al. 2023, equation 7."""
    rows, beta = FORMS[form], 0.2
    trainer, measured = trained(ask(rows, rows, learning_rate=3e-3, max_steps=12, beta=beta))
    before, after = (margins(model, rows, trainer.processing_class) for model in (model_folder, trainer.model))
    gains = [beta * (late - early) for early, late in zip(before, after, strict=True)]
    assert all(gain > 0.1 for gain in gains)
    loss = sum(math.log1p(math.exp(-gain)) for gain in gains) / len(gains)
    assert measured["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert measured["eval_rewards/margins"] == pytest.approx(sum(gains) / len(gains), rel=1e-4)
    assert measured["eval_rewards/accuracies"] == 1.0


def test_the_folder_loads_anywhere_and_its_recipe_repeats_the_run(ask: Any, tmp_path: Path, real_plots: None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_dpo(*ask(CHAT, CHAT, learning_rate=1e-3, max_steps=3))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 256 and AutoTokenizer.from_pretrained(folder).chat_template
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (
        folder / "curves.png"
    ).stat().st_size > 1000
    assert "`dpo` stage" in (folder / "README.md").read_text() and not list(folder.rglob("*.bin"))
    words = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]
    again, measured = trained(parse_arguments(DPOArguments, ModelConfig, DPOConfig, argv=words))
    assert same_weights(again.model, model)
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    assert metrics["steps"] == 3 and all(metrics[name] == pytest.approx(measured[name]) for name in kept)


def test_a_resumed_run_matches_the_uninterrupted_run(ask: Any, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole, _ = trained(ask(CHAT * 2, **changes))
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "out" / "checkpoint-2", resumed / "checkpoint-2")
    run_dpo(*ask(CHAT * 2, output_dir=resumed, resume_from_checkpoint="true", **changes))
    assert same_weights(whole.model, load_causal_lm(str(resumed)))


def test_lora_saves_an_adapter_that_loads(ask: Any, model_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    folder = run_dpo(*ask(CHAT, use_peft=True, learning_rate=1e-2, max_steps=8))
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    tokenizer = load_tokenizer(str(folder))
    pairs = zip(margins(model_folder, CHAT, tokenizer), margins(folder, CHAT, tokenizer), strict=True)
    assert all(late > early + 0.5 for early, late in pairs)
    assert load_causal_lm(str(folder)).generation_config.eos_token_id == 256


def test_the_reference_of_a_lora_folder_is_the_merged_model(ask: Any, model_folder: Path, tmp_path: Path) -> None:
    """With the adapter's base as reference, an untrained model would already have margins."""
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    tokenizer, adapter = load_tokenizer(str(model_folder)), tmp_path / "adapter"
    get_peft_model(load_causal_lm(str(model_folder)), shape).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    apart = zip(margins(model_folder, PLAIN, tokenizer), margins(adapter, PLAIN, tokenizer), strict=True)
    assert any(abs(late - early) > 0.1 for early, late in apart)
    trainer, _ = trained(ask(PLAIN, model_name_or_path=adapter, learning_rate=0.0, max_steps=1, beta=10.0))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(UserError, match="is itself a LoRA adapter"):
        run_dpo(*ask(PLAIN, model_name_or_path=adapter, use_peft=True))


def test_an_adapter_on_quantized_weights_is_trained(
    ask: Any, make_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    make_model(0, n_embd=64).save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    changes = {"model_name_or_path": start, "load_in_4bit": True, "use_peft": True, "lora_dropout": 0.0}
    trainer, _ = trained(ask(CHAT, CHAT, learning_rate=1e-2, max_steps=8, **changes))
    assert {value.dtype for value in trainer.model.parameters() if value.requires_grad} == {torch.float32}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < 0.5


def test_pairs_that_are_too_long_are_dropped_or_cut(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = {"prompt": "Count:", "chosen": " one" * 50, "rejected": " two"}
    rows = [*PLAIN, long, {"prompt": "x" * 200, "chosen": "y", "rejected": "z"}]
    trainer = build_dpo_trainer(*ask(rows))
    assert len(trainer.train_dataset) == len(PLAIN)
    assert f"2 of {len(rows)} rows are longer than 128 tokens and are dropped" in caplog.text
    trainer = build_dpo_trainer(*ask(rows, too_long="cut"))
    assert trainer.row_counts["train"] == {
        "read": len(rows), "too_long_cut": 1, "too_long_dropped": 1, "used": len(PLAIN) + 1
    }  # fmt: skip
    cut = trainer.train_dataset[len(PLAIN)]
    assert bytes(cut["chosen_ids"]) == (b" one" * 50)[:122] and cut["rejected_ids"] == [*b" two", 256]


def test_pairs_that_teach_nothing_are_dropped_and_counted(ask: Any) -> None:
    """A pair with an empty rejected answer is kept: it teaches that silence is worse."""
    equal, empty = PLAIN[0] | {"rejected": PLAIN[0]["chosen"]}, PLAIN[0] | {"chosen": ""}
    wordless = PLAIN[0] | {"rejected": ""}
    trainer = build_dpo_trainer(*ask([*PLAIN[1:], equal, empty, wordless]))
    dropped = {"empty_answers": 1, "equal_pairs": 1, "empty_rejected": 1}
    counts = {"read": len(PLAIN) + 2, "used": len(PLAIN)} | dropped
    assert len(trainer.train_dataset) == len(PLAIN) and trainer.row_counts["train"] == counts


WRONG = {
    "no model": (CHAT, {"model_name_or_path": None}, "no model; pass --model_name_or_path"),
    "no such model": (CHAT, {"model_name_or_path": "./nowhere"}, "no such folder"),
    "no dataset": (None, {}, "no dataset; pass --dataset_name"),
    "missing column": ([{"prompt": "a", "chosen": "b"}] * 2, {}, "in the columns prompt, chosen, and this stage"),
    "empty": ([], {}, "no rows"),
    "smaller than a batch": (CHAT, {"per_device_train_batch_size": 5}, "has 4 rows, but one batch takes 5"),
    "numbers": ([PLAIN[0] | {"chosen": 3}] * 2, {}, "the column chosen holds 3, which is no text"),
    "no prompts": ([{"chosen": "a", "rejected": "b"}] * 2, {}, "--columns prompt=NAME"),
    "empty prompts": ([PLAIN[0] | {"prompt": ""}] * 2, {}, "the pairs have no prompts"),
    "long prompt": ([PLAIN[0] | {"prompt": "x" * 128}] * 2, {}, "all 2 rows are longer than 128 tokens"),
    "beyond the context": (CHAT, {"max_length": 129}, "max_length 129 exceeds the 128 tokens"),
    "quantized without LoRA": (CHAT, {"load_in_4bit": True}, "add --use_peft true"),
    "unknown loss": (CHAT, {"beta": "much"}, "invalid float value: 'much'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_refused_before_weights_are_read(
    ask: Any, case: str, weightless: Path, tmp_path: Path
) -> None:
    rows, changes, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        run_dpo(*ask(rows, **{"model_name_or_path": weightless} | changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_held_out_pairs_are_checked(ask: Any, weightless: Path) -> None:
    with pytest.raises(UserError, match="in the columns question, and this stage reads preferences"):
        run_dpo(*ask(CHAT, [{"question": "a"}], model_name_or_path=weightless))


def test_a_reward_model_as_policy_is_refused(
    ask: Any, make_reward_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    make_reward_model(0).save_pretrained(tmp_path / "reward_model")
    make_tokenizer().save_pretrained(tmp_path / "reward_model")
    with pytest.raises(UserError, match="is a reward model, which cannot generate"):
        run_dpo(*ask(CHAT, model_name_or_path=tmp_path / "reward_model"))


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_pad_or_eos_is_refused(ask: Any, token: str, weightless: Path) -> None:
    path = weightless / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != token}))
    with pytest.raises(UserError, match=f"no {token.split('_')[0]} token".replace("eos", "EOS")):
        run_dpo(*ask(CHAT, model_name_or_path=weightless))


def test_the_pad_token_can_be_chosen(ask: Any, model_folder: Path, tmp_path: Path) -> None:
    """Padding with EOS changes nothing: a pair's own EOS is still compared."""
    start = tmp_path / "start"
    shutil.copytree(model_folder, start)
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    changes = {"learning_rate": 1e-3, "max_steps": 2}
    named, _ = trained(ask(CHAT, model_name_or_path=start, pad_token=EOS, **changes))
    own, _ = trained(ask(CHAT, **changes))
    assert named.processing_class.pad_token == EOS and named.data_collator.pad_token_id == 256
    one, other = named.model.state_dict(), own.model.state_dict()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_an_output_folder_with_other_files_is_not_overwritten(ask: Any, weightless: Path, tmp_path: Path) -> None:
    write(tmp_path / "out", mine=[{"a": 1}])
    for changes, message in (({}, "is not empty"), ({"overwrite": True}, "no stage wrote")):
        with pytest.raises(UserError, match=message):
            run_dpo(*ask(CHAT, model_name_or_path=weightless, **changes))
    assert (tmp_path / "out" / "mine.jsonl").is_file()


def test_the_recipe_prints_one_line_and_exits_2(tmp_path: Path, weightless: Path) -> None:
    data = write(tmp_path / "data", train=[{"question": "a"}])
    words = ["--model_name_or_path", weightless, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    result = forks.run_recipe("dpo", words)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "in the columns question" in line and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()

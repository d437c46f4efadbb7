"""The sft stage: which tokens have loss, what the loss is, what is trained and saved, and what it refuses."""

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
from rlhf_recipes.data.encoding import encode_completion
from rlhf_recipes.generation.sampling import generate
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.stages.sft import ModelConfig, SFTArguments, SFTConfig, build_sft_trainer, loss_spans, run_sft

EOS = "<|endoftext|>"
Rows = Sequence[dict[str, Any]]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# Each form of rows with the words that must carry loss, row by row.
TEXT = [{"text": "One two."}, {"text": "Three, four and five."}]
PLAIN = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "The capital of France is", "completion": " Paris."}]
CHAT = [
    {"prompt": [says("user", "Hi")], "completion": [says("assistant", "Hello, you!")]},
    {"prompt": [says("system", "Be short."), says("user", "Who?")], "completion": [says("assistant", "I.")]},
]
MESSAGES = [
    {"messages": [says("user", "a"), says("assistant", "bcd"), says("user", "e"), says("assistant", "fg")]},
    {"messages": [says("system", "s"), says("user", "h"), says("assistant", "i")]},
]
FORMS = {
    "text": (TEXT, ["One two." + EOS, "Three, four and five." + EOS]),
    "plain": (PLAIN, ["2" + EOS, " Paris." + EOS]),
    "chat": (CHAT, ["Hello, you!" + EOS, "I." + EOS]),
    "messages": (MESSAGES, ["bcd" + EOS + "fg" + EOS, "i" + EOS]),
}


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
    folder = tmp_path_factory.mktemp("model")
    make_model(0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ask(model_folder: Path, tmp_path: Path) -> Callable[..., tuple[SFTArguments, ModelConfig, SFTConfig]]:
    """(rows, **changes) -> the three arguments of the stage; the output goes to `tmp_path / "out"`."""

    def make(rows: Rows | None = None, test: Rows | None = None, **changes: Any) -> Any:
        given = {"model_name_or_path": str(model_folder), "output_dir": str(tmp_path / "out"), "disable_tqdm": True}
        given |= {"report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2}
        if rows is not None:
            splits = {"train": rows} | ({"test": test} if test is not None else {})
            given["dataset_name"] = str(write(tmp_path / "data", **splits))
        given |= changes
        words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
        return parse_arguments(SFTArguments, ModelConfig, SFTConfig, argv=words)

    return make


def words_with_loss(trainer: Any, tokenizer: Any) -> list[str]:
    """Return the text of all tokens with loss, for each row of the trainer's training batches."""
    words = []
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            kept = labels != -100
            assert torch.equal(ids[kept], labels[kept])
            words.append(tokenizer.decode(ids[kept]))
    return words


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_only_answers_and_their_eos_have_loss(ask: Any, form: str, pad_is_eos: bool) -> None:
    """Padding with EOS changes nothing: the EOS that ends an answer has loss, the padding does not."""
    rows, expected = FORMS[form]
    trainer = build_sft_trainer(*ask(rows))
    if pad_is_eos:
        trainer.processing_class.pad_token = EOS
        trainer.data_collator.pad_token_id = trainer.processing_class.eos_token_id
    assert sorted(words_with_loss(trainer, trainer.processing_class)) == sorted(expected)


def test_loss_on_all_turns_of_messages_is_an_option(ask: Any) -> None:
    trainer = build_sft_trainer(*ask(MESSAGES[1:] * 2, assistant_only_loss=False))
    words = words_with_loss(trainer, trainer.processing_class)
    assert words[0] == "<|system|>s<|end|><|user|>h<|end|><|assistant|>i" + EOS


@pytest.fixture(scope="module")
def bare_folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any], make_tokenizer: Callable[[], Any]
) -> Path:
    """A model like the released GPT-2: one special token, used as EOS and pad, and no chat template."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bare")
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == EOS]
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    bare = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, pad_token=EOS)
    bare.save_pretrained(folder)
    make_model(0, pad_token_id=None).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["chat", "messages"])
def test_a_tokenizer_without_roles_and_template_trains_on_chats(ask: Any, bare_folder: Path, form: str) -> None:
    rows, expected = FORMS[form]
    trainer = build_sft_trainer(*ask(rows, model_name_or_path=bare_folder))
    assert sorted(words_with_loss(trainer, trainer.processing_class)) == sorted(expected)
    whole = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert whole.startswith("User: ") and "\nAssistant:" in whole


def by_hand(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """(sum of -log p in float64, tokens) of the second ids of each pair after the first, one row at a time."""
    nats, tokens = 0.0, 0
    for before, after in rows:
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0].double()
        for place, token in enumerate(after, start=len(before)):
            nats -= torch.log_softmax(logits[place - 1], dim=-1)[token].item()
            tokens += 1
    return nats, tokens


CHAT_BY_HAND = [
    ("<|user|>Hi<|end|><|assistant|>", "Hello, you!" + EOS),
    ("<|system|>Be short.<|end|><|user|>Who?<|end|><|assistant|>", "I." + EOS),
]


def test_the_loss_is_the_cross_entropy_of_the_answers(ask: Any, tmp_path: Path) -> None:
    """With learning rate 0 the model stays as it was, so that every metric can be recomputed from it."""
    folder = run_sft(*ask(CHAT, CHAT, learning_rate=0.0, max_steps=1))
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    rows = [tuple(tokenizer(part)["input_ids"] for part in pair) for pair in CHAT_BY_HAND]
    nats, tokens = by_hand(model.eval(), rows)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["eval_loss"] == metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    size = len(b"Hello, you!I.")
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["held_out_tokens"] == tokens


def test_completions_are_split_by_their_token_mask() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, 6, 7, -100, 9, 10]}
    assert loss_spans([row]) == [([5], [6, 7]), ([5, 6, 7, 8], [9, 10])]
    assert loss_spans([{"input_ids": [5, 6], "labels": [5, 6]}]) == [([], [5, 6])]
    assert loss_spans([{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}], prefix=[4]) == [([4], [5, 6])]
    assert loss_spans([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}], prefix=[4]) == [([4], [5, 6])]


def test_packed_rows_have_the_loss_of_separate_rows(ask: Any) -> None:
    """Rows packed into one sequence have the same loss as separate rows."""
    trainer = build_sft_trainer(*ask(CHAT * 3, CHAT, packing=True, per_device_train_batch_size=1, max_length=96))
    assert len(trainer.train_dataset) < len(CHAT) * 3
    tokenizer = trainer.processing_class
    words = "".join(words_with_loss(trainer, tokenizer))
    assert sorted(words.split(EOS)) == sorted(["", *["Hello, you!", "I."] * 3])
    rows = [tuple(tokenizer(part)["input_ids"] for part in pair) for pair in CHAT_BY_HAND * 3]
    nats, tokens = by_hand(trainer.model.eval(), rows)
    measured = 0.0
    for batch in trainer.get_train_dataloader():
        count = (batch["labels"] != -100).sum().item()
        with torch.no_grad():
            measured += trainer.compute_loss(trainer.model, batch).item() * count
    assert measured / tokens == pytest.approx(nats / tokens, rel=1e-4)


def test_rows_that_are_too_long_are_dropped_cut_or_refused(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = {"prompt": "Count:", "completion": " one" * 20}
    rows = [*PLAIN, long, {"prompt": "x" * 40, "completion": "y"}]
    trainer = build_sft_trainer(*ask(rows, rows, max_length=36))
    assert sorted(words_with_loss(trainer, trainer.processing_class)) == sorted(FORMS["plain"][1])
    assert trainer.row_counts["train"] == {"read": 4, "too_long_dropped": 2, "used": 2} == trainer.row_counts["test"]
    assert "the training split: 2 of 4 rows are longer than 36 tokens and are dropped" in caplog.text
    caplog.clear()
    trainer = build_sft_trainer(*ask(rows, max_length=36, too_long="cut", per_device_train_batch_size=3))
    expected = [*FORMS["plain"][1], (" one" * 20)[:30]]  # 6 of the 36 are the prompt; nothing is left of the last row
    assert sorted(words_with_loss(trainer, trainer.processing_class)) == sorted(expected)
    assert trainer.row_counts["train"] == {"read": 4, "too_long_cut": 1, "too_long_dropped": 1, "used": 3}
    assert "1 of 4 rows are longer than 36 tokens and are cut, so they lose their end" in caplog.text
    with pytest.raises(UserError, match=r"row 2: the row has 87 tokens, more than the 36 that fit \(2 of 4"):
        build_sft_trainer(*ask(rows, max_length=36, too_long="error"))
    with pytest.raises(UserError, match="all 2 rows are longer than 128 tokens"):  # the default is the model's context
        build_sft_trainer(*ask([{"prompt": "Count:", "completion": " one" * 50}] * 2))


def test_counts_of_rows_are_in_the_metrics(ask: Any) -> None:
    rows = [*CHAT, {"prompt": [says("user", "Hi")], "completion": [says("assistant", "")]}]
    folder = run_sft(*ask(rows, CHAT, max_steps=1))
    counted = json.loads((folder / "metrics.json").read_text())["rows"]
    assert counted == {"train": {"read": 3, "empty_answers": 1, "used": 2}, "test": {"read": 2, "used": 2}}


def test_held_out_conversations_cut_before_the_assistant_are_refused(ask: Any, tmp_path: Path) -> None:
    """Before training, not after it."""
    long = [{"messages": [says("user", "x" * 100), says("assistant", "y")]}] * 2
    for too_long, reason in (("drop", "are longer than"), ("cut", "have nothing to train on within")):
        with pytest.raises(UserError, match=f"the held-out split: all 2 rows {reason} 64 tokens"):
            run_sft(*ask(MESSAGES, long, max_length=64, too_long=too_long))
    assert not (tmp_path / "out").exists()


def planted_rows() -> list[dict[str, Any]]:
    """Planted rule: each question hides one letter among dots, and the answer is that letter in upper case."""
    hidden = [f"{'.' * i}{letter}{'.' * j}" for letter in "abcdefgh" for i in range(6) for j in range(6)]
    random.Random(0).shuffle(hidden)
    return [
        {"prompt": [says("user", word)], "completion": [says("assistant", word.strip(".").upper())]} for word in hidden
    ]


def test_a_short_run_learns_to_answer_and_to_stop(ask: Any, make_model: Any, tmp_path: Path, real_plots: None) -> None:
    """Held-out questions are answered with transformers only, so the saved configuration must end the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = tmp_path / "start"
    shutil.copytree(Path(ask()[1].model_name_or_path), start)
    model = make_model(0, eos_token_id=None, initializer_range=0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(start)
    rows = planted_rows()
    train, test = rows[:-40], rows[-40:]
    changes = {"learning_rate": 1e-2, "num_train_epochs": 8, "warmup_steps": 10, "per_device_train_batch_size": 16}
    folder = run_sft(*ask(train, test, model_name_or_path=start, **changes))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in test:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        right += answer == [ord(row["completion"][0]["content"]), tokenizer.eos_token_id]
    assert right >= 36  # chance is one in eight
    answers = generate(load_causal_lm(str(folder)), tokenizer, [row["prompt"] for row in test], temperature=0)
    assert sum(a == row["completion"][0]["content"] for a, row in zip(answers, test, strict=True)) == right
    assert json.loads((folder / "metrics.json").read_text())["perplexity"] < 1.5
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and (
        folder / "curves.png"
    ).stat().st_size > 1000
    assert not (folder / "training_args.bin").exists()


def test_lora_changes_only_the_adapter(ask: Any, model_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    arguments = ask(CHAT * 4, CHAT, use_peft=True, learning_rate=1e-2, max_steps=4)
    trainer = build_sft_trainer(*arguments)
    trainer.train()
    start = load_causal_lm(str(model_folder)).state_dict()
    kept = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in trainer.model.state_dict().items()
        if "lora_" not in name
    }
    assert kept.keys() == start.keys()
    assert all(torch.equal(kept[name], start[name]) for name in start)
    moved = [value.abs().max() for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(value > 0 for value in moved)  # B starts at zero

    folder = run_sft(*arguments)
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    merged, ids = load_causal_lm(str(folder)), torch.tensor([[72, 105, 259, 65]])
    assert type(merged).__name__ == "GPT2LMHeadModel" and merged.generation_config.eos_token_id == 256
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(load_causal_lm(str(model_folder))(ids).logits, expected, atol=1e-3)


def test_a_lora_folder_can_be_fine_tuned_further(ask: Any, tmp_path: Path) -> None:
    """Without LoRA the merged weights are trained, and a full model is saved."""
    adapter = run_sft(*ask(CHAT * 2, use_peft=True, learning_rate=1e-2, max_steps=3))
    again = {"model_name_or_path": adapter, "output_dir": tmp_path / "again"}
    whole = run_sft(*ask(CHAT * 2, learning_rate=0.0, max_steps=1, **again))
    ids = torch.tensor([[72, 105, 259, 65]])
    with torch.no_grad():
        one, other = (load_causal_lm(str(folder))(ids).logits for folder in (adapter, whole))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="is itself a LoRA adapter"):
        run_sft(*ask(CHAT * 2, use_peft=True, **again | {"output_dir": tmp_path / "third"}))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights_train_save_and_load(
    ask: Any, bits: str, make_model: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """Evaluation during training used to break 4-bit layers on a CPU."""
    start = tmp_path / "start"
    make_model(0, n_embd=64).save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    changes = {bits: True, "use_peft": True, "eval_strategy": "steps", "eval_steps": 4, "lora_dropout": 0.0}
    changes |= {"model_name_or_path": start, "learning_rate": 1e-2, "max_steps": 12, "logging_steps": 1}
    arguments = ask(CHAT * 4, CHAT, **changes)
    trainer = build_sft_trainer(*arguments)
    trainer.train()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    folder = run_sft(*arguments)
    ids = torch.tensor([[72, 105, 259, 65]])
    with torch.no_grad():
        base, tuned = load_causal_lm(str(start))(ids).logits, load_causal_lm(str(folder))(ids).logits
        quantized = trainer.model.eval()(ids).logits
    # The adapter on the float32 base is what was trained on the quantized one, but for the rounding of the base.
    assert (tuned - quantized).abs().max() < 0.2 * (tuned - base).abs().max()


WRONG = {
    "no model": (CHAT, {"model_name_or_path": None}, "no model; pass --model_name_or_path"),
    "no such model": (CHAT, {"model_name_or_path": "./nowhere"}, "no such folder"),
    "a Hub id while offline": (CHAT, {"model_name_or_path": "some/model"}, "while HF_HUB_OFFLINE=1"),
    "no dataset": (None, {}, "no dataset; pass --dataset_name"),
    "no such file": (None, {"dataset_name": "./nowhere.jsonl"}, "no such file or folder"),
    "missing column": ([{"question": "a"}] * 2, {}, "in the columns question, and this stage reads prompts and answers"),
    "empty": ([], {}, "no rows"),
    "smaller than a batch": (CHAT, {"per_device_train_batch_size": 4}, "has 2 rows, but one batch takes 4"),
    "smaller than accumulated batches": (CHAT, {"gradient_accumulation_steps": 2}, "one batch takes 4"),
    "numbers": ([{"prompt": "a", "completion": 3}] * 2, {}, "the column completion holds 3, which is no text"),
    "no prompts": ([{"prompt": "", "completion": "b"}] * 2, {}, "2 have no prompt and are dropped"),
    "unknown role": ([{"messages": [says("robot", "a")]}] * 2, {"template": True}, "--roles user=robot"),
    "nobody answers": ([{"messages": [says("user", "a")]}] * 2, {}, "2 have an empty answer"),
    "no content": ([{"messages": [{"role": "user"}, {"role": "assistant"}]}] * 2, {}, "no list of messages"),
    "long prompt": ([{"prompt": "x" * 128, "completion": "y"}] * 2, {}, "all 2 rows are longer than 128 tokens"),
    "beyond the context": (CHAT, {"max_length": 129}, "max_length 129 exceeds the 128 tokens"),
    "nothing held out": (CHAT, {"eval_strategy": "epoch"}, "eval_strategy is epoch, but the dataset has no split 'test'"),
    "nobody's turns": (PLAIN, {"assistant_only_loss": True}, "assistant_only_loss needs rows of messages"),
    "quantized without LoRA": (CHAT, {"load_in_4bit": True}, "add --use_peft true"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_invalid_input_is_refused_before_weights_are_read(
    ask: Any, case: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's folder has no weights, so that reading them would raise another error."""
    from rlhf_recipes.data.chat import chat_template

    rows, changes, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    weightless = tmp_path / "weightless"
    shutil.copytree(model_folder, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    if changes.get("template"):
        (weightless / "chat_template.jinja").write_text(chat_template())
    given = {"model_name_or_path": weightless} | {key: value for key, value in changes.items() if key != "template"}
    with pytest.raises(UserError, match=message):
        run_sft(*ask(rows, **given))
    assert not (tmp_path / "out").exists()


def with_template(folder: Path, template: str, place: Path, **tokens: str) -> Path:
    """Copy a model's folder without its weights, with another chat template and other special tokens."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    (place / "chat_template.jinja").write_text(template)
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    return place


NAMES_LATER = (  # what is written of a turn depends on the turns after it
    "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


def test_a_template_that_does_not_show_the_assistants_turns_is_refused(
    ask: Any, model_folder: Path, tmp_path: Path
) -> None:
    start = with_template(model_folder, NAMES_LATER, tmp_path / "start")
    with pytest.raises(UserError, match=f"of {start} does not mark what the assistant says"):
        run_sft(*ask(MESSAGES, model_name_or_path=start))


CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def test_an_answer_that_ends_where_nothing_stops_is_refused(ask: Any, model_folder: Path, tmp_path: Path) -> None:
    """The end of a turn is <|end|>, the tokenizer's EOS is another token."""
    start = with_template(model_folder, CHATML, tmp_path / "start")
    with pytest.raises(UserError, match=r'ends an answer with <\|end\|>.* pass --eos_token "<\|end\|>"'):
        run_sft(*ask(MESSAGES, model_name_or_path=start))
    endless = with_template(
        model_folder, "{% for m in messages %}{{ m['content'] }}{% endfor %}", tmp_path / "endless"
    )
    with pytest.raises(UserError, match="writes no special token after an assistant turn"):
        run_sft(*ask(MESSAGES, model_name_or_path=endless))


@pytest.mark.parametrize("form", ["chat", "messages"])
def test_a_template_without_generation_marks_has_loss_on_answers_and_their_end(
    ask: Any, form: str, model_folder: Path, tmp_path: Path
) -> None:
    """Its turns are found by rendering, and the line break behind the end of a turn has no loss."""
    rows, expected = FORMS[form]
    start = with_template(model_folder, CHATML, tmp_path / "start")
    shutil.copy(model_folder / "model.safetensors", start)
    trainer = build_sft_trainer(*ask(rows, model_name_or_path=start, eos_token="<|end|>"))
    words = words_with_loss(trainer, trainer.processing_class)
    assert sorted(words) == sorted(text.replace(EOS, "<|end|>") for text in expected)
    assert all(row["input_ids"][-1] == 261 for row in trainer.train_dataset)


def test_turns_that_are_not_to_be_trained_have_no_loss(ask: Any) -> None:
    marked = [says("user", "a"), says("assistant", "bcd") | {"train": False}, says("user", "e")]
    rows = [{"messages": [*marked, says("assistant", "fg")]}] * 2
    trainer = build_sft_trainer(*ask(rows))
    assert words_with_loss(trainer, trainer.processing_class) == ["fg" + EOS] * 2


def test_a_resumed_run_matches_the_uninterrupted_run(ask: Any, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = run_sft(*ask(CHAT * 4, **changes))
    checkpoint = whole / "checkpoint-2"
    resumed = tmp_path / "resumed"
    shutil.copytree(checkpoint, resumed / "checkpoint-2")
    run_sft(*ask(CHAT * 4, output_dir=resumed, resume_from_checkpoint=resumed / "checkpoint-2", **changes))
    one, other = (load_causal_lm(str(folder)).state_dict() for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_output_folder_with_other_files_is_not_overwritten(ask: Any, tmp_path: Path) -> None:
    write(tmp_path / "out", mine=[{"a": 1}])
    with pytest.raises(UserError, match="is not empty"):
        run_sft(*ask(CHAT))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        run_sft(*ask(CHAT, output_dir=tmp_path / "file"))
    assert (tmp_path / "out" / "mine.jsonl").is_file() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_pad_or_eos_is_refused(ask: Any, token: str, model_folder: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(model_folder, start, ignore=shutil.ignore_patterns("*.safetensors"))
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != token}))
    with pytest.raises(UserError, match=f"no {token.split('_')[0]} token".replace("eos", "EOS")):
        run_sft(*ask(CHAT, model_name_or_path=start))


def test_the_pad_token_can_be_chosen(ask: Any, bare_folder: Path, tmp_path: Path) -> None:
    """As for the released GPT-2, whose tokenizer has none; the saved folder loads without the flag."""
    start = tmp_path / "start"
    shutil.copytree(bare_folder, start)
    path = start / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    arguments = ask(CHAT, model_name_or_path=start, pad_token=EOS, max_steps=1)
    folder = run_sft(*arguments)
    assert load_tokenizer(str(folder)).pad_token == EOS
    assert "pad_token: <|endoftext|>" in (folder / "recipe.yaml").read_text()


def test_the_recipe_prints_one_line_and_exits_2(tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / "data", train=[{"question": "a"}])
    words = ["--model_name_or_path", model_folder, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    result = forks.run_recipe("sft", words)
    assert result.returncode == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "in the columns question" in line and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_text_with_a_bos_is_measured_as_trained(
    ask: Any, make_tokenizer_with_bos: Any, model_folder: Path, tmp_path: Path
) -> None:
    """The BOS is added without a flag, and sampling starts as TRL's training rows do."""
    shutil.copytree(model_folder, tmp_path / "begins")
    make_tokenizer_with_bos().save_pretrained(tmp_path / "begins")
    begins = {"model_name_or_path": str(tmp_path / "begins")}
    trainer = build_sft_trainer(*ask(PLAIN, PLAIN, **begins))
    for row, trained in zip(PLAIN, trainer.train_dataset, strict=True):
        prompt, answer = encode_completion(row["prompt"], row["completion"], trainer.processing_class)
        assert trained["input_ids"] == [*prompt, *answer] and prompt[0] == 260
    folder = run_sft(*ask(TEXT, TEXT, **begins, max_steps=1, per_device_eval_batch_size=1))
    metrics = json.loads((folder / "metrics.json").read_text())
    counts = [len(row["text"]) + 1 for row in TEXT]  # letters and EOS
    assert metrics["held_out_tokens"] == sum(counts)
    trainer = build_sft_trainer(*ask(TEXT, TEXT, model_name_or_path=str(folder), output_dir=str(tmp_path / "other")))
    nats = 0.0
    for row in trainer.eval_dataset:
        logits = trainer.model.eval()(torch.tensor([row["input_ids"]])).logits[0].detach().double()
        nats -= float(torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(row["input_ids"][1:])[:, None]).sum())
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / sum(counts)), rel=1e-4)

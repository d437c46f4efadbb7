"""The pretrain stage: packing, one optimizer step, metrics, resuming, continued pretraining, and what it refuses."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import forks

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.markdown import escape_markdown
from rlhf_recipes.data.rows import write_rows
from rlhf_recipes.data.sources import load_split
from rlhf_recipes.evaluation.language_model import perplexity
from rlhf_recipes.generation.sampling import generate
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.stages.pretrain import (
    ModelConfig,
    PretrainArguments,
    PretrainConfig,
    build_pretrain_trainer,
    run_pretrain,
)
from rlhf_recipes.training.pretrain import SampleContinuations, _continued, collate_blocks

ROOT = Path(__file__).resolve().parents[2]
END, VOCABULARY, BLOCK = 256, 262, 32
VERSE = ["the cat sat on the mat", "the dog sat on the log", "and so it went on"]
LINES = random.Random(0).choices(VERSE, k=120)
PLAIN_STEP = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[], Any]) -> Path:
    """A folder with the byte tokenizer, repetitive text to learn, and held-out lines of the same kind."""
    folder = tmp_path_factory.mktemp("pretrain")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    write_rows(folder / "text" / "train.jsonl", [{"text": line} for line in LINES])
    write_rows(folder / "text" / "test.jsonl", [{"text": line} for line in (*VERSE, "the cat sat on the log 🐈")])
    return folder


Parts = tuple[PretrainArguments, ModelConfig, PretrainConfig]


def ask(place: Path, output: Path, **options: Any) -> Parts:
    """Return the three arguments of a short run of the tiny model; each option goes to the dataclass that has it."""
    values: dict[str, Any] = {
        "dataset_name": str(place / "text"), "tokenizer_name": str(place / "tokenizer"), "model_size": "tiny",
        "max_length": BLOCK, "dropout": 0.0, "output_dir": str(output), "max_steps": 2,
        "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "learning_rate": 2e-3,
    }  # fmt: skip
    values |= options
    parts = []
    for kind in (PretrainArguments, ModelConfig, PretrainConfig):
        known = {key: values.pop(key) for key in list(values) if key in kind.__dataclass_fields__}
        parts.append(kind(**known))
    assert not values, f"unknown: {values}"
    return tuple(parts)  # type: ignore[return-value]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


def trained(place: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights after training by name, without running the rest of `run_pretrain`."""
    trainer = build_pretrain_trainer(*ask(place, output, **options))
    trainer.train()
    return dict(trainer.model.named_parameters())


def log_of(folder: Path) -> list[dict[str, Any]]:
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    history: list[dict[str, Any]] = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    return history


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A run of 30 steps that evaluates and samples during training."""
    options = {"eval_strategy": "steps", "eval_steps": 15, "save_strategy": "steps", "save_steps": 30}
    prompts = {"sample_prompts": ["the c", ""], "sample_tokens": 8}
    return run_pretrain(*ask(place, place / "run", max_steps=30, warmup_steps=3, **options, **prompts))


def test_the_loss_starts_at_log_vocabulary_and_falls(run: Path) -> None:
    losses = [entry["loss"] for entry in log_of(run) if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in log_of(run) if "eval_loss" in entry]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.4)
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert metrics["perplexity"] < VOCABULARY / 8 and metrics["steps"] == 30


def test_perplexity_matches_the_saved_model(run: Path, place: Path) -> None:
    """Recomputed from the files alone: each held-out line after an EOS, token by token, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    lines = [row["text"] for row in load_split(str(place / "text"), "test")]
    nats, count = 0.0, 0
    for line in lines:
        ids = torch.tensor([[END, *tokenizer(line)["input_ids"]]])
        logits = model.eval()(ids).logits[0].detach().double()
        nats -= sum(float(torch.log_softmax(logits[at], -1)[ids[0, at + 1]]) for at in range(ids.shape[1] - 1))
        count += ids.shape[1] - 1
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    size = sum(len(line.encode()) for line in lines)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert tokenizer.model_max_length == BLOCK == model.config.n_positions


def test_samples_start_after_eos_and_match_the_model(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    samples = (run / "samples.md").read_text(encoding="utf-8")
    assert [line for line in samples.splitlines() if line.startswith("#")] == [
        "# Continuations",
        "## Step 15",
        "## Step 30",
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    texts = generate(model, tokenizer, [[END, *b"the c"], [END]], max_new_tokens=8, seed=42)
    first, second = texts
    gap = " " if first[:1].isspace() else ""
    assert samples.endswith(f"- **the c**{gap}{escape_markdown(first)}\n- {escape_markdown(second)}\n")


def test_the_run_repeats_from_its_recipe(run: Path, tmp_path: Path, real_plots: None) -> None:
    argv = ["--config", str(run / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]
    again = run_pretrain(*parse_arguments(PretrainArguments, ModelConfig, PretrainConfig, argv=argv))
    assert all(torch.equal(weight, weights_of(run)[name]) for name, weight in weights_of(again).items())
    assert not (again / "training_args.bin").exists() and (again / "curves.png").stat().st_size > 1000


def test_blocks_are_the_concatenated_documents(place: Path, tmp_path: Path) -> None:
    trainer = build_pretrain_trainer(*ask(place, tmp_path / "out"))
    joined = [token for line in LINES for token in [*line.encode(), END]]
    whole = [joined[start : start + BLOCK] for start in range(0, len(joined) - BLOCK + 1, BLOCK)]
    assert [row["input_ids"] for row in trainer.train_dataset] == whole
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, BLOCK) and batch["input_ids"].dtype == torch.long
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert all(row in whole for row in batch["input_ids"].tolist())


def test_a_stream_trains_on_the_blocks_in_order(place: Path, tmp_path: Path) -> None:
    """Two steps of plain gradient descent on a stream, against the same two steps done by hand."""
    options = {**PLAIN_STEP, "dataset_streaming": True, "max_steps": 2}
    streamed = build_pretrain_trainer(*ask(place, tmp_path / "out", **options))
    by_hand = build_pretrain_trainer(*ask(place, tmp_path / "out", **PLAIN_STEP))
    blocks, model = list(by_hand.train_dataset), by_hand.model.train()
    assert list(streamed.train_dataset) == blocks
    for step in range(2):
        model.zero_grad()
        model(**collate_blocks(blocks[4 * step : 4 * step + 4])).loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.05 * weight.grad
    streamed.train()
    for mine, its in zip(model.parameters(), streamed.model.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_l1_adds_the_sign_of_weights_to_the_gradient_once_a_step(
    place: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    """After one step of size 0.05, weights differ from a run without the penalty by 0.05 * 0.1 * sign(w)."""
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    plain = trained(place, tmp_path / "plain", **PLAIN_STEP, **shape)
    pulled = trained(place, tmp_path / "pulled", l1_penalty=0.1, **PLAIN_STEP, **shape)
    first = build_pretrain_trainer(*ask(place, tmp_path / "first", **PLAIN_STEP)).model.state_dict()
    spared = 0
    for name, weight in plain.items():
        decayed = weight.dim() == 2
        spared += not decayed
        wanted = 0.05 * 0.1 * torch.sign(first[name]) if decayed else torch.zeros_like(weight)
        assert torch.allclose(weight - pulled[name], wanted, atol=2e-7), name
    assert 0 < spared < len(plain)


def test_l1_is_in_the_training_loss_but_not_in_the_held_out_loss(place: Path, tmp_path: Path) -> None:
    plain = build_pretrain_trainer(*ask(place, tmp_path / "out"))
    pulled = build_pretrain_trainer(*ask(place, tmp_path / "out", l1_penalty=0.25))
    size = sum(float(w.detach().double().abs().sum()) for w in plain.model.parameters() if w.dim() == 2)
    batch = collate_blocks(list(plain.train_dataset)[:4])
    losses = [float(one.compute_loss(one.model.train(), dict(batch)).detach()) for one in (plain, pulled)]
    assert losses[1] - losses[0] == pytest.approx(0.25 * size, rel=1e-4)
    assert plain.evaluate()["eval_loss"] == pulled.evaluate()["eval_loss"]


def test_loss_is_float32_when_layers_are_bfloat16(place: Path, tmp_path: Path) -> None:
    trainer = build_pretrain_trainer(*ask(place, tmp_path / "out", bf16=True, max_steps=1, l1_penalty=1e-4))
    seen: list[torch.dtype] = []
    trainer.model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    loss_of, losses = trainer.compute_loss, []
    trainer.compute_loss = lambda *args, **kwargs: losses.append(loss_of(*args, **kwargs)) or losses[-1]
    trainer.train()
    assert seen == [torch.bfloat16] and [loss.dtype for loss in losses] == [torch.float32]
    assert all(weight.dtype == torch.float32 for weight in trainer.model.parameters())


def test_a_bfloat16_run_is_evaluated_in_bfloat16(place: Path, tmp_path: Path) -> None:
    folder = run_pretrain(*ask(place, tmp_path / "out", bf16=True, max_steps=1))
    lines = [row["text"] for row in load_split(str(place / "text"), "test")]
    again = perplexity(load_causal_lm(str(folder)), load_tokenizer(str(folder)), lines)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["perplexity"] == pytest.approx(again["perplexity"], rel=1e-6)


@pytest.mark.parametrize(("optim", "kind"), [("sgd", "SGD"), ("adamw_8bit", "AdamW"), ("adamw_torch_fused", "AdamW")])
def test_optimizers_step_and_decay_matrices_only(place: Path, tmp_path: Path, optim: str, kind: str) -> None:
    trainer = build_pretrain_trainer(*ask(place, tmp_path / "out", optim=optim))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(optimizer).__name__ == kind and ("bitsandbytes" in type(optimizer).__module__) == (
        optim == "adamw_8bit"
    )
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].dim() == 2} == {0.1}
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"][0].dim() < 2} == {0.0}
    moved = [name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])]
    assert len(moved) == len(before)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))), ("linear", lambda done: 1 - done)],
)
def test_learning_rate_warms_up_and_decays(
    place: Path, tmp_path: Path, schedule: str, share: Callable[[float], float]
) -> None:
    trainer = build_pretrain_trainer(
        *ask(place, tmp_path / "out", max_steps=8, warmup_steps=2, lr_scheduler_type=schedule, learning_rate=0.01)
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    wanted = [0.01 * (step / 2 if step < 2 else share((step - 2) / 6)) for step in range(8)]
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize(("prompt", "text", "line"), [
    ("Once", " upon", "**Once** upon"), ("On", "ce", "**On**ce"), ("Once ", "upon", "**Once** upon"), ("", "a\nb", "a b"),
    ("<b>", "**x** ![y](z)", r"**\<b\>**\*\*x\*\* \!\[y\](z)"),
    ("", "# x", r"\# x"), ("", "- x", r"\- x"), ("", "1. x_y", r"1\. x\_y"), ("", ".x", r"\.x"),
    ("_a_", "_b_c", r"**\_a\_**\_b\_c"),
])  # fmt: skip
def test_samples_are_escaped(prompt: str, text: str, line: str) -> None:
    assert _continued(prompt, text) == line


def test_the_same_seed_gives_the_same_weights(place: Path, tmp_path: Path) -> None:
    runs = [trained(place, tmp_path / name, dropout=0.2, seed=int(name[0])) for name in ("1a", "1b", "2a")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["transformer.wte.weight"], runs[2]["transformer.wte.weight"])


def test_a_resumed_run_matches_the_uninterrupted_run(place: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "dropout": 0.2}
    samples = {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": ["the"], "sample_tokens": 4}
    whole = weights_of(run_pretrain(*ask(place, tmp_path / "out", **options, **samples)))
    text = (tmp_path / "out" / "samples.md").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "samples.md").write_text(text[: text.index("\n## Step 4")], encoding="utf-8")
    run_pretrain(*ask(place, tmp_path / "out", **options, **samples, resume_from_checkpoint="true"))
    assert all(torch.equal(weight, whole[name]) for name, weight in weights_of(tmp_path / "out").items())
    assert (tmp_path / "out" / "samples.md").read_text(encoding="utf-8") == text


def test_continued_pretraining_starts_from_the_checkpoint(run: Path, place: Path, tmp_path: Path) -> None:
    """It starts at the loss of the checkpoint, with its tokenizer and context and the requested dropout."""
    options = {"model_name_or_path": str(run), "model_size": None, "tokenizer_name": None, "max_length": None}
    trainer = build_pretrain_trainer(*ask(place, tmp_path / "out", **options, dropout=0.3))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(log_of(run)[-1]["eval_loss"], rel=1e-5)
    assert trainer.model.config.resid_pdrop == 0.3 and len(trainer.train_dataset[0]["input_ids"]) == BLOCK
    shorter = ask(place, tmp_path / "out", **{**options, "max_length": 16, "per_device_train_batch_size": 150})
    trainer = build_pretrain_trainer(*shorter)
    batch = collate_blocks(list(trainer.train_dataset)[:150])
    assert batch["input_ids"].shape == (150, 16) and trainer.model.config.n_positions == BLOCK
    with torch.no_grad():
        logits = trainer.model.eval()(batch["input_ids"]).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    trainer.args.max_steps, trainer.train_dataset = 1, trainer.train_dataset.select(range(150))
    assert trainer.train().training_loss == pytest.approx(float(wanted), rel=1e-5)


def test_text_files_and_extra_datasets_are_read(place: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(VERSE * 10) + "\n", encoding="utf-8")
    extra = {"dataset_name": str(tmp_path / "book.txt"), "extra_dataset_names": [str(place / "text")]}
    folder = run_pretrain(*ask(place, tmp_path / "out", **extra))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert "perplexity" not in metrics, "a file has no held-out split"
    trainer = build_pretrain_trainer(*ask(place, tmp_path / "other", **extra))
    assert len(trainer.train_dataset) == sum(len(line) + 1 for line in VERSE * 10 + LINES) // BLOCK


@pytest.fixture(scope="module")
def others(place: Path, make_model: Callable[..., Any], make_reward_model: Callable[..., Any]) -> Path:
    """Models without weights, so that reading them would fail in another way; and invalid datasets."""
    folder = place / "others"
    for name, model in (
        ("model", make_model()),
        ("reward_model", make_reward_model()),
        ("small", make_model(vocab_size=100)),
    ):
        model.save_pretrained(folder / name)
        (folder / name / "model.safetensors").unlink()
        shutil.copytree(place / "tokenizer", folder / name, dirs_exist_ok=True)
    file = folder / "swapped" / "tokenizer.json"
    shutil.copytree(place / "tokenizer", file.parent)
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    letters = vocabulary["model"]["vocab"]
    letters["a"], letters["b"] = letters["b"], letters["a"]
    file.write_text(json.dumps(vocabulary), encoding="utf-8")
    write_rows(folder / "few" / "train.jsonl", [{"text": "x" * 100}])
    write_rows(folder / "numbers" / "train.jsonl", [{"text": 1}] * 99)
    write_rows(folder / "empty" / "train.jsonl", [])
    return folder


FROM = {"model_size": None, "tokenizer_name": None, "max_length": None}
BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"dataset_name": "{others}/empty"}, "no rows"),
    ({"dataset_name": "{others}/few"}, r"packed into blocks of 32 tokens, has 3 rows, but one batch takes 4"),
    ({"dataset_name": "{others}/few", "dataset_streaming": True}, "has 3 rows, but one batch takes 4"),
    ({"gradient_accumulation_steps": 50}, "one batch takes 200"),
    ({"dataset_name": "{others}/numbers"}, "column text holds 1, which is no text"),
    ({"dataset_name": "{others}/nowhere"}, "no such file or folder"),
    ({"text_column": "words"}, "has no column 'words' but text"),
    ({"dataset_streaming": True, "max_steps": -1}, "--max_steps"),
    ({"eval_strategy": "steps", "eval_steps": 1, "max_test_samples": 1}, "at least 32 tokens"),
    ({"sample_prompts": ["a" * 30], "sample_tokens": 9}, "has 30 tokens, and with 9 sampled ones"),
    ({"model_size": None}, "--model_size"),
    ({"model_name_or_path": "{others}/model"}, "one of --model_size"),
    ({"tokenizer_name": None}, "--tokenizer_name"),
    ({"tokenizer_name": "somebody/some-tokenizer"}, "HF_HUB_OFFLINE"),
    ({"use_peft": True}, "sft stage"),
    ({"dtype": "bfloat16"}, "--bf16"),
    ({**FROM, "model_name_or_path": "{others}/reward_model"}, "is a reward model"),
    ({**FROM, "model_name_or_path": "{others}/small"}, "another vocabulary"),
    ({**FROM, "model_name_or_path": "{others}/model", "tokenizer_name": "{others}/swapped"}, "another vocabulary"),
    ({**FROM, "model_name_or_path": "{others}/model", "max_length": 129}, "beyond the 128 tokens"),
    ({"output_dir": "{place}/text"}, "holds the input"),
    ({"output_dir": "{place}/text/train.jsonl"}, "is a file"),
    ({"output_dir": "{others}/few", "overwrite": True}, "no stage wrote"),
    ({"resume_from_checkpoint": "true"}, "no checkpoint to resume from"),
    ({"resume_from_checkpoint": "{others}"}, "is no checkpoint folder"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_invalid_input_is_one_line_and_writes_nothing(
    place: Path, others: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    def filled(value: Any) -> Any:
        return value.format(others=others, place=place) if isinstance(value, str) else value

    values = {key: filled(value) for key, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        run_pretrain(*ask(place, **{"output": tmp_path / "out", **values}))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"model_size": "huge"}, {"dropout": 1.0}, {"l1_penalty": -1.0}, {"max_length": 1}, {"sample_tokens": 0}],
)
def test_invalid_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        PretrainArguments(**options)


def test_the_recipe_prints_one_line_and_exits_2(place: Path, tmp_path: Path) -> None:
    words = ["--config", "recipes/configs/quickstart/pretrain.yaml", "--output_dir", tmp_path / "out"]
    words += ["--dataset_name", str(tmp_path / "no.jsonl"), "--tokenizer_name", str(place / "tokenizer")]
    result = forks.run_recipe("pretrain", words)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: dataset ")
    assert "no such file or folder" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_like_one(place: Path, tmp_path: Path) -> None:
    """Two ranks of two blocks against one of four: equal weights, and the penalty counts once."""
    alone = trained(place, tmp_path / "alone", l1_penalty=0.01, **PLAIN_STEP)
    flags = {
        "dataset_name": place / "text", "tokenizer_name": place / "tokenizer", "output_dir": tmp_path / "both",
        "model_size": "tiny", "max_length": BLOCK, "dropout": 0.0, "max_steps": 2, "per_device_train_batch_size": 2,
        "save_strategy": "no", "l1_penalty": 0.01, **PLAIN_STEP,
    }  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/two_cpu_processes.yaml"]
    done = subprocess.run(
        [sys.executable, *launch, "recipes/pretrain.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "rror" in line]
    both = weights_of(tmp_path / "both")
    assert all(torch.allclose(weight, both[name], atol=1e-6) for name, weight in alone.items())
    assert "perplexity" in json.loads((tmp_path / "both" / "metrics.json").read_text(encoding="utf-8"))


def test_every_process_samples_and_rank_0_writes(run: Path, tmp_path: Path) -> None:
    """A forward pass over sharded weights is collective: if one rank skipped it, the others would wait."""
    from types import SimpleNamespace

    model, tokenizer = load_causal_lm(str(run)), load_tokenizer(str(run))
    read: list[int] = []
    model.register_forward_hook(lambda *_: read.append(1))
    counts = []
    for first in (True, False):
        read.clear()
        samples = SampleContinuations(["the"], tokenizer, 4, BLOCK)
        state = SimpleNamespace(is_world_process_zero=first, global_step=3)
        samples._write(tmp_path / str(first), state, model)
        counts.append(len(read))
        assert (tmp_path / str(first) / "samples.md").is_file() == first
    assert counts[0] == counts[1] > 0

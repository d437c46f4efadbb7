"""What every stage reports of held-out rows is the mean over rows, for any batch size and number of processes."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from programs import forks

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.data import encode_completion
from rlhf_recipes.models.loading import load_causal_lm, load_reward_model, load_tokenizer

ROWS = 9  # fills no batch of 2 or 4, and leaves a process without a row in its last round
REWARD = "def size(prompts, **columns): return [len(text) for text in prompts]\n"
Reference = dict[str, float]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, make_model: Any, make_reward_model: Any, make_tokenizer: Any
) -> Path:
    """Models, and datasets whose rows differ in length."""
    place = tmp_path_factory.mktemp("held_out")
    models = {"model": make_model(initializer_range=0.2), "ranking": make_reward_model(initializer_range=0.2)}
    models["classifier"] = make_reward_model(num_labels=2, initializer_range=0.2)
    for name, model in models.items():
        model.save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)
    words = [f"{'ab' * (index + 1)}" for index in range(ROWS)]
    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": word, "completion": f" {word[::-1]}!"} for word in words],
        "dpo": [{"prompt": word, "chosen": f" {word}", "rejected": " no" * (1 + len(word) % 3)} for word in words],
        "labels": [{"text": word, "label": index % 2} for index, word in enumerate(words)],
        "rloo": [{"prompt": word} for word in words],
    }
    for name, records in rows.items():
        (place / name).mkdir()
        for split in ("train", "test"):
            (place / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (place / "held_out_rewards.py").write_text(REWARD)
    return place


KINDS: dict[str, dict[str, Any]] = {
    "sft": {"dataset_name": "sft"},
    "dpo": {"dataset_name": "dpo", "loss_type": "sigmoid", "beta": 0.5},
    "reward": {"dataset_name": "dpo", "model_name_or_path": "ranking"},
    "reward, labels": {"dataset_name": "labels", "model_name_or_path": "classifier"},
    "rloo": {
        "dataset_name": "rloo", "reward": "held_out_rewards:size", "max_completion_length": 4, "num_generations_eval": 2,
        "per_device_train_batch_size": 4,
    },
}  # fmt: skip


def evaluated(folder: Path, kind: str, batch: int) -> dict[str, float]:
    """Build the stage's trainer and return what its evaluation measures, without times."""
    stage = kind.partition(",")[0]
    module = import_module(f"rlhf_recipes.stages.{stage}")
    build = getattr(module, f"build_{stage}_trainer")
    values = {"model_name_or_path": "model", "output_dir": "out", "report_to": "none", "disable_tqdm": "true"}
    values |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": batch, **KINDS[kind]}
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        values[name] = folder / values[name]
    types = [hint for name, hint in get_type_hints(build).items() if name != "return"]
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    sys.path.insert(0, str(folder))
    try:
        trainer = build(*parse_arguments(*types, argv=words))
    finally:
        sys.path.remove(str(folder))
    if kind == "dpo":  # a policy that differs from its reference
        torch.manual_seed(1)
        with torch.no_grad():
            trainer.model.lm_head.weight.add_(torch.randn_like(trainer.model.lm_head.weight) * 0.05)
    return {
        name: value for name, value in trainer.evaluate().items() if not name.endswith(("_time", "runtime", "second"))
    }


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(answer)), answer]


def reference(folder: Path, kind: str) -> Reference:
    """Compute the means over all rows at once, one row a pass, in float64."""
    rows = [json.loads(line) for line in (folder / KINDS[kind]["dataset_name"] / "test.jsonl").open()]
    tokenizer = load_tokenizer(str(folder / "model"))
    if kind == "rloo":
        scores = [float(len(row["prompt"])) for row in rows]
        answers = torch.tensor(scores).repeat_interleave(2).double()
        return {"eval_reward": answers.mean().item(), "eval_rewards/size/std": answers.std().item()}
    if kind == "reward, labels":
        model = load_reward_model(str(folder / "classifier"), labels=2).double().eval()
        with torch.no_grad():
            ids = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows]
            logits = torch.cat([model(torch.tensor([each])).logits for each in ids])
        labels = torch.tensor([row["label"] for row in rows])
        return {"eval_loss": torch.nn.functional.cross_entropy(logits, labels).item()}
    if kind == "sft":
        model = load_causal_lm(str(folder / "model")).double().eval()
        pairs = [encode_completion(row["prompt"], row["completion"], tokenizer) for row in rows]
        tokens = torch.cat([log_probs(model, *pair) for pair in pairs])
        return {"eval_loss": -tokens.mean().item()}
    sides = [
        [encode_completion(row["prompt"], row[side], tokenizer) for row in rows] for side in ("chosen", "rejected")
    ]
    if kind == "reward":
        model = load_reward_model(str(folder / "ranking"), labels=1).double().eval()
        with torch.no_grad():
            chosen, rejected = (
                torch.cat([model(torch.tensor([prompt + answer])).logits[:, 0] for prompt, answer in side])
                for side in sides
            )
        margins = chosen - rejected
        both = torch.cat([chosen, rejected])
        found = {"accuracy": (margins > 0).double().mean(), "margin": margins.mean(), "min_reward": both.min()}
        found |= {
            "max_reward": both.max(),
            "mean_reward": both.mean(),
            "loss": -torch.nn.functional.logsigmoid(margins).mean(),
        }
    else:
        policy, start = (load_causal_lm(str(folder / "model")).double().eval() for _ in range(2))
        torch.manual_seed(1)
        with torch.no_grad():
            policy.lm_head.weight.add_(torch.randn_like(policy.lm_head.weight.float()) * 0.05)
        parts = [[(log_probs(policy, *pair), log_probs(start, *pair)) for pair in side] for side in sides]
        chosen, rejected = (torch.stack([0.5 * (new - old).sum() for new, old in side]) for side in parts)
        margins = chosen - rejected
        found = {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).double().mean()}
        found |= {"loss": -torch.nn.functional.logsigmoid(margins).mean(), "rewards/chosen": chosen.mean()}
    return {f"eval_{name}": value.item() for name, value in found.items()}


def check(found: dict[str, float], expected: Reference) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5, rel=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_means_do_not_depend_on_the_batch_size(folder: Path, kind: str) -> None:
    expected = reference(folder, kind)
    found = [evaluated(folder, kind, batch) for batch in (2, 4, 8)]
    for each in found:
        check(each, expected)
    if kind != "rloo":  # whose answers are drawn again
        assert found[1] == pytest.approx(found[0], abs=2e-6) and found[2] == pytest.approx(found[0], abs=2e-6)


def test_held_out_means_do_not_depend_on_the_number_of_processes(folder: Path) -> None:
    """Two processes; in the last round the second has no row left."""

    def measure() -> None:
        for kind in KINDS:
            found = evaluated(folder, kind, 4)
            if os.environ["RANK"] == "0":
                (folder / f"{kind}.json").write_text(json.dumps(found))

    result = forks.launch(2, measure)
    assert result.returncode == 0, result.stderr[-3000:]
    for kind in KINDS:
        check(json.loads((folder / f"{kind}.json").read_text()), reference(folder, kind))

"""Tests of evaluation on held-out prompts, of the best checkpoint, and of the completions file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.logging.callbacks import CompletionsFile

Make = Callable[..., Any]
SHORT = [{"prompt": f"held {row}"} for row in range(3)]
LONG = [{"prompt": f"held out and rather long {row}"} for row in range(5)]
EVALUATED = {
    f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores", "kl_coef")
} | {"rewards/low_share", "completions/mean_length", "completions/eos_share"}


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]


def halves(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[token / 256 for token in ids] for ids in completion_ids]


def completions_of(trainer: Any) -> list[dict[str, Any]]:
    """Return the rows of the run's completions file."""
    text = (Path(trainer.args.output_dir) / "completions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def text_of(ids: list[int]) -> str:
    return bytes(token for token in ids if token < 256).decode(errors="replace")


# Held-out prompts.


def test_evaluation_runs_at_eval_steps_and_changes_no_training_result(
    make_trainer: Make, recorder: type, weights_of: Make
) -> None:
    """Evaluate two named sets, also in the middle of an update; weights and logs match a run without evaluation."""
    options: dict[str, Any] = {"rows": 24, "num_ppo_epochs": 2, "use_score_scaling": True, "trainer_class": recorder}
    plain = make_trainer(**options)
    plain.train()
    evaluated = make_trainer(
        eval_strategy="steps", eval_steps=3, eval_dataset={"short": SHORT, "long": LONG}, **options
    )
    evaluated.train()
    eval_steps: dict[str, list[int]] = {}
    for entry in evaluated.state.log_history:
        for name in entry:
            if name.startswith("eval_"):
                eval_steps.setdefault(name, []).append(entry["step"])
    assert set(eval_steps) == {f"eval_{name}_{metric}" for name in ("short", "long") for metric in EVALUATED}
    assert all(steps == [3, 6] for steps in eval_steps.values())
    prompts = [sorted(text_of(query) for query in queries) for _, queries, _ in evaluated.generated]
    sets = [sorted(row["prompt"] for row in rows) for rows in (SHORT, LONG)]
    assert prompts[2:4] == prompts[5:7] == sets and len(prompts) == 3 + 2 * 2
    expected, weights = weights_of(plain.model), weights_of(evaluated.model)
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    logs = [
        {name: value for name, value in entry.items() if not re.search(r"^time/|^eps$|_runtime$|_per_second$", name)}
        for trainer in (plain, evaluated)
        for entry in trainer.state.log_history
        if not any(name.startswith("eval_") for name in entry)
    ]
    assert logs[: len(logs) // 2] == logs[len(logs) // 2 :] and completions_of(evaluated) == completions_of(plain)


def test_evaluate_matches_float64(
    make_trainer: Make, recorder: type, float64_ppo: ModuleType, make_policy: Make
) -> None:
    """Means over held-out prompts under the current policy, for the trainer's set and a set passed to `evaluate`."""
    reported: list[dict[str, float]] = []

    class RecordMetrics(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            reported.append(metrics)

    trainer = make_trainer(
        make_policy(), trainer_class=recorder, eval_dataset=LONG, missing_eos_penalty=0.7, kl_coef=0.3,
        learning_rate=3e-3, response_length=3, num_ppo_epochs=2, seed=3, callbacks=[RecordMetrics()],
    )  # fmt: skip
    start = trainer.evaluate()
    assert start["eval_objective/kl"] == pytest.approx(0, abs=1e-6)
    initial_model = trainer.generated[0][0]
    trainer.train()
    for prefix, rows, arguments in (("eval", LONG, ()), ("test_a", SHORT, ({"a": SHORT}, None, "test"))):
        metrics = trainer.evaluate(*arguments)
        trained_model, queries, answers = trainer.generated[-1]
        assert [text_of(query) for query in queries] == [row["prompt"] for row in rows]
        kl, entropies = [], []
        for query, ids in zip(queries, answers.ids, strict=True):
            new, old = (
                float64_ppo.forward(model, query, ids, trainer.args.temperature).log_probs
                for model in (trained_model, initial_model)
            )
            kl.append((new - old).sum())
            entropies.append(-new.sum())
        scores = np.array(low_share(answers.ids)) - 0.7 * ~np.array(answers.stopped)
        expected = {
            "objective/kl": np.mean(kl),
            "objective/entropy": np.mean(entropies),
            "objective/non_score_reward": -0.3 * np.mean(kl),
            "objective/rlhf_reward": np.mean(scores - 0.3 * np.array(kl)),
            "objective/scores": scores.mean(),
            "objective/kl_coef": 0.3,
            "rewards/low_share": np.mean(low_share(answers.ids)),
            "completions/mean_length": np.mean([len(ids) for ids in answers.ids]),
            "completions/eos_share": np.mean(answers.stopped),
        }
        assert metrics == pytest.approx({f"{prefix}_{name}": value for name, value in expected.items()}, abs=1e-4)
        assert abs(expected["objective/kl"]) > 0.01 and set(expected) == EVALUATED
        assert metrics == reported[-1] and metrics.items() <= trainer.state.log_history[-1].items()
    assert {stopped for _, _, answers in trainer.generated[-2:] for stopped in answers.stopped} == {True, False}


def test_best_checkpoint_by_score_is_loaded_at_the_end(make_trainer: Make, weights_of: Make, tmp_path: Path) -> None:
    """The reward function scores the second of three evaluations highest."""
    eval_scores = iter([1.0, 5.0, 3.0])

    def reward(completion_ids: list[list[int]], held_out: list[bool], **columns: Any) -> list[float]:
        return [next(eval_scores)] * len(held_out) if held_out[0] else low_share(completion_ids)

    rows = [{"prompt": f"Q{row}", "held_out": False} for row in range(24)]
    trainer = make_trainer(
        None, reward, rows=rows, eval_dataset=[{"prompt": "Q", "held_out": True}], num_ppo_epochs=2, vf_coef=1.0,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_objective/scores",
    )  # fmt: skip
    trainer.train()
    best = tmp_path / "out" / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best) and trainer.state.best_metric == 5.0
    for module, file in (
        (trainer.model.policy, "model.safetensors"),
        (trainer.model.value_model, "value_model/value_head.safetensors"),
    ):
        saved, last = load_file(best / file), load_file(best.with_name("checkpoint-6") / file)
        weights = weights_of(module)
        assert len(saved) >= 2 and all(torch.equal(weights[name], tensor) for name, tensor in saved.items())
        assert any(not torch.equal(weights[name], tensor) for name, tensor in last.items())


def test_evaluation_without_eval_dataset_is_a_one_line_error(make_trainer: Make) -> None:
    trainer = make_trainer()
    for method in (trainer.evaluate, trainer.generate_completions):
        with pytest.raises(UserError, match=r"held-out prompts.*eval_dataset"):
            method()


# The completions file.


def test_completions_file_holds_every_training_episode(make_trainer: Make, recorder: type) -> None:
    """One line per episode, in the order of the rollouts, with every reward; answers of evaluation are left out."""
    trainer = make_trainer(
        None, [low_share, halves], trainer_class=recorder, eval_strategy="steps", eval_steps=1, eval_dataset=SHORT,
        num_ppo_epochs=1,
    )  # fmt: skip
    trainer.train()
    expected = []
    rollouts = [call for call in zip(trainer.generated, trainer.scored, strict=True) if len(call[0][1]) == 8]
    for update, ((_, queries, answers), scored) in enumerate(rollouts):
        for row, (query, ids, stopped) in enumerate(zip(queries, answers.ids, answers.stopped, strict=True)):
            expected.append(
                {"update": update, "prompt": text_of(query), "completion": text_of(ids), "tokens": len(ids)}
                | {"stopped": stopped, "low_share": scored["low_share"][row], "halves": [token / 256 for token in ids]}
            )
    assert len(expected) == 16 and len(trainer.generated) == 4
    assert completions_of(trainer) == expected
    trainer.train()
    assert len(completions_of(trainer)) == 16, "a new run overwrites the file"


def test_log_completions_false_writes_no_file(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(log_completions=False, max_steps=1).train()
    assert not list(tmp_path.rglob("completions.jsonl"))


def test_completions_file_of_a_resumed_run_keeps_finished_updates(make_trainer: Make, tmp_path: Path) -> None:
    """Answers may hold characters that end a line for str.splitlines, but not in JSON Lines."""
    texts = ["one\ntwo", "a\u2028b\u2029c", "d\x85e\x0bf\x1cg", '"quoted" \\ é 漢']
    file = CompletionsFile(tmp_path / "deep" / "completions.jsonl")
    for update in range(3):
        file.add(update, [{"prompt": "p", "completion": text} for text in texts])
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write('{"update": 1, "prompt": "cut o')
    for updates in (2, 1, 0):
        file.begin(updates)
        rows = [json.loads(line) for line in file.path.read_text(encoding="utf-8").split("\n") if line]
        assert rows == [
            {"update": update, "prompt": "p", "completion": text} for update in range(updates) for text in texts
        ]


def test_generate_completions_answers_every_eval_prompt(
    make_trainer: Make, recorder: type, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{"input_ids": list(f"many {row}".encode())} for row in range(9)]
    trainer = make_trainer(trainer_class=recorder, eval_dataset={"short": SHORT, "many": many})
    rows = trainer.generate_completions()
    expected = []
    for (_, queries, answers), scored in zip(trainer.generated, trainer.scored, strict=True):
        for query, ids, stopped, score in zip(queries, answers.ids, answers.stopped, scored["low_share"], strict=True):
            row = {"prompt": text_of(query), "completion": text_of(ids), "tokens": len(ids), "stopped": stopped}
            expected.append(row | {"low_share": score})
    assert rows == expected
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in SHORT] + [f"many {row}" for row in range(9)]
    printed = capsys.readouterr().out
    assert all(f"{row['prompt']} -> {row['completion']}" in printed for row in rows[:8])
    assert rows[8]["prompt"] not in printed
    assert trainer.generate_completions(sampling=True) == rows[: 3 + 8], (
        "sampling=True answers at most eight prompts of each set"
    )

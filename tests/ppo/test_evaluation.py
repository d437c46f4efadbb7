"""What must hold of looking on: held-out prompts, the best checkpoint, and the file of all answers."""

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


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    text = (Path(trainer.args.output_dir) / "completions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def words_of(ids: list[int]) -> str:
    return bytes(token for token in ids if token < 256).decode(errors="replace")


# 19: held-out prompts.


def test_evaluation_runs_at_eval_steps_and_changes_no_training_result(
    make_trainer: Make, recorder: type, weights_of: Make
) -> None:
    """Two named sets, each answered in the middle of an update too; every weight and number is that of a run without."""
    chosen: dict[str, Any] = {"rows": 24, "num_ppo_epochs": 2, "use_score_scaling": True, "kind": recorder}
    plain = make_trainer(**chosen)
    plain.train()
    watched = make_trainer(eval_strategy="steps", eval_steps=3, eval_dataset={"short": SHORT, "long": LONG}, **chosen)
    watched.train()
    seen: dict[str, list[int]] = {}
    for entry in watched.state.log_history:
        for name in entry:
            if name.startswith("eval_"):
                seen.setdefault(name, []).append(entry["step"])
    assert set(seen) == {f"eval_{name}_{metric}" for name in ("short", "long") for metric in EVALUATED}
    assert all(steps == [3, 6] for steps in seen.values())
    asked = [sorted(words_of(query) for query in queries) for _, queries, _ in watched.played]
    sets = [sorted(row["prompt"] for row in rows) for rows in (SHORT, LONG)]
    assert asked[2:4] == asked[5:7] == sets and len(asked) == 3 + 2 * 2
    before, after = weights_of(plain.model), weights_of(watched.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    logs = [
        {name: value for name, value in entry.items() if not re.search(r"^time/|^eps$|_runtime$|_per_second$", name)}
        for trainer in (plain, watched)
        for entry in trainer.state.log_history
        if not any(name.startswith("eval_") for name in entry)
    ]
    assert logs[: len(logs) // 2] == logs[len(logs) // 2 :] and lines_of(watched) == lines_of(plain)


def test_evaluate_matches_float64(
    make_trainer: Make, recorder: type, reference: ModuleType, make_policy: Make
) -> None:
    """Means over the held-out prompts, of the policy as it is now; one set or several, given here or there."""
    told: list[dict[str, float]] = []

    class Listener(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            told.append(metrics)

    trainer = make_trainer(
        make_policy(), kind=recorder, eval_dataset=LONG, missing_eos_penalty=0.7, kl_coef=0.3,
        learning_rate=3e-3, response_length=3, num_ppo_epochs=2, seed=3, callbacks=[Listener()],
    )  # fmt: skip
    start = trainer.evaluate()
    assert start["eval_objective/kl"] == pytest.approx(0, abs=1e-6)
    first = trainer.played[0][0]
    trainer.train()
    for prefix, rows, given in (("eval", LONG, ()), ("test_a", SHORT, ({"a": SHORT}, None, "test"))):
        found = trainer.evaluate(*given)
        now, queries, answers = trainer.played[-1]
        assert [words_of(query) for query in queries] == [row["prompt"] for row in rows]
        kl, drawn = [], []
        for query, ids in zip(queries, answers.ids, strict=True):
            new, old = (
                reference.read(model, query, ids, trainer.args.temperature).log_probs for model in (now, first)
            )
            kl.append((new - old).sum())
            drawn.append(-new.sum())
        scores = np.array(low_share(answers.ids)) - 0.7 * ~np.array(answers.stopped)
        expected = {
            "objective/kl": np.mean(kl),
            "objective/entropy": np.mean(drawn),
            "objective/non_score_reward": -0.3 * np.mean(kl),
            "objective/rlhf_reward": np.mean(scores - 0.3 * np.array(kl)),
            "objective/scores": scores.mean(),
            "objective/kl_coef": 0.3,
            "rewards/low_share": np.mean(low_share(answers.ids)),
            "completions/mean_length": np.mean([len(ids) for ids in answers.ids]),
            "completions/eos_share": np.mean(answers.stopped),
        }
        assert found == pytest.approx({f"{prefix}_{name}": value for name, value in expected.items()}, abs=1e-4)
        assert abs(expected["objective/kl"]) > 0.01 and set(expected) == EVALUATED
        assert found == told[-1] and found.items() <= trainer.state.log_history[-1].items()
    assert {stopped for _, _, each in trainer.played[-2:] for stopped in each.stopped} == {True, False}


def test_best_checkpoint_by_score_is_loaded_at_the_end(make_trainer: Make, weights_of: Make, tmp_path: Path) -> None:
    """The reward of held-out prompts is made to be highest at the second of three evaluations."""
    marks = iter([1.0, 5.0, 3.0])

    def marked(completion_ids: list[list[int]], held: list[bool], **columns: Any) -> list[float]:
        return [next(marks)] * len(held) if held[0] else low_share(completion_ids)

    rows = [{"prompt": f"Q{row}", "held": False} for row in range(24)]
    trainer = make_trainer(
        None, marked, rows=rows, eval_dataset=[{"prompt": "Q", "held": True}], num_ppo_epochs=2, vf_coef=1.0,
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
        kept, last, now = load_file(best / file), load_file(best.with_name("checkpoint-6") / file), weights_of(module)
        assert len(kept) >= 2 and all(torch.equal(now[name], tensor) for name, tensor in kept.items())
        assert any(not torch.equal(now[name], tensor) for name, tensor in last.items())


def test_evaluation_without_eval_dataset_is_a_one_line_error(make_trainer: Make) -> None:
    trainer = make_trainer()
    for ask in (trainer.evaluate, trainer.generate_completions):
        with pytest.raises(UserError, match=r"held-out prompts.*eval_dataset"):
            ask()


# 24: answers.


def test_completions_file_holds_every_training_episode(make_trainer: Make, recorder: type) -> None:
    """In the order of the rollouts, line by line, with every reward; what is answered to evaluate is not there."""
    trainer = make_trainer(
        None, [low_share, halves], kind=recorder, eval_strategy="steps", eval_steps=1, eval_dataset=SHORT,
        num_ppo_epochs=1,
    )  # fmt: skip
    trainer.train()
    expected, rollouts = [], [play for play in enumerate(trainer.played) if len(play[1][1]) == 8]
    for update, (number, (_, queries, answers)) in enumerate(rollouts):
        scored = trainer.scored[number]
        for row, (query, ids, stopped) in enumerate(zip(queries, answers.ids, answers.stopped, strict=True)):
            expected.append(
                {"update": update, "prompt": words_of(query), "completion": words_of(ids), "tokens": len(ids)}
                | {"stopped": stopped, "low_share": scored["low_share"][row], "halves": [token / 256 for token in ids]}
            )
    assert len(expected) == 16 and len(trainer.played) == 4
    assert lines_of(trainer) == expected
    trainer.train()
    assert len(lines_of(trainer)) == 16, "a new run begins a new file"


def test_log_completions_false_writes_no_file(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(log_completions=False, max_steps=1).train()
    assert not list(tmp_path.rglob("completions.jsonl"))


def test_completions_file_of_a_resumed_run_keeps_finished_updates(make_trainer: Make, tmp_path: Path) -> None:
    """Whatever stands in an answer: some characters end a line for Python, and none of JSON Lines."""
    texts = ["one\ntwo", "a\u2028b\u2029c", "d\x85e\x0bf\x1cg", '"quoted" \\ é 漢']
    answers = CompletionsFile(tmp_path / "deep" / "completions.jsonl")
    for update in range(3):
        answers.add(update, [{"prompt": "p", "completion": text} for text in texts])
    with answers.path.open("a", encoding="utf-8") as stream:
        stream.write('{"update": 1, "prompt": "cut o')
    for kept in (2, 1, 0):
        answers.begin(kept)
        rows = [json.loads(line) for line in answers.path.read_text(encoding="utf-8").split("\n") if line]
        assert rows == [
            {"update": update, "prompt": "p", "completion": text} for update in range(kept) for text in texts
        ]


def test_generate_completions_answers_every_eval_prompt(
    make_trainer: Make, recorder: type, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{"input_ids": list(f"many {row}".encode())} for row in range(9)]
    trainer = make_trainer(kind=recorder, eval_dataset={"short": SHORT, "many": many})
    rows = trainer.generate_completions()
    expected = []
    for (_, queries, answers), scored in zip(trainer.played, trainer.scored, strict=True):
        for query, ids, stopped, score in zip(queries, answers.ids, answers.stopped, scored["low_share"], strict=True):
            row = {"prompt": words_of(query), "completion": words_of(ids), "tokens": len(ids), "stopped": stopped}
            expected.append(row | {"low_share": score})
    assert rows == expected
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in SHORT] + [f"many {row}" for row in range(9)]
    printed = capsys.readouterr().out
    assert all(f"{row['prompt']} -> {row['completion']}" in printed for row in rows[:8])
    assert rows[8]["prompt"] not in printed
    assert trainer.generate_completions(sampling=True) == rows[: 3 + 8], "eight of each set are enough for a look"

"""Tests of logs: samples, times, and hints, which appear for a problem in the metrics and for nothing else."""

import inspect
import json
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from rlhf_recipes.ppo.logging.hints import HINTS, Hints

Make = Callable[..., Any]


def completions_of(trainer: Any) -> list[dict[str, Any]]:
    """Return the rows of the run's completions file."""
    text = (Path(trainer.args.output_dir) / "completions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


# Samples and times.


class Board(TrainerCallback):
    """A stand-in for TensorBoard's callback that records texts and logs."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.tb_writer = SimpleNamespace(add_text=lambda tag, text, step: self.texts.append((tag, text, step)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Tables(TrainerCallback):
    """A stand-in for the callback of Weights & Biases or Trackio that records tables."""

    def __init__(self, name: str) -> None:
        self.tables: list[Any] = []
        setattr(self, name, SimpleNamespace(Table=self.table, log=self.tables.append, run=object()))

    def table(self, names: Any = None, rows: Any = None, dataframe: Any = None) -> Any:
        return (names, rows) if dataframe is None else (list(dataframe), dataframe.values.tolist())


def test_reporter_stand_ins_match_the_callbacks_of_transformers() -> None:
    """The attributes of the stand-ins above exist in the real callbacks."""
    attributes = {TensorBoardCallback: "tb_writer", WandbCallback: "_wandb", TrackioCallback: "_trackio"}
    assert all(f"self.{name} = " in inspect.getsource(callback) for callback, name in attributes.items())


@pytest.mark.parametrize(
    ("times", "updates", "logging_steps", "shown"),
    [
        (0, 4, 1, []),
        (1, 4, 1, [1]),
        (2, 5, 1, [1, 3]),
        (10, 3, 1, [1, 2, 3]),
        (2, 5, 2, [1, 4]),
        (4, 6, 1, [1, 2, 4, 5]),
    ],
)
def test_samples_are_logged_num_sample_generations_times(
    make_trainer: Make, times: int, updates: int, logging_steps: int, shown: list[int]
) -> None:
    """At even distances from the first update on, as a table of the answers of that update."""
    board, wandb, trackio = Board(), Tables("_wandb"), Tables("_trackio")
    trainer = make_trainer(
        num_sample_generations=times, rows=updates * 2, per_device_train_batch_size=2, num_ppo_epochs=1,
        response_length=2, logging_steps=logging_steps, callbacks=[board, wandb, trackio],
    )  # fmt: skip
    trainer.train()
    assert [step for _, _, step in board.texts] == shown and wandb.tables == trackio.tables
    for (tag, text, step), table in zip(board.texts, wandb.tables, strict=True):
        rows = [row for row in completions_of(trainer) if row.pop("update") == step - 1]
        header, rule, *lines = text.split("\n")
        assert tag == "completions" and header == "prompt | completion | tokens | stopped | low_share"
        assert set(rule) == set("-| ") and len(lines) == len(rows) == 2
        for line, row in zip(lines, rows, strict=True):
            assert line == " | ".join(str(value).replace("\n", " ") for value in row.values())
        assert table == {"completions": (list(rows[0]), [[str(value) for value in row.values()] for row in rows])}


def test_times_speed_and_gradient_norms_reach_every_reporter(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read a clock that advances by one second per call; evaluation is not part of the rollout's time."""
    board = Board()
    trainer = make_trainer(
        callbacks=[board],
        eval_strategy="steps",
        eval_steps=4,
        eval_dataset=[{"prompt": "a"}],
        num_ppo_epochs=2,
        rows=24,
    )
    clock = SimpleNamespace(perf_counter=map(float, count()).__next__)
    for module in ("logging.metrics", "rollout.timer"):
        monkeypatch.setattr(f"rlhf_recipes.ppo.{module}.time", clock)
    trainer.train()
    steps = [logs for logs in board.logs if "loss" in logs]
    assert len(steps) == 6 and all(logs["grad_norm"] > 0 for logs in steps)
    updates = [logs for logs in board.logs if "episode" in logs]
    assert [logs["episode"] for logs in updates] == [8, 16, 24]
    for logs in updates:
        times = {name.removeprefix("time/"): logs[name] for name in logs if name.startswith("time/")}
        speed = times.pop("tokens_per_second")
        assert times == {"generate": 1, "score": 1, "forward": 1, "rollout": 3, "update": 1}
        assert logs["eps"] == 2 and speed == pytest.approx(8 * logs["completions/mean_length"] / 4)


# Hints.

HEALTHY = {
    "objective/kl": 3.0, "objective/scores": 0.5, "rewards/reward_model": 0.5, "rewards/gold": 1.0, "val/ratio": 1.01,
    "policy/clipfrac_avg": 0.1, "policy/entropy_avg": 2.0, "loss/value_avg": 0.2, "val/explained_variance": 0.3,
    "completions/mean_length": 30.0, "completions/eos_share": 0.9, "val/skipped_steps": 0.0,
}  # fmt: skip
# Metrics with a problem, metrics just within the limit, and a part of the hint.
Case = tuple[dict[str, float], dict[str, float], str]
CASES: dict[str, Case] = {
    "KL runaway": ({"objective/kl": 21.0}, {"objective/kl": 19.0}, "21.0 nats"),
    "KL runaway of long answers": (
        {"objective/kl": 31.0, "completions/mean_length": 58.0},
        {"objective/kl": 28.0, "completions/mean_length": 58.0},
        "31.0 nats",
    ),
    "negative KL": ({"objective/kl": -1.6}, {"objective/kl": -1.4}, "KL to the reference is -1.6"),
    "ratio off 1": ({"val/ratio": 0.88}, {"val/ratio": 0.92}, "ratio is 0.88"),
    "ratio off 1 above": ({"val/ratio": 1.12}, {"val/ratio": 1.08}, "ratio is 1.12"),
    "clipping": ({"policy/clipfrac_avg": 0.33}, {"policy/clipfrac_avg": 0.27}, "33% of the tokens"),
    "value loss exploding": ({"loss/value_avg": 2.1}, {"loss/value_avg": 1.9}, "ten times what it was"),
    "uninformative value": ({"val/explained_variance": -0.55}, {"val/explained_variance": -0.45}, "variance -0.55"),
    "entropy collapse": ({"policy/entropy_avg": 0.55}, {"policy/entropy_avg": 0.65}, "fallen to 0.55"),
    "length drift": ({"completions/mean_length": 62.0}, {"completions/mean_length": 58.0}, "come to 62 tokens"),
    "length drift below": ({"completions/mean_length": 14.0}, {"completions/mean_length": 16.0}, "come to 14 tokens"),
    "EOS share falling": ({"completions/eos_share": 0.0}, {"completions/eos_share": 0.75}, "only 0% of the answers"),
    "over-optimisation": (
        {"objective/scores": 0.9, "rewards/reward_model": 0.9, "rewards/gold": -1.0},
        {"objective/scores": 0.9, "rewards/reward_model": 0.9, "rewards/gold": 0.95},
        "the score rises while rewards/gold falls",
    ),
}


def hints_for(hints: Hints, caplog: pytest.LogCaptureFixture, *updates: dict[str, float]) -> list[str]:
    """Return the warnings that `hints` logs while Trainer logs these updates."""
    caplog.clear()
    state = TrainerState(is_world_process_zero=True)
    for update in updates:
        hints.on_log(None, state, TrainerControl(), logs=dict(HEALTHY | update))
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", CASES)
def test_a_hint_is_logged_once_and_again_only_after_recovery(name: str, caplog: pytest.LogCaptureFixture) -> None:
    problem, normal, excerpt = CASES[name]
    names = [*(hint.name for hint in HINTS), "over-optimisation"]
    hint = next(hint for hint in names if name.startswith(hint))
    hints = Hints()
    assert hints_for(hints, caplog, *[{}] * 20) == []
    for times in (10, 30):
        (line,) = hints_for(hints, caplog, *[problem] * times)
        assert line.startswith(f"{hint}: ") and excerpt in line and "\n" not in line
        assert hints_for(hints, caplog, *[{}] * 60) == []
    assert hints_for(Hints(), caplog, *[{}] * 20, *[normal] * 40) == [], "just within the limit"


def test_skipped_steps_hint_is_logged_at_each_increase(caplog: pytest.LogCaptureFixture) -> None:
    hints = Hints()
    counts = [0, 0, 2, 2, 2, 5, 5]
    lines = [hints_for(hints, caplog, {"val/skipped_steps": float(count)}) for count in counts]
    assert [len(logged) for logged in lines] == [0, 0, 1, 0, 0, 1, 0]
    assert lines[2][0].startswith("steps skipped: 2 optimizer") and lines[5][0].startswith(
        "steps skipped: 5 optimizer"
    )


def test_every_hint_has_a_test_case() -> None:
    names = {hint.name for hint in HINTS} | {"over-optimisation"}
    assert names - {name for name in names if any(case.startswith(name) for case in CASES)} == {"steps skipped"}


def test_over_optimisation_hint_uses_watched_rewards_only(caplog: pytest.LogCaptureFixture) -> None:
    """A reward with a negative weight may fall, and there is no over-optimisation while the score does not rise."""
    rising: list[dict[str, float]] = [
        {"objective/scores": step / 10, "rewards/reward_model": step / 10, "rewards/length": 3 - step / 10}
        for step in range(9)
    ]
    assert hints_for(Hints(lambda: ["gold"]), caplog, *rising) == []
    (line,) = hints_for(Hints(lambda: ["gold", "length"]), caplog, *rising)
    assert "rewards/length falls" in line
    assert (
        hints_for(Hints(lambda: ["length"]), caplog, *[update | {"objective/scores": 0.5} for update in rising]) == []
    )


def test_hints_of_a_resumed_run_use_all_of_its_updates(caplog: pytest.LogCaptureFixture) -> None:
    """Logs from before the checkpoint count as the first updates; logs of evaluation do not."""
    hints, state = Hints(), TrainerState()
    state.log_history = [dict(HEALTHY), {"eval_objective/kl": 1.0}, dict(HEALTHY), {"train_loss": 1.0}]
    hints.on_train_begin(None, state, TrainerControl())
    (line,) = hints_for(hints, caplog, {"policy/entropy_avg": 0.3})
    assert line.startswith("entropy collapse: ")
    assert hints_for(Hints(), caplog, *[{"policy/entropy_avg": 0.3}] * 9) == [], (
        "an entropy low from the start did not fall"
    )


def test_training_logs_its_hints(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Train against a reward of weight 0, with a hint about it; the same run with hints=False logs none."""

    def low(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]

    def high(**columns: Any) -> list[float]:
        return [1 - share for share in low(**columns)]

    def logged_lines(**options: Any) -> list[str]:
        caplog.clear()
        trainer = make_trainer(
            None, [low, high], reward_weights=[1.0, 0.0], rows=64, learning_rate=1e-2, response_length=3, **options
        )
        trainer.train()
        return [record.getMessage() for record in caplog.records if record.name.startswith("rlhf_recipes")]

    lines = logged_lines()
    assert any(line.startswith("over-optimisation: the score rises while rewards/high falls") for line in lines)
    assert any(line.startswith("clipping: ") for line in logged_lines(max_steps=4))
    assert not logged_lines(hints=False, max_steps=4)

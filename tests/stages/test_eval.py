"""The eval stage: its metrics against independent computations, how it compares models, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.stages.eval import EvalArguments, name_models, run_eval

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    {"prompt": "Who is here?", "answer": "A"},
    {"prompt": "A longer question, is it not?", "answer": "e"},
    {"prompt": "Hm?", "answer": "z"},
    {"prompt": "What <b>now</b> | then?", "answer": "t"},
]
STOPS = list(range(12))  # stop ids: enough for an untrained model to sample one now and then
TEXTS = ["The mill is by the river.", "Nobody was seen there; nobody."]


def letter_share(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """A gold function by import path: how often the letter of the column occurs."""
    return [completion.count(letter) / 10 for completion, letter in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    make_reward_model: Callable[..., Any],
    make_tokenizer: Callable[[], Any],
) -> Path:
    """Two models whose answers sometimes end, two reward models, prompts and texts."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = make_tokenizer()
    for name, seed in (("first", 0), ("second", 1)):
        model = make_model(seed, initializer_range=0.2)
        model.generation_config.eos_token_id = STOPS
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, labels in (("ranker", 1), ("classifier", 2)):
        make_reward_model(3, num_labels=labels, initializer_range=0.2).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in (("prompts", PROMPTS), ("texts", [{"text": text} for text in TEXTS])):
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def ask(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvalArguments]:
    """(models, **changes) -> arguments whose output folder is empty."""
    monkeypatch.chdir(Path(__file__).parent)  # where the gold function is found

    def make(*models: str, **changes: Any) -> EvalArguments:
        standard: dict[str, Any] = {
            "models": [str(world / name) for name in models],
            "dataset_name": str(world / "prompts"),
            "text_dataset_name": str(world / "texts"),
            "reward_model": str(world / "ranker"),
            "gold": "test_eval:letter_share",
            "max_new_tokens": 12,
            "output_dir": str(tmp_path / "report"),
        }
        return EvalArguments(**standard | changes)

    return make


def measured(folder: Path) -> dict[str, dict[str, float]]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics["models"]  # type: ignore[no-any-return]


def rows_of(folder: Path, model: str) -> list[dict[str, Any]]:
    lines = (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["model"] == model]


@pytest.fixture(scope="module")
def pair_report(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models with two answers per prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent)
        return run_eval(
            EvalArguments(
                models=[str(world / "first"), str(world / "second")],
                dataset_name=str(world / "prompts"),
                text_dataset_name=str(world / "texts"),
                reward_model=str(world / "classifier"),
                gold="test_eval:letter_share",
                max_new_tokens=12,
                completions_per_prompt=2,
                temperature=0.8,
                output_dir=str(tmp_path_factory.mktemp("pair") / "report"),
            )
        )


def log_softmax_by_hand(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled = logits.double() / temperature
    return scaled - scaled.exp().sum(dim=-1, keepdim=True).log()


@torch.no_grad()
def test_metrics_match_float64(world: Path, pair_report: Path) -> None:
    """Perplexity, bits per byte, KL, scores, EOS share and lengths: one row at a time, in float64, without padding."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    models = {name: AutoModelForCausalLM.from_pretrained(world / name) for name in ("first", "second")}
    reward_model = AutoModelForSequenceClassification.from_pretrained(world / "classifier")
    second, rows = measured(pair_report)["second"], rows_of(pair_report, "second")
    nats, tokens, size = 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([[256, *text.encode()]])
        log_probs = log_softmax_by_hand(models["second"](ids).logits[0], 1.0)
        nats -= sum(float(log_probs[place, token]) for place, token in enumerate(ids[0, 1:].tolist()))
        tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
    assert second["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert second["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)

    from rlhf_recipes.generation.sampling import Sampling, row_seed, sample

    kls, k3, positive, lengths, stops = [], [], [], [], []
    for place, row in enumerate(rows):
        prompt = list(row["prompt"].encode())
        sampling = Sampling(12, 0.8, stop_ids=tuple(STOPS))
        [answer] = sample(models["second"], [prompt], sampling, [row_seed(0, place)]).ids
        ids = torch.tensor([[*prompt, *answer]])
        ratios = [
            float(mine[place - 1, token] - theirs[place - 1, token])
            for mine, theirs in [
                [log_softmax_by_hand(models[name](ids).logits[0], 0.8) for name in ("second", "first")]
            ]
            for place, token in list(enumerate(ids[0].tolist()))[len(prompt) :]
        ]
        kls.append(sum(ratios))
        k3 += [math.exp(-ratio) - 1 + ratio for ratio in ratios]
        odds = reward_model(ids).logits[0].double()
        positive.append(float(odds.softmax(dim=0)[1]))
        assert row["reward"] == pytest.approx(float(odds[1] - odds[0]), abs=1e-4)
        assert row["gold"] == row["completion"].count(PROMPTS[row["index"]]["answer"]) / 10
        lengths.append(len(answer))
        stops.append(answer[-1] in STOPS)
    assert second["kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert second["kl_per_token"] == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert second["reward_positive"] == pytest.approx(sum(positive) / len(positive), abs=1e-5)
    assert second["length"] == pytest.approx(sum(lengths) / len(lengths))
    assert 0 < second["eos_share"] < 1 and second["eos_share"] == sum(stops) / len(stops)
    assert second["gold_score"] == pytest.approx(sum(row["gold"] for row in rows) / len(rows))


def test_a_prompt_is_won_by_the_mean_score_of_its_answers(pair_report: Path) -> None:
    wins = 0.0
    for index in range(len(PROMPTS)):
        first, second = (
            sum(row["reward"] for row in rows_of(pair_report, name) if row["index"] == index)
            for name in ("first", "second")
        )
        wins += 0.5 if first == second else float(second > first)
    result = measured(pair_report)["second"]
    assert result["win_rate_reward"] == wins / len(PROMPTS)
    assert 0 <= result["win_rate_reward_low"] <= result["win_rate_reward"] <= result["win_rate_reward_high"] <= 1
    assert "win_rate_reward" not in measured(pair_report)["first"]


def test_a_model_against_itself_is_a_tie(ask: Callable[..., EvalArguments], real_plots: None) -> None:
    folder = run_eval(ask("first", "first"))
    assert (folder / "models.png").stat().st_size > 1000
    first, again = measured(folder).values()
    assert (again["win_rate_reward"], again["win_rate_gold"]) == (0.5, 0.5)
    assert again["kl"] == again["kl_per_token"] == first["kl"] == 0
    assert {key: again[key] for key in first} == first


def test_comparing_models_changes_no_metric_of_either(
    ask: Callable[..., EvalArguments], world: Path, tmp_path: Path
) -> None:
    """Other models, their order and the batch size change no metric."""
    together = run_eval(ask("first", "second", batch_size=3, output_dir=str(tmp_path / "both")))
    for name in ("first", "second"):
        alone = run_eval(ask(name, reference=str(world / "first"), output_dir=str(tmp_path / name)))
        both, single = measured(together)[name], measured(alone)[name]
        for key, value in single.items():
            assert both[key] == pytest.approx(value, abs=2e-5), key
        texts = [[row["completion"] for row in rows_of(folder, name)] for folder in (together, alone)]
        assert texts[0] == texts[1]
        assert json.loads((alone / "metrics.json").read_text(encoding="utf-8"))["gold_score"] == single["gold_score"]


def test_greedy_answers_have_no_kl_and_a_function_can_be_the_reward_model(ask: Callable[..., EvalArguments]) -> None:
    report = run_eval(
        ask("first", "second", temperature=0.0, reward_model="test_eval:letter_share", text_dataset_name=None)
    )
    second = measured(report)["second"]
    assert second["reward_score"] == second["gold_score"]
    assert {"kl", "perplexity", "reward_positive"}.isdisjoint(second)


def test_limited_prompts_are_spread_and_truncated(ask: Callable[..., EvalArguments]) -> None:
    """Two of four prompts: the first and the third, and six tokens of each."""
    report = run_eval(ask("first", num_prompts=2, prompt_tokens=6, completions_per_prompt=3))
    rows = rows_of(report, "first")
    assert [row["prompt"] for row in rows] == ["Who is"] * 3 + ["Hm?"] * 3
    assert [row["index"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert len({row["completion"] for row in rows[:3]}) > 1, "each answer draws its own random numbers"


def test_long_prompts_are_dropped_for_all_models_or_cut(ask: Callable[..., EvalArguments], tmp_path: Path) -> None:
    """The longest of the four prompts leaves no room for an answer of 105 tokens in the context of 128."""
    for too_long, kept in (("drop", 3), ("cut", 4)):
        options = {"max_new_tokens": 105, "too_long": too_long, "output_dir": str(tmp_path / too_long)}
        report = run_eval(ask("first", "second", **options))
        counts = json.loads((report / "metrics.json").read_text(encoding="utf-8"))["rows"]["test"]
        assert counts["read"] == 4 and counts["used"] == kept
        assert all(len(rows_of(report, name)) == kept for name in ("first", "second"))


def test_the_report_folder_records_the_request(pair_report: Path) -> None:
    card = (pair_report / "README.md").read_text(encoding="utf-8")
    table = card.split("```yaml")[0]
    numbers = measured(pair_report)
    for key in ("gold_score", "perplexity", "win_rate_reward", "eos_share", "kl"):
        assert f"| {key} |" in table
    assert f"{numbers['second']['perplexity']:.4g}" in table
    assert "What \\<b\\>now\\</b\\> \\| then?" not in table, "the card shows three prompts only"
    again = parse_arguments(EvalArguments, argv=["--config", str(pair_report / "recipe.yaml")])[0]
    assert (again.completions_per_prompt, again.temperature, again.max_new_tokens) == (2, 0.8, 12)
    assert [Path(model).name for model in again.models] == ["first", "second"]


def test_model_names_are_short_and_unique() -> None:
    assert name_models(["runs/a/sft/", "runs/a/ppo"]) == ["sft", "ppo"]
    assert name_models(["a/sft", "b/sft", "gpt2"]) == ["a/sft", "b/sft", "gpt2"]
    assert name_models(["a/sft", "a/sft"]) == ["a/sft", "a/sft (2)"]


BAD: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "no models": ((), {}, "pass --models"),
    "missing folder": (("./nowhere",), {}, "no such folder"),
    "hub id offline": ((), {"models": ["someone/model"]}, "HF_HUB_OFFLINE"),
    "a reward model as model": (("ranker",), {}, "is a reward model"),
    "no prompts": (("first",), {"dataset_name": None}, "pass --dataset_name"),
    "no such column": (("first",), {"prompt_column": "question"}, "has no column 'question' but prompt, answer"),
    "no text column": (("first",), {"text_column": "story"}, "has no column 'story' but text"),
    "no such split": (("first",), {"dataset_split": "validation"}, "no split"),
    "prompt too long": (("first",), {"max_new_tokens": 128}, "do not fit the context"),
    "no such reward model": (("first",), {"reward_model": "./nowhere"}, "no such folder"),
    "a model as reward model": (("first",), {"reward_model": "second"}, "not a sequence classifier"),
    "no such function": (("first",), {"gold": "test_eval:nothing"}, "cannot be imported"),
    "function wants a column": (("first",), {"gold": "test_eval:letter_share", "dataset_name": "bare"}, "answer"),
    "reference elsewhere": (("first",), {"reference": "./nowhere"}, "no such folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_weights_load(
    name: str, ask: Callable[..., EvalArguments], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, changes, message = BAD[name]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "test.jsonl").write_text('{"prompt": "Hm?"}\n', encoding="utf-8")
    places = {"second": str(world / "second"), "bare": str(tmp_path / "bare")}
    changes = {key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    arguments = ask(*models, **changes)
    if name == "missing folder":
        arguments.models = ["./nowhere"]
    with pytest.raises(UserError, match=message):
        run_eval(arguments)
    assert not Path(arguments.output_dir).exists()


def test_numbers_out_of_range_are_refused() -> None:
    for changes in ({"temperature": -1.0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"num_prompts": 0}):
        with pytest.raises(UserError, match=next(iter(changes))):
            EvalArguments(**changes)  # type: ignore[arg-type]


def test_a_report_is_not_overwritten(ask: Callable[..., EvalArguments]) -> None:
    arguments = ask("first")
    Path(arguments.output_dir).mkdir()
    Path(arguments.output_dir, "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        run_eval(arguments)


def test_the_recipe_in_a_new_interpreter_prints_one_line_and_exits_2(world: Path, tmp_path: Path) -> None:
    """Started as users start it; other recipes are started in forks."""
    command = [
        sys.executable,
        "recipes/eval.py",
        "--models",
        str(world / "first"),
        "--dataset_name",
        str(world / "prompts"),
    ]
    command += ["--prompt_column", "question", "--output_dir", str(tmp_path / "report")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "src"})
    assert answer.returncode == 2
    [line] = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    assert "has no column 'question' but prompt, answer" in line
    assert not (tmp_path / "report").exists()


def by_token(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[0.5] * len(ids) for ids in completion_ids]


def test_token_rewards_are_summed(ask: Callable[..., EvalArguments]) -> None:
    folder = run_eval(ask("first", reward_model="test_eval:by_token", gold=None))
    rows = rows_of(folder, "first")
    assert len({row["tokens"] for row in rows}) > 1 and all(row["reward"] == row["tokens"] / 2 for row in rows)


def test_columns_named_like_reward_arguments_are_ignored(ask: Callable[..., EvalArguments], tmp_path: Path) -> None:
    rows = [row | {"completions": ["x"], "prompt_ids": [1], "completion_ids": [2], "prompts": "y"} for row in PROMPTS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = measured(
        run_eval(ask("first", dataset_name=str(tmp_path / "test.jsonl"), output_dir=str(tmp_path / "out")))
    )
    assert metrics["first"] == measured(run_eval(ask("first")))["first"]


@pytest.mark.parametrize("bad", [None, "", []])
def test_rows_without_a_prompt_are_dropped(bad: Any, ask: Callable[..., EvalArguments], tmp_path: Path) -> None:
    good = [{"role": "user", "content": "Hi"}] if isinstance(bad, list) else "Hi"
    rows = [{"prompt": prompt, "answer": "a"} for prompt in (good, bad)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = run_eval(ask("first", dataset_name=str(tmp_path / "test.jsonl"), output_dir=str(tmp_path / "out")))
    assert json.loads((folder / "metrics.json").read_text())["prompts"] == 1


def test_a_prompt_without_content_is_named(ask: Callable[..., EvalArguments], tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": content}], "answer": "a"} for content in ("Hi", None)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match="row 1: the column prompt holds a message without content"):
        run_eval(ask("first", dataset_name=str(tmp_path / "test.jsonl")))

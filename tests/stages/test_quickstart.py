"""The quickstart: a small run of all stages, its metrics and its report."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.generation.sampling import generate
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.quickstart.summarize import SHOWN_PROMPTS
from rlhf_recipes.quickstart.world.gold import gold_verdicts
from rlhf_recipes.stages import quickstart
from rlhf_recipes.stages.quickstart import QuickstartArguments, run_quickstart

SMALL = {"corpus": 80, "demonstrations": 48, "preferences": 48, "prompts": 40, "test": 12}
LOADERS = (load_causal_lm, load_tokenizer)
FEW_STEPS = {
    "pretrain": {"max_steps": 6, "eval_steps": 3},
    "sft": {"max_steps": 3},
    "reward": {"max_steps": 3},
    "ppo": {"global_batch_size": 12, "total_episodes": 24, "max_test_samples": 12, "logging_steps": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the shipped settings with fewer rows and steps."""
    place = tmp_path_factory.mktemp("quickstart")
    configs = place / "configs"
    configs.mkdir()
    for path in quickstart.STAGE_CONFIGS.glob("*.yaml"):
        changed = yaml.safe_load(path.read_text()) | FEW_STEPS.get(path.stem, {})
        (configs / path.name).write_text(yaml.safe_dump(changed))
    written = quickstart.write_world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "STAGE_CONFIGS", configs)
        patch.setattr(quickstart, "write_world", lambda folder, seed: written(folder, seed, **SMALL))
        return run_quickstart(QuickstartArguments(output_dir=str(place / "run"), seed=3, num_prompts=12))


def test_metrics_have_the_keys_of_each_stage(run: Path) -> None:
    """metrics.json has the seed and the stages; each stage has the keys that apply to it, each a number."""
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seed"] == 3 and list(metrics["stages"]) == ["pretrain", "sft", "reward", "ppo"]
    answering = {"gold_score", "perplexity", "eos_share", "distinct_2", "seconds"}
    expected = {
        "pretrain": answering,
        "sft": answering | {"kl"},
        "reward": {"reward_accuracy", "seconds"},
        "ppo": answering | {"kl"},
    }
    for stage, keys in expected.items():
        values = metrics["stages"][stage]
        assert all(isinstance(values[key], (int, float)) for key in keys), stage
    assert metrics["stages"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)  # it is the reference itself


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_metrics_are_the_gold_verdicts_of_the_answers(stage: str, run: Path) -> None:
    """The shares in metrics.json are the gold judge's verdicts on newly sampled answers of the model."""
    rows = [json.loads(line) for line in (run / "world/prompts/test.jsonl").read_text().splitlines()]
    prompts, model, tokenizer = [row["prompt"] for row in rows], *(load(str(run / stage)) for load in LOADERS)
    sampling: dict[str, Any] = {
        "max_new_tokens": quickstart.ANSWER_TOKENS,
        "temperature": quickstart.TEMPERATURE,
        "seed": 3,
    }
    verdicts = gold_verdicts(
        prompts, generate(model, tokenizer, prompts, **sampling), answer=[row["answer"] for row in rows]
    )
    metrics = json.loads((run / "metrics.json").read_text())["stages"][stage]
    for part in ("right", "polite", "concise"):
        assert metrics[part] == pytest.approx(sum(getattr(verdict, part) for verdict in verdicts) / len(rows)), part
    assert metrics["gold_score"] == pytest.approx(sum(verdict.score for verdict in verdicts) / len(rows))


def test_report_shows_prompts_spread_over_the_split(run: Path) -> None:
    page = (run / "report.html").read_text()
    rows = [json.loads(line) for line in (run / "world/prompts/test.jsonl").read_text().splitlines()]
    shown = [rows[index * len(rows) // SHOWN_PROMPTS] for index in range(SHOWN_PROMPTS)]
    for row in shown:
        assert row["prompt"][0]["content"].replace("'", "&#39;") in page


def test_each_stage_leaves_a_recipe_that_repeats_it(run: Path) -> None:
    for stage in ("tokenizer", "pretrain", "sft", "reward", "ppo"):
        recipe: dict[str, Any] = yaml.safe_load((run / stage / "recipe.yaml").read_text())
        assert recipe["output_dir"] == f"{run}/{stage}"
    assert yaml.safe_load((run / "sft/recipe.yaml").read_text())["seed"] == 3


def test_existing_run_is_not_replaced(run: Path) -> None:
    before = (run / "metrics.json").read_text()
    with pytest.raises(UserError, match="not empty"):
        run_quickstart(QuickstartArguments(output_dir=str(run)))
    assert (run / "metrics.json").read_text() == before


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run_quickstart(QuickstartArguments(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()

"""The benchmark that compares algorithms: its command lines parse, and its table shows the measurements."""

import importlib
import importlib.util
from pathlib import Path
from typing import get_type_hints

import compare_algorithms as benchmark
import pytest

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "rloo"])
def test_training_flags_parse_and_use_equal_settings(algorithm: str, tmp_path: Path) -> None:
    """All start from the same model with the same seed; PPO and RLOO use the same sampling and KL settings."""
    run = importlib.import_module(f"rlhf_recipes.stages.{algorithm}").__dict__[f"run_{algorithm}"]
    types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    flags = benchmark.training_flags(Path("quick"), algorithm, tmp_path / "out", 3)
    arguments, model, training = parse_arguments(*types, argv=flags)
    assert model.model_name_or_path == "quick/sft" and training.seed == 3
    assert training.output_dir == str(tmp_path / "out")
    if algorithm == "dpo":
        assert arguments.dataset_name == "quick/world/preferences"
        return
    assert arguments.reward == ["quick/reward", benchmark.GOLD] and training.reward_weights == [1.0, 0.0]
    assert training.normalize_rewards and training.missing_eos_penalty == 1.0 and training.temperature == 0.7
    if algorithm == "ppo":
        shape = (training.total_episodes, training.steps_per_update, training.kl_coef, training.response_length)
    else:
        updates = training.episodes(training.max_steps) // training.answers
        shape = (
            training.episodes(training.max_steps),
            training.max_steps // updates,
            training.beta,
        )
        shape += (training.max_completion_length,)
    assert shape == (2880, 8, 0.1, 40)


def test_evaluation_flags_parse(tmp_path: Path) -> None:
    from rlhf_recipes.stages.eval import EvalArguments

    flags = benchmark.evaluation_flags(Path("quick"), Path("one"), tmp_path, 7)
    (arguments,) = parse_arguments(EvalArguments, argv=flags)
    assert (arguments.models, arguments.reference, arguments.reward_model, arguments.num_prompts) == (
        ["one"],
        "quick/sft",
        "quick/reward",
        7,
    )
    assert (arguments.temperature, arguments.max_new_tokens, arguments.gold) == (0.7, 40, benchmark.GOLD)


def test_table_shows_the_mean_and_each_seed() -> None:
    runs = [{"gold_score": value, "kl": 2.0, "peak_mib": 100.4} for value in (0.9, 0.8, 1.0)]
    header, _, start, ppo = benchmark.comparison_table({"sft": [{"gold_score": 0.5}], "ppo": runs}).splitlines()
    cells = dict(zip(header.split("|"), ppo.split("|"), strict=True))
    assert cells[" gold "] == " **0.900** (0.900, 0.800, 1.000) "
    assert cells[" peak memory (MiB) "] == " **100** (100, 100, 100) " and cells[" length (tokens) "] == "  "
    assert "| sft | **0.500** |" in start


def test_a_folder_that_is_no_quickstart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder world/prompts; give the folder of a finished quickstart"):
        benchmark.main([str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

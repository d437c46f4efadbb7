"""The whole pipeline on a small world: tokenizer, pretraining, fine-tuning, reward model, PPO, then a report.

The one stage that chains others. Each runs as its recipe would run it, with its YAML file and the flags printed below.
"""

import json
import shlex
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from tqdm.auto import tqdm

from rlhf_recipes.core.arguments import OutputArguments, parse_arguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.files import write_text
from rlhf_recipes.core.processes import world_size
from rlhf_recipes.data import load_split, plain_text
from rlhf_recipes.evaluation import Evaluation, compare, evaluate_model
from rlhf_recipes.folders import RECIPE_FILE, check_output_folder, clear_output_folder, complete_output_folder
from rlhf_recipes.generation import Sampling, generate, stop_ids
from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.quickstart import (
    CONFIGS,
    Answers,
    Verdict,
    gold_verdicts,
    summarize_run,
    write_report,
    write_world,
)
from rlhf_recipes.scoring import load_reward
from rlhf_recipes.system import describe_hardware

STAGE_CONFIGS = CONFIGS / "quickstart"
GOLD = "rlhf_recipes.quickstart:gold_score"
ANSWERING = ("pretrain", "sft", "ppo")  # the stages whose models answer questions
ANSWER_TOKENS, TEMPERATURE = 40, 0.7  # as ppo samples


@dataclass
class QuickstartArguments(OutputArguments):
    """One world, one seed, one folder."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder for all stages and the report."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of every stage."})
    num_prompts: int = field(default=300, metadata={"help": "Number of held-out prompts that each model answers."})


def run_quickstart(arguments: QuickstartArguments) -> Path:
    """Run tokenizer, pretrain, sft, reward and ppo, evaluate the models, and leave metrics.json and a report.

    Returns the output folder. Raises UserError if more than one process runs.
    """
    if world_size() > 1:
        raise UserError("the quickstart runs in one process; start it with python -m rlhf_recipes quickstart")
    folder = clear_output_folder(check_output_folder(arguments.output_dir, arguments.overwrite))
    write_text(folder / RECIPE_FILE, "# This run did not finish. Start it again with --overwrite true.\n")
    started = time.perf_counter()
    write_world(folder / "world", arguments.seed)
    seconds = {}
    for number, (stage, flags) in enumerate(_stage_flags(folder).items(), start=1):
        seconds[stage] = _run_stage(f"[{number}/5]", stage, flags, arguments.seed)
        if stage in ANSWERING:
            _print_answers(folder, stage)
    evaluated = _evaluate_models(folder, arguments)
    metrics = {"seed": arguments.seed, "stages": _stage_metrics(folder, evaluated, seconds)}
    metrics |= {"seconds": time.perf_counter() - started, "hardware": describe_hardware()}
    complete_output_folder(
        folder,
        stage="quickstart",
        title="Quickstart",
        parents={"world": f"seed {arguments.seed}"},
        metrics=metrics,
        arguments=[arguments],
        notes="The report is in [report.html](report.html) and [report.md](report.md).",
    )
    answers = {stage: model.answers for stage, model in evaluated.items()}
    report = write_report(folder, summarize_run(folder, metrics, answers))
    print(f"\n{_result_lines(metrics)}\n\nreport: {report}")
    return folder


def _stage_flags(folder: Path) -> dict[str, list[str]]:
    """Return the inputs of each stage as flags; everything else is in its YAML file."""
    world = folder / "world"
    return {
        "tokenizer": ["--dataset_name", f"{world}/corpus"],
        "pretrain": ["--dataset_name", f"{world}/corpus", "--tokenizer_name", f"{folder}/tokenizer"],
        "sft": ["--dataset_name", f"{world}/demonstrations", "--model_name_or_path", f"{folder}/pretrain"],
        "reward": ["--dataset_name", f"{world}/preferences", "--model_name_or_path", f"{folder}/sft"],
        "ppo": [
            *("--dataset_name", f"{world}/prompts", "--model_name_or_path", f"{folder}/sft"),
            *("--reward", f"{folder}/reward", GOLD),
        ],
    }


def _run_stage(number: str, stage: str, flags: list[str], seed: int) -> float:
    """Run a stage as its recipe would; return the seconds it took."""
    run = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    argument_types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    world = Path(flags[flags.index("--dataset_name") + 1]).parent
    argv = ["--config", str(STAGE_CONFIGS / f"{stage}.yaml"), *flags, "--output_dir", str(world.parent / stage)]
    argv += ["--seed", str(seed)] if any("seed" in each.__dataclass_fields__ for each in argument_types) else []
    print(f"\n{number} {stage}: python -m rlhf_recipes {stage} {shlex.join(argv)}", flush=True)
    started = time.perf_counter()
    run(*parse_arguments(*argument_types, argv=argv))
    return time.perf_counter() - started


def _print_answers(folder: Path, stage: str) -> None:
    """Print the model's answers to two held-out prompts, so that a reader sees what it learned."""
    model, tokenizer = load_causal_lm(str(folder / stage)), load_tokenizer(str(folder / stage))
    prompts = list(load_split(f"{folder}/world/prompts", "test", max_samples=2)["prompt"])
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS), strict=True):
        print(f"    {plain_text(prompt)}  ->  {answer.strip()}", flush=True)


@dataclass(frozen=True)
class EvaluatedModel:
    """One model: its evaluation on the held-out prompts, and its answers with the gold judge's verdicts."""

    evaluation: Evaluation
    answers: Answers


def _evaluate_models(folder: Path, arguments: QuickstartArguments) -> dict[str, EvaluatedModel]:
    """Sample answers of every model to the same prompts with the same seed; score them by reward model and gold judge."""
    prompts = load_split(f"{folder}/world/prompts", "test", max_samples=arguments.num_prompts)
    corpus_only = load_split(f"{folder}/world/prompts", "corpus_only")
    texts = list(load_split(f"{folder}/world/corpus", "test")["text"])
    reference, tokenizer = load_causal_lm(f"{folder}/sft"), load_tokenizer(f"{folder}/sft")
    reward_model, gold = load_reward(f"{folder}/reward", tokenizer), load_reward(GOLD, tokenizer)
    evaluated = {}
    for stage in tqdm(ANSWERING, desc="evaluating"):
        model = load_causal_lm(str(folder / stage))
        sampling = Sampling(ANSWER_TOKENS, TEMPERATURE, stop_ids=stop_ids(model, tokenizer))
        shared: dict[str, Any] = {"sampling": sampling, "seed": arguments.seed, "gold": gold}
        held_out = evaluate_model(
            model, tokenizer, list(prompts["prompt"]), columns=_columns(prompts), reward_model=reward_model,
            reference=None if stage == "pretrain" else reference, texts=texts, **shared,
        )  # fmt: skip
        on_corpus_only = evaluate_model(
            model, tokenizer, list(corpus_only["prompt"]), columns=_columns(corpus_only), **shared
        )
        right = [verdict.right for verdict in _verdicts(on_corpus_only, corpus_only)]
        answers = Answers(
            texts=[row["completion"] for row in held_out.rows],
            verdicts=_verdicts(held_out, prompts),
            corpus_only_right=sum(right) / len(right),
        )
        evaluated[stage] = EvaluatedModel(held_out, answers)
    return evaluated


def _columns(rows: Any) -> dict[str, list[Any]]:
    return {name: list(rows[name]) for name in rows.column_names if name != "prompt"}


def _verdicts(evaluation: Evaluation, prompts: Any) -> list[Verdict]:
    completions = [row["completion"] for row in evaluation.rows]
    return gold_verdicts(list(prompts["prompt"]), completions, **_columns(prompts))


def _stage_metrics(
    folder: Path, evaluated: dict[str, EvaluatedModel], seconds: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Return the numbers of each stage: of its model's answers, or those that the stage itself measured."""
    stages: dict[str, dict[str, Any]] = {}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        stages[stage] = {"seconds": seconds[stage]}
        if stage in evaluated:
            answers = evaluated[stage].answers
            parts = {
                part: sum(getattr(verdict, part) for verdict in answers.verdicts) / len(answers.verdicts)
                for part in ("right", "polite", "concise")
            }
            stages[stage] |= evaluated[stage].evaluation.metrics | parts
            stages[stage]["corpus_only_right"] = answers.corpus_only_right
        else:
            measured = json.loads((folder / stage / "metrics.json").read_text(encoding="utf-8"))
            stages[stage] = measured | stages[stage]
    stages["ppo"] |= compare(evaluated["ppo"].evaluation, evaluated["sft"].evaluation)
    return stages


def _result_lines(metrics: dict[str, Any]) -> str:
    """Return the run in four lines for the terminal."""
    stages = metrics["stages"]
    lines = [
        f"{stage:<9} gold {stages[stage]['gold_score']:.2f}   right {stages[stage]['right']:.0%}   "
        f"perplexity {stages[stage]['perplexity']:.1f}"
        for stage in ANSWERING
    ]
    accuracy = f"{stages['reward']['reward_accuracy']:.0%}"
    lines.insert(2, f"{'reward':<9} ranks {accuracy} of held-out pairs as the gold judge does")
    return "\n".join(lines)

"""The whole pipeline on a world of its own: a language is learnt, then answering, then what people prefer, then PPO.

The one stage that chains others. Each of them runs as its door would run it, with its YAML and the flags printed here.
"""

import json
import shlex
import time
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
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
from rlhf_recipes.quickstart import Exchange, Reply, Summary, Verdict, gold_verdicts, write_report, write_world
from rlhf_recipes.reports import Curve, beside, curve_of
from rlhf_recipes.scoring import load_reward
from rlhf_recipes.system import describe_hardware

CONFIGS = Path(__file__).parent.parent / "quickstart" / "configs" / "quickstart"
OVEROPTIMIZED = CONFIGS.parent / "overoptimized" / "measured.json"  # a recorded run of the setting beside it
GOLD = "rlhf_recipes.quickstart:gold_score"
ANSWERING = ("pretrain", "sft", "ppo")  # the stages that leave a model that can be asked
SHOWN_PROMPTS = 10
ANSWER_TOKENS, TEMPERATURE = 40, 0.7  # as ppo samples


@dataclass
class QuickstartArguments(OutputArguments):
    """One world, one seed, one folder."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder to leave everything in."})
    seed: int = field(default=0, metadata={"help": "Another seed is another world, and another run."})
    num_prompts: int = field(default=300, metadata={"help": "Held-out prompts that each model is asked."})


def run_quickstart(arguments: QuickstartArguments) -> Path:
    """Run tokenizer, pretrain, sft, reward and ppo in order, measure the models; leave metrics.json and a report."""
    if world_size() > 1:
        raise UserError("the quickstart is one process; start it with python -m rlhf_recipes quickstart")
    folder = clear_output_folder(check_output_folder(arguments.output_dir, arguments.overwrite))
    write_text(folder / RECIPE_FILE, "# This run was cut short. Start it again with --overwrite true.\n")
    started = time.perf_counter()
    write_world(folder / "world", arguments.seed)
    seconds = {}
    for number, (stage, flags) in enumerate(_chain(folder).items(), start=1):
        seconds[stage] = _run_stage(f"[{number}/5]", stage, flags, arguments.seed)
        if stage in ANSWERING:
            _show_answers(folder, stage)
    asked = _measure(folder, arguments)
    metrics = {"seed": arguments.seed, "stages": _metrics(folder, asked, seconds)}
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
    report = write_report(folder, _summary(folder, metrics, asked, arguments.seed))
    print(f"\n{_ladder(metrics)}\n\nreport: {report}")
    return folder


def _chain(folder: Path) -> dict[str, list[str]]:
    """What each stage eats, as flags; everything else is in its YAML."""
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
    """Run a stage as its door would; returns the seconds it took."""
    run = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    types = [hint for name, hint in get_type_hints(run).items() if name != "return"]
    argv = ["--config", str(CONFIGS / f"{stage}.yaml"), *flags, "--output_dir", _output(flags, stage)]
    argv += ["--seed", str(seed)] if any("seed" in kind.__dataclass_fields__ for kind in types) else []
    print(f"\n{number} {stage}: python -m rlhf_recipes {stage} {shlex.join(argv)}", flush=True)
    started = time.perf_counter()
    run(*parse_arguments(*types, argv=argv))
    return time.perf_counter() - started


def _output(flags: list[str], stage: str) -> str:
    world = Path(flags[flags.index("--dataset_name") + 1]).parent
    return str(world.parent / stage)


def _show_answers(folder: Path, stage: str) -> None:
    """Two held-out questions answered, so that whoever watches sees what was learnt."""
    model, tokenizer = load_causal_lm(str(folder / stage)), load_tokenizer(str(folder / stage))
    prompts = list(load_split(f"{folder}/world/prompts", "test", max_samples=2)["prompt"])
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS), strict=True):
        print(f"    {plain_text(prompt)}  ->  {answer.strip()}", flush=True)


@dataclass(frozen=True)
class Asked:
    """One model, asked the held-out prompts, and those on facts that only the corpus states."""

    held_out: Evaluation
    verdicts: list[Verdict]  # gold's parts, one an answer to the held-out prompts
    corpus_only_right: float


def _measure(folder: Path, arguments: QuickstartArguments) -> dict[str, Asked]:
    """Ask every model the same prompts with the same random numbers, and score the answers by reward model and gold."""
    prompts = load_split(f"{folder}/world/prompts", "test", max_samples=arguments.num_prompts)
    corpus_only = load_split(f"{folder}/world/prompts", "corpus_only")
    texts = list(load_split(f"{folder}/world/corpus", "test")["text"])
    reference, tokenizer = load_causal_lm(f"{folder}/sft"), load_tokenizer(f"{folder}/sft")
    reward_model, gold = load_reward(f"{folder}/reward", tokenizer), load_reward(GOLD, tokenizer)
    asked = {}
    for stage in tqdm(ANSWERING, desc="measuring"):
        model = load_causal_lm(str(folder / stage))
        sampling = Sampling(ANSWER_TOKENS, TEMPERATURE, stop_ids=stop_ids(model, tokenizer))
        shared: dict[str, Any] = {"sampling": sampling, "seed": arguments.seed, "gold": gold}
        held_out = evaluate_model(
            model, tokenizer, list(prompts["prompt"]), columns=_columns(prompts), reward_model=reward_model,
            reference=None if stage == "pretrain" else reference, texts=texts, **shared,
        )  # fmt: skip
        verdicts = _verdicts(held_out, prompts)
        apart = evaluate_model(model, tokenizer, list(corpus_only["prompt"]), columns=_columns(corpus_only), **shared)
        right = [verdict.right for verdict in _verdicts(apart, corpus_only)]
        asked[stage] = Asked(held_out, verdicts, sum(right) / len(right))
    return asked


def _columns(rows: Any) -> dict[str, list[Any]]:
    return {name: list(rows[name]) for name in rows.column_names if name != "prompt"}


def _verdicts(evaluation: Evaluation, prompts: Any) -> list[Verdict]:
    completions = [row["completion"] for row in evaluation.rows]
    return gold_verdicts(list(prompts["prompt"]), completions, **_columns(prompts))


def _metrics(folder: Path, asked: dict[str, Asked], seconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        stages[stage] = {"seconds": seconds[stage]}
        if stage in asked:
            one = asked[stage]
            parts = {
                part: sum(getattr(verdict, part) for verdict in one.verdicts) / len(one.verdicts)
                for part in ("right", "polite", "concise")
            }
            stages[stage] |= one.held_out.metrics | parts | {"corpus_only_right": one.corpus_only_right}
        else:
            stages[stage] = _read(folder / stage / "metrics.json") | stages[stage]
    stages["ppo"] |= compare(asked["ppo"].held_out, asked["sft"].held_out)
    return stages


def _summary(folder: Path, metrics: dict[str, Any], asked: dict[str, Asked], seed: int) -> Summary:
    """What the report shows, in the report's own terms."""
    apart = load_split(f"{folder}/world/prompts", "corpus_only")
    summary: Summary = {
        "stages": metrics["stages"],
        "seconds": metrics["seconds"],
        "parameters": _read(folder / "pretrain" / "metrics.json")["parameters"],
        "curves": {stage: _curves(stage, _log(folder / stage)) for stage in ("pretrain", "sft", "reward", "ppo")},
        "reliability": metrics["stages"]["reward"]["calibration_table"],
        "exchanges": _exchanges(folder, asked),
        "corpus_only": {
            "facts": len({(row["person"], row["relation"]) for row in apart}),
            "questions": len(apart),
            "right": {stage: one.corpus_only_right for stage, one in asked.items()},
        },
        "reproduction": {
            "command": f"make quickstart SEED={seed}",
            "seed": seed,
            "versions": {name: _version(name) for name in ("rlhf-recipes", "torch", "transformers", "trl")},
            "hardware": metrics["hardware"],
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    if OVEROPTIMIZED.is_file():
        recorded = _read(OVEROPTIMIZED)
        pairs = zip(summary["curves"]["ppo"][:3], _curves("ppo", recorded["log_history"]), strict=False)
        curves = [beside(good, bad, ("this run", recorded["name"])) for good, bad in pairs]
        summary["overoptimization"] = {"note": recorded["note"], "curves": curves}
    return summary


def _curves(stage: str, log: list[dict[str, Any]]) -> list[Curve]:
    if stage != "ppo":
        curves = [curve_of("Loss", log, {"loss": "training", "eval_loss": "held out"})]
        return curves + ([curve_of("Pairs judged right", log, {"accuracy": "training"})] if stage == "reward" else [])
    return [
        curve_of("Score", log, {"objective/scores": "reward_model"}, x="episode", by="episode"),
        curve_of("Gold score", log, {"rewards/gold_score": "gold"}, x="episode", by="episode"),
        curve_of("KL to the model before PPO (nats)", log, {"objective/kl": "KL"}, x="episode", by="episode"),
        curve_of("Length (tokens)", log, {"completions/mean_length": "length"}, x="episode", by="episode"),
    ]


def _exchanges(folder: Path, asked: dict[str, Asked]) -> list[Exchange]:
    """The same held-out prompts after each stage, spread evenly over the split."""
    prompts = load_split(f"{folder}/world/prompts", "test")
    count = len(asked["ppo"].verdicts)
    rows = [index * count // SHOWN_PROMPTS for index in range(min(SHOWN_PROMPTS, count))]
    return [
        {
            "prompt": plain_text(prompts[row]["prompt"]),
            "answer": prompts[row]["answer"],
            "replies": {stage: _reply(one, row) for stage, one in asked.items()},
        }
        for row in rows
    ]


def _reply(asked: Asked, row: int) -> Reply:
    verdict = asked.verdicts[row]
    text = asked.held_out.rows[row]["completion"].strip()
    return {"text": text, "right": verdict.right, "polite": verdict.polite, "concise": verdict.concise}


def _log(stage_folder: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = _read(stage_folder / "trainer_state.json")["log_history"]
    return history


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from source"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _ladder(metrics: dict[str, Any]) -> str:
    """The run in four lines."""
    stages = metrics["stages"]
    lines = [
        f"{stage:<9} gold {stages[stage]['gold_score']:.2f}   right {stages[stage]['right']:.0%}   "
        f"perplexity {stages[stage]['perplexity']:.1f}"
        for stage in ANSWERING
    ]
    lines.insert(2, f"{'reward':<9} agrees with gold on {stages['reward']['reward_accuracy']:.0%} of held-out pairs")
    return "\n".join(lines)

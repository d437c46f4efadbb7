"""What the quickstart's report is made of, as plain data, and the names of its stages and metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports import Chart, decimal, duration, percent


class Reply(TypedDict):
    """A model's answer and the gold judge's verdict on it, each part in [0, 1]."""

    text: str
    right: float
    polite: float
    concise: float


class Exchange(TypedDict):
    """One held-out prompt, the true answer, and the reply after each stage, by the stage's key in `Summary.stages`."""

    prompt: str
    answer: str
    replies: Mapping[str, Reply]


class CorpusOnly(TypedDict):
    """Facts that only the corpus states. questions: how many ask for them. right: share of right answers by stage."""

    facts: int
    questions: int
    right: Mapping[str, float]


class Overoptimization(TypedDict):
    """A recorded run in a bad setting. note: what was changed and what happened. charts: this run beside that one."""

    note: str
    charts: Sequence[Chart]


class ReproductionFacts(TypedDict):
    """How to get the same numbers again. versions: library -> version. date: as the report shows it."""

    command: str
    seed: int
    versions: Mapping[str, str]
    hardware: str
    date: str


class _Measured(TypedDict):
    stages: Mapping[str, Mapping[str, Any]]


class Summary(_Measured, total=False):
    """Everything that `write_report` shows. Only `stages` is required; a part that is missing leaves no gap.

    stages: {"pretrain": {...}, "sft": {...}, "reward": {...}, "ppo": {...}}, the `stages` of metrics.json.
        Each holds the keys of `METRICS` that apply; `reward` also `longer_accuracy` and `calibration_error`.
    parameters: number of parameters of the model.
    seconds: wall-clock time of the whole run; by default the sum over the stages.
    charts: charts by stage.
    reliability: rows of `evaluation.calibration_table`.
    exchanges: the same prompts after each stage.
    """

    parameters: int
    seconds: float
    charts: Mapping[str, Sequence[Chart]]
    reliability: Sequence[Mapping[str, float]]
    exchanges: Sequence[Exchange]
    corpus_only: CorpusOnly
    overoptimization: Overoptimization
    reproduction: ReproductionFacts


# stage -> (its name, what it does)
STAGES = {
    "pretrain": ("Pretraining", "learns the language from short stories"),
    "sft": ("Fine-tuning", "imitates example answers, good and bad"),
    "reward": ("Reward model", "learns which of two answers is better"),
    "ppo": ("PPO", "practises; the reward model scores every answer"),
}

# key -> (name, format, what it is); the order of the table
METRICS: dict[str, tuple[str, Callable[[float], str], str]] = {
    "gold_score": ("Gold score", decimal, "0 to 1, from the gold judge: right, polite and concise"),
    "right": ("Right", percent, "answers that name the true value and no other"),
    "polite": ("Polite", percent, "politeness of all answers, right or wrong"),
    "concise": ("Concise", percent, "conciseness of all answers, right or wrong"),
    "perplexity": ("Perplexity", decimal, "on held-out text"),
    "reward_accuracy": ("Reward accuracy", percent, "held-out pairs that the reward model ranks correctly"),
    "kl": ("KL", decimal, "nats per answer, from the fine-tuned model"),
    "eos_share": ("Stopped by EOS", percent, "answers that end with the stop token"),
    "distinct_2": ("Distinct-2", decimal, "share of different word pairs among all pairs"),
    "length": ("Length", decimal, "tokens per answer"),
    "seconds": ("Time", duration, "wall clock"),
}


def name_of(stage: str) -> str:
    """Return the name of a stage as the report shows it."""
    return STAGES[stage][0] if stage in STAGES else stage


def format_metric(key: str, value: Any) -> str:
    """Return a metric as the report shows it; a dash if the stage has none."""
    return "–" if value is None else METRICS[key][1](float(value))


def total_seconds(summary: Summary) -> float:
    """Return the wall-clock time of the whole run, or the sum over its stages."""
    return summary.get("seconds") or sum(float(metrics.get("seconds") or 0) for metrics in summary["stages"].values())


def check_summary(summary: Summary) -> None:
    """Raise UserError for a summary without stages, or with replies of a stage that it does not hold."""
    if not summary.get("stages"):
        raise UserError("a report needs the numbers of at least one stage; fill in summary['stages']")
    for exchange in summary.get("exchanges", ()):
        for stage in exchange["replies"]:
            if stage not in summary["stages"]:
                raise UserError(f"an exchange has a reply of the stage {stage!r}, which summary['stages'] lacks")

"""What a report is made of: plain data, so that any run can fill it in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.reports import Curve, decimal, duration, percent


class Reply(TypedDict):
    """An answer and the gold judge's verdict on it, each part in [0, 1]."""

    text: str
    right: float
    polite: float
    concise: float


class Exchange(TypedDict):
    """One held-out prompt, the true answer, and what each stage said, by the stage's key in `Summary.stages`."""

    prompt: str
    answer: str
    replies: Mapping[str, Reply]


class CorpusOnly(TypedDict):
    """Facts that the corpus states and no question of any training set asks for; `right` is a share by stage."""

    facts: int
    questions: int
    right: Mapping[str, float]


class Overoptimization(TypedDict):
    """The documented bad setting: what was changed, and curves that hold the good run beside the bad one."""

    note: str
    curves: Sequence[Curve]


class Reproduction(TypedDict):
    """How to get the same numbers again. versions: library -> version; date: as it should be read."""

    command: str
    seed: int
    versions: Mapping[str, str]
    hardware: str
    date: str


class _Measured(TypedDict):
    stages: Mapping[str, Mapping[str, Any]]


class Summary(_Measured, total=False):
    """Everything `write_report` shows; only `stages` is required, and what is left out leaves no gap.

    stages: {"pretrain": {...}, "sft": {...}, "reward": {...}, "ppo": {...}} with the keys of `METRICS` where they
        apply (the `stages` of a run's metrics.json); `longer_accuracy`, `calibration_error` of `reward` are told too.
    title, story: the headline and the paragraph under it; by default both are told from the numbers.
    eyebrow: the small line above the headline, by default the seed.
    parameters: how many the model has.
    seconds: the whole run on the clock; by default the sum of the stages.
    curves: charts by section: `pretrain`, `sft`, `reward`, `ppo`; `curve_of` makes one from a Trainer's log.
    reliability: rows of `metrics.calibration_table`.
    exchanges: the same prompts after each stage.
    """

    title: str
    story: str
    eyebrow: str
    parameters: int
    seconds: float
    curves: Mapping[str, Sequence[Curve]]
    reliability: Sequence[Mapping[str, float]]
    exchanges: Sequence[Exchange]
    corpus_only: CorpusOnly
    overoptimization: Overoptimization
    reproduction: Reproduction


STAGES = {
    "pretrain": ("Pretraining", "reads little stories and learns the language"),
    "sft": ("Fine-tuning", "imitates answers, the good and the bad"),
    "reward": ("The reward model", "learns which of two answers people prefer"),
    "ppo": ("PPO", "practises, and the reward model scores each try"),
}


def name_of(stage: str) -> str:
    """A stage in words."""
    return STAGES[stage][0] if stage in STAGES else stage


def check(summary: Summary) -> None:
    """Refuse what cannot be told."""
    if not summary.get("stages"):
        raise UserError("a report needs the numbers of at least one stage; fill in summary['stages']")
    for exchange in summary.get("exchanges", ()):
        for stage in exchange["replies"]:
            if stage not in summary["stages"]:
                raise UserError(f"an exchange quotes the stage {stage!r}, which summary['stages'] does not hold")


Format = Callable[[float], str]
# key -> (name, how it is written, what it is); the order of the table
METRICS: dict[str, tuple[str, Format, str]] = {
    "gold_score": ("Gold score", decimal, "0 to 1: right, polite and concise by the truth"),
    "right": ("Right", percent, "answers that name the true value and no other"),
    "polite": ("Polite", percent, "politeness of all answers, right or wrong"),
    "concise": ("Concise", percent, "brevity of all answers"),
    "perplexity": ("Perplexity", decimal, "on held-out text"),
    "reward_accuracy": ("Reward model accuracy", percent, "held-out pairs ordered rightly"),
    "kl": ("KL", decimal, "nats an answer has moved from the fine-tuned model"),
    "eos_share": ("Stops by itself", percent, "answers ended by the stop token"),
    "distinct_2": ("Distinct-2", decimal, "different pairs of words among all"),
    "length": ("Length", decimal, "tokens an answer"),
    "seconds": ("Time", duration, "on the clock"),
}


def written(key: str, value: Any) -> str:
    """A metric as it stands in the report; a dash where a stage has none."""
    return "–" if value is None else METRICS[key][1](float(value))


def total_seconds(summary: Summary) -> float:
    """The whole run on the clock, or what its stages took."""
    return summary.get("seconds") or sum(float(metrics.get("seconds") or 0) for metrics in summary["stages"].values())


def headline(summary: Summary) -> str:
    """The title: given, or told from the clock."""
    seconds = total_seconds(summary)
    return summary.get("title") or ("From raw text to PPO" + (f" in {duration(seconds)}" if seconds else ""))


def eyebrow(summary: Summary) -> str:
    """The small line above the title: given, or the seed."""
    seed = f"seed {summary['reproduction']['seed']}" if "reproduction" in summary else ""
    return summary.get("eyebrow", seed)


def story(summary: Summary) -> str:
    """The paragraph under the title: given, or told from the numbers, whichever way they went."""
    if summary.get("story"):
        return summary["story"]
    stages = summary["stages"]
    pretrain, sft, reward, ppo = (stages.get(name, {}) for name in STAGES)
    size = f"of {summary['parameters'] / 1e6:.1f} million parameters " if summary.get("parameters") else ""
    told = [f"A GPT-2 {size}began with random weights."]
    if pretrain.get("perplexity"):
        told.append(
            f"It read a small corpus until held-out text cost it a perplexity of {decimal(pretrain['perplexity'])}."
        )
    if sft.get("gold_score") is not None:
        told.append(
            f"Taught by demonstrations, many of them wrong or rude, it reached {decimal(sft['gold_score'])} gold."
        )
    if reward.get("reward_accuracy"):
        told.append(
            f"A reward model learnt to tell the better answer in {percent(reward['reward_accuracy'])} of held-out pairs."
        )
    if sft.get("gold_score") is not None and ppo.get("gold_score") is not None:
        before, after = sft["gold_score"], ppo["gold_score"]
        way = "raised the gold score" if after > before else "did not raise the gold score: it went"
        told.append(f"PPO against that reward model {way} from {decimal(before)} to {decimal(after)}.")
    told.append("Gold is the truth about this small world: no model is ever trained on it.")
    return " ".join(told)


def reward_model_in_words(summary: Summary) -> str:
    """How good the reward model is, beside what picking the longer answer would reach; empty where it was not measured."""
    reward_model = summary["stages"].get("reward", {})
    told = []
    if reward_model.get("reward_accuracy") is not None:
        told.append(f"It orders {percent(reward_model['reward_accuracy'])} of held-out pairs as the truth does.")
    if reward_model.get("longer_accuracy") is not None:
        told.append(f"Always picking the longer answer would reach {percent(reward_model['longer_accuracy'])}.")
    if reward_model.get("calibration_error") is not None:
        told.append(f"Its confidence is off by {100 * reward_model['calibration_error']:.1f} points on average.")
    return " ".join(told)


class Step(TypedDict):
    """One rung of the ladder: its headline number, and how far up gold it stands (None where it gives no answers)."""

    name: str
    caption: str
    number: str
    label: str
    golden: bool
    gold: float | None
    gold_text: str
    time: str


def steps(summary: Summary) -> list[Step]:
    """The rungs of the ladder that the run climbed."""
    return [_step(stage, summary["stages"][stage]) for stage in STAGES if stage in summary["stages"]]


def _step(stage: str, metrics: Mapping[str, Any]) -> Step:
    key = {"pretrain": "perplexity", "reward": "reward_accuracy"}.get(stage, "gold_score")
    name, caption = STAGES[stage]
    gold = metrics.get("gold_score")
    return {
        "name": name,
        "caption": caption,
        "number": written(key, metrics.get(key)),
        "label": METRICS[key][0].lower(),
        "golden": key == "gold_score",
        "gold": None if gold is None else float(gold),
        "gold_text": written("gold_score", gold),
        "time": duration(metrics["seconds"]) if metrics.get("seconds") else "",
    }


def marks(reply: Reply) -> list[tuple[str, bool]]:
    """The verdict on a reply in words, each with whether it is a good one."""
    manners = "polite" if reply["polite"] >= 0.75 else "rude" if reply["polite"] <= 0.25 else "plain"
    return [
        ("right", True) if reply["right"] >= 0.5 else ("wrong", False),
        (manners, manners != "rude"),
        ("concise", True) if reply["concise"] >= 0.5 else ("long", False),
    ]

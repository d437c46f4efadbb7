"""What a report is made of: plain data, so that any run can fill it in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from rlhf_recipes.arguments import UserError


class _NamedPoints(TypedDict):
    name: str
    points: Sequence[tuple[float, float]]


class Series(_NamedPoints, total=False):
    """One line of a chart: its name and its (x, y) points. style: `accent` is kept for gold, the truth."""

    style: Literal["ink", "accent", "faint"]


class Curve(TypedDict):
    """One chart. title says what is measured and its unit; x names the horizontal axis."""

    title: str
    x: str
    series: Sequence[Series]


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

    stages: {"pretrain": {...}, "sft": {...}, "reward": {...}, "ppo": {...}} with the keys of `METRICS` where they apply
        (the `stages` of a run's metrics.json); `longer_accuracy` and `calibration_error` of `reward` are told too.
    title, story: the headline and the paragraph under it; by default both are told from the numbers.
    eyebrow: the small line above the headline, by default the seed.
    parameters: how many the model has.
    curves: charts by section: `pretrain`, `sft`, `reward`, `ppo`; `curve_of` makes one from a Trainer's log.
    reliability: rows of `metrics.calibration_table`.
    exchanges: the same prompts after each stage.
    """

    title: str
    story: str
    eyebrow: str
    parameters: int
    curves: Mapping[str, Sequence[Curve]]
    reliability: Sequence[Mapping[str, float]]
    exchanges: Sequence[Exchange]
    corpus_only: CorpusOnly
    overoptimization: Overoptimization
    reproduction: Reproduction


STAGES = {
    "pretrain": ("Pretraining", "reads little stories and learns the language"),
    "sft": ("Fine-tuning", "imitates answers, the good and the bad"),
    "reward": ("The judge", "learns which of two answers people prefer"),
    "ppo": ("PPO", "practises, and the judge scores each try"),
}


def name_of(stage: str) -> str:
    """A stage in words."""
    return STAGES[stage][0] if stage in STAGES else stage


def curve_of(
    title: str, log_history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], x: str = "step", by: str = "step"
) -> Curve:
    """A chart of logged numbers: `keys` maps a logged key to the name of its line; a name with "gold" in it is golden.

    x: the axis in words. by: the logged key that the axis shows.
    """
    series: list[Series] = []
    for key, name in keys.items():
        points = [(float(row[by]), float(row[key])) for row in log_history if row.get(key) is not None and by in row]
        if points:
            style: Literal["ink", "accent", "faint"] = "accent" if "gold" in name else "faint" if series else "ink"
            series.append({"name": name, "points": points, "style": style})
    return {"title": title, "x": x, "series": series}


def check(summary: Summary) -> None:
    """Refuse what cannot be told."""
    if not summary.get("stages"):
        raise UserError("a report needs the numbers of at least one stage; fill in summary['stages']")
    for exchange in summary.get("exchanges", ()):
        for stage in exchange["replies"]:
            if stage not in summary["stages"]:
                raise UserError(f"an exchange quotes the stage {stage!r}, which summary['stages'] does not hold")


def decimal(value: float) -> str:
    """Three digits that matter, never an exponent for everyday sizes."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """A share in percent, with a tenth only where it says something."""
    return f"{100 * value:.1f} %" if 0.99 <= value < 1 or 0 < value <= 0.01 else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


Format = Callable[[float], str]
# key -> (name, how it is written, what it is); the order of the table
METRICS: dict[str, tuple[str, Format, str]] = {
    "gold_score": ("Gold score", decimal, "0 to 1: right, polite and concise by the truth"),
    "right": ("Right", percent, "answers that name the true value and no other"),
    "polite": ("Polite", percent, "politeness of all answers, right or wrong"),
    "concise": ("Concise", percent, "brevity of all answers"),
    "perplexity": ("Perplexity", decimal, "on held-out text"),
    "judge_accuracy": ("Judge accuracy", percent, "held-out pairs ordered rightly"),
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
    return sum(float(metrics.get("seconds") or 0) for metrics in summary["stages"].values())


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
        told.append(f"It read a small corpus until held-out text cost it a perplexity of {decimal(pretrain['perplexity'])}.")
    if sft.get("gold_score") is not None:
        told.append(f"Taught by demonstrations, many of them wrong or rude, it reached {decimal(sft['gold_score'])} gold.")
    if reward.get("judge_accuracy"):
        told.append(f"A judge learnt to tell the better answer in {percent(reward['judge_accuracy'])} of held-out pairs.")
    if sft.get("gold_score") is not None and ppo.get("gold_score") is not None:
        before, after = sft["gold_score"], ppo["gold_score"]
        way = "raised the gold score" if after > before else "did not raise the gold score: it went"
        told.append(f"PPO against that judge {way} from {decimal(before)} to {decimal(after)}.")
    told.append("Gold is the truth about this small world: no model is ever trained on it.")
    return " ".join(told)


def marks(reply: Reply) -> list[tuple[str, bool]]:
    """The verdict on a reply in words, each with whether it is a good one."""
    manners = "polite" if reply["polite"] >= 0.75 else "rude" if reply["polite"] <= 0.25 else "plain"
    return [
        ("right", True) if reply["right"] >= 0.5 else ("wrong", False),
        (manners, manners != "rude"),
        ("concise", True) if reply["concise"] >= 0.5 else ("long", False),
    ]

"""The numbers of a run in words: title, summary line, the card of each stage, the marks of an answer."""

from collections.abc import Mapping
from typing import Any, TypedDict

from rlhf_recipes.quickstart.summary import METRICS, STAGES, Reply, Summary, format_metric, total_seconds
from rlhf_recipes.reports import decimal, duration, percent


def headline(summary: Summary) -> str:
    """Return the title of the report."""
    seconds = total_seconds(summary)
    return "From raw text to PPO" + (f" in {duration(seconds)}" if seconds else "")


def eyebrow(summary: Summary) -> str:
    """Return the small line above the title: the seed."""
    return f"seed {summary['reproduction']['seed']}" if "reproduction" in summary else ""


def story(summary: Summary) -> str:
    """Return the paragraph under the title. It follows the numbers, also where PPO did not help."""
    stages = summary["stages"]
    pretrain, sft, reward, ppo = (stages.get(name, {}) for name in STAGES)
    size = f" with {summary['parameters'] / 1e6:.1f} million parameters" if summary.get("parameters") else ""
    sentences = [f"A GPT-2{size} starts from random weights."]
    if pretrain.get("perplexity"):
        perplexity = decimal(pretrain["perplexity"])
        sentences.append(f"Pretraining on a small corpus takes it to a perplexity of {perplexity} on held-out text.")
    if sft.get("gold_score") is not None:
        gold = decimal(sft["gold_score"])
        sentences.append(f"Fine-tuning on demonstrations, many of them wrong or rude, reaches a gold score of {gold}.")
    if reward.get("reward_accuracy"):
        accuracy = percent(reward["reward_accuracy"])
        sentences.append(f"A reward model learns from preferences and ranks {accuracy} of held-out pairs correctly.")
    if sft.get("gold_score") is not None and ppo.get("gold_score") is not None:
        before, after = sft["gold_score"], ppo["gold_score"]
        effect = "raises the gold score" if after > before else "does not raise the gold score: it goes"
        sentences.append(f"PPO against this reward model {effect} from {decimal(before)} to {decimal(after)}.")
    sentences.append("The gold score comes from the gold judge, which knows the truth; no model is trained on it.")
    return " ".join(sentences)


def describe_reward_model(summary: Summary) -> str:
    """Return how good the reward model is, next to a rule that always prefers the longer answer; empty if not measured."""
    metrics = summary["stages"].get("reward", {})
    sentences = []
    if metrics.get("reward_accuracy") is not None:
        sentences.append(f"It ranks {percent(metrics['reward_accuracy'])} of held-out pairs correctly.")
    if metrics.get("longer_accuracy") is not None:
        sentences.append(f"Always preferring the longer answer would reach {percent(metrics['longer_accuracy'])}.")
    if metrics.get("calibration_error") is not None:
        error = f"{100 * metrics['calibration_error']:.1f} percentage points"
        sentences.append(f"Its confidence differs from its accuracy by {error} on average.")
    return " ".join(sentences)


class Card(TypedDict):
    """One stage at a glance. gold: gold score in [0, 1], None if the stage writes no answers. golden: it is the number."""

    name: str
    caption: str
    number: str
    label: str
    golden: bool
    gold: float | None
    gold_text: str
    time: str


def cards(summary: Summary) -> list[Card]:
    """Return a card for each stage of the run, in order."""
    return [_card(stage, summary["stages"][stage]) for stage in STAGES if stage in summary["stages"]]


def _card(stage: str, metrics: Mapping[str, Any]) -> Card:
    key = {"pretrain": "perplexity", "reward": "reward_accuracy"}.get(stage, "gold_score")
    name, caption = STAGES[stage]
    gold = metrics.get("gold_score")
    return {
        "name": name,
        "caption": caption,
        "number": format_metric(key, metrics.get(key)),
        "label": METRICS[key][0].lower(),
        "golden": key == "gold_score",
        "gold": None if gold is None else float(gold),
        "gold_text": format_metric("gold_score", gold),
        "time": duration(metrics["seconds"]) if metrics.get("seconds") else "",
    }


def marks(reply: Reply) -> list[tuple[str, bool]]:
    """Return the verdict on a reply as words, each with whether it is a good one."""
    tone = "polite" if reply["polite"] >= 0.75 else "rude" if reply["polite"] <= 0.25 else "plain"
    return [
        ("right", True) if reply["right"] >= 0.5 else ("wrong", False),
        (tone, tone != "rude"),
        ("concise", True) if reply["concise"] >= 0.5 else ("long", False),
    ]

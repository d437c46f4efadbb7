"""The report as Markdown, for places that render no HTML page."""

from rlhf_recipes.core.markdown import escape_markdown, table
from rlhf_recipes.quickstart import summary as words
from rlhf_recipes.quickstart.summary import METRICS, Summary
from rlhf_recipes.reports import percent


def markdown(summary: Summary, pictures: dict[str, str]) -> str:
    """`report.md`. pictures: section -> the file name of its curves, beside the report."""
    parts = [
        f"# {escape_markdown(words.headline(summary))}",
        escape_markdown(words.story(summary)),
        "![The run in one picture](ladder.png)",
    ]
    parts += ["## After each stage, in numbers", _numbers(summary)]
    if summary.get("exchanges"):
        parts += ["## The same questions after each stage", _exchanges(summary)]
    titles = {
        "ppo": "Practice: PPO, update by update",
        "overoptimization": "Too much of a good thing",
        "reward": "The reward model",
        "pretrain": "Learning to speak",
        "sft": "Learning to answer",
    }
    for section, title in titles.items():
        told = (
            escape_markdown(summary["overoptimization"]["note"])
            if section == "overoptimization" and section in summary
            else ""
        )
        told = words.reward_model_in_words(summary) if section == "reward" else told
        shown = f"![Curves]({pictures[section]})" if section in pictures else ""
        if told or shown:
            parts += [f"## {title}", *filter(None, [told, shown])]
    if "corpus_only" in summary:
        parts += ["## Facts nobody ever asked about", _corpus_only(summary)]
    if "reproduction" in summary:
        parts += ["## Run it again", _reproduction(summary)]
    return "\n\n".join(parts) + "\n"


def _numbers(summary: Summary) -> str:
    stages = summary["stages"]
    rows = [
        [f"**{name}**, {hint}", *(words.written(key, of.get(key)) for of in stages.values())]
        for key, (name, _, hint) in METRICS.items()
        if any(of.get(key) is not None for of in stages.values())
    ]
    return table(["", *(escape_markdown(words.name_of(stage)) for stage in stages)], rows, range(1, len(stages) + 1))


def _exchanges(summary: Summary) -> str:
    rows = []
    for exchange in summary["exchanges"]:
        for place, (stage, reply) in enumerate(exchange["replies"].items()):
            asked = (
                f"{escape_markdown(exchange['prompt'])} (truth: {escape_markdown(exchange['answer'])})"
                if place == 0
                else ""
            )
            verdict = ", ".join(word for word, _ in words.marks(reply))
            mark = "✓" if reply["right"] >= 0.5 else "✗"
            rows.append(
                [asked, escape_markdown(words.name_of(stage)), escape_markdown(reply["text"]), f"{mark} {verdict}"]
            )
    return table(["prompt", "after", "answer", "gold says"], rows)


def _corpus_only(summary: Summary) -> str:
    told = summary["corpus_only"]
    shares = ", ".join(
        f"{escape_markdown(words.name_of(stage))} {percent(share)}" for stage, share in told["right"].items()
    )
    return (
        f"{told['facts']} facts are told in the corpus and nowhere else. Asked for them in {told['questions']} ways, "
        f"right answers: {shares}. These questions count in no other number here."
    )


def _reproduction(summary: Summary) -> str:
    how = summary["reproduction"]
    code = "\n".join(f"    {line}" for line in how["command"].splitlines())
    versions = ", ".join(f"{name} {version}" for name, version in how["versions"].items())
    hardware, date, versions = (escape_markdown(each) for each in (how["hardware"], how["date"], versions))
    return f"{code}\n\n{hardware}; seed {how['seed']}; {date}; {versions}"

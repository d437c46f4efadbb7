"""The quickstart's report: its sections, and the picture that tells the run at a glance."""

from collections.abc import Iterator
from pathlib import Path

from rlhf_recipes.core.markdown import escape_markdown, table
from rlhf_recipes.quickstart.picture import ladder_picture
from rlhf_recipes.quickstart.story import cards, describe_reward_model, eyebrow, headline, marks, story
from rlhf_recipes.quickstart.summary import METRICS, Summary, check_summary, format_metric, name_of, total_seconds
from rlhf_recipes.reports import (
    Page,
    Reproduction,
    Section,
    Table,
    TableRow,
    duration,
    percent,
    reliability_chart,
    render_html,
    write_page,
)

TEMPLATES = Path(__file__).parent / "templates"
PICTURE = "ladder.png"


def write_report(folder: str | Path, summary: Summary) -> Path:
    """Write `report.html`, `report.md` and their pictures into a folder; return the path of the HTML page."""
    check_summary(summary)
    path = write_page(folder, report_page(summary))
    ladder_picture(summary, Path(folder) / PICTURE)
    return path


def report_page(summary: Summary) -> Page:
    """Return the report as a page; a section without data is left out."""
    return Page(
        title=headline(summary),
        summary=story(summary),
        eyebrow=eyebrow(summary),
        sections=list(_sections(summary)),
        reproduction=_reproduction(summary),
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _sections(summary: Summary) -> Iterator[Section]:
    charts = {name: [chart for chart in of if chart.series] for name, of in summary.get("charts", {}).items()}
    yield _cards(summary)
    if summary.get("exchanges"):
        yield _exchanges(summary)
    if charts.get("ppo"):
        yield Section(
            name="ppo",
            title="Practice: PPO, update by update",
            text="PPO maximizes the reward model's score minus a penalty for moving away from the fine-tuned model (KL). "
            "It never sees the gold score, which shows whether the answers really improve.",
            charts=charts["ppo"],
        )
    if "overoptimization" in summary:
        yield Section(
            name="overoptimization",
            title="Too much of a good thing: reward overoptimization",
            text=summary["overoptimization"]["note"],
            charts=summary["overoptimization"]["charts"],
        )
    reliability = [reliability_chart(summary["reliability"])] if summary.get("reliability") else []
    reward_model = Section(
        name="reward",
        title="The reward model",
        text=describe_reward_model(summary),
        charts=[*reliability, *charts.get("reward", ())],
    )
    if reward_model.text or reward_model.charts:
        yield reward_model
    if language := [*charts.get("pretrain", ()), *charts.get("sft", ())]:
        yield Section(
            name="language",
            title="Learning the language, learning to answer",
            text="Pretraining and fine-tuning both learn to predict the next token.",
            charts=language,
        )
    yield _numbers(summary)
    if "corpus_only" in summary:
        yield _corpus_only(summary)


def _cards(summary: Summary) -> Section:
    html = render_html(TEMPLATES / "stages.html.jinja", cards=cards(summary))
    return Section(name="stages", html=html, markdown=f"![The run in one picture]({PICTURE})")


def _exchanges(summary: Summary) -> Section:
    rows = []
    for exchange in summary["exchanges"]:
        question = f"{escape_markdown(exchange['prompt'])} (truth: {escape_markdown(exchange['answer'])})"
        for index, (stage, reply) in enumerate(exchange["replies"].items()):
            verdict = f"{'✓' if reply['right'] >= 0.5 else '✗'} {', '.join(word for word, _ in marks(reply))}"
            row = [escape_markdown(name_of(stage)), escape_markdown(reply["text"]), verdict]
            rows.append(["" if index else question, *row])
    return Section(
        name="exchanges",
        title="The same questions after each stage",
        text="No model was trained on these prompts. The marks come from the gold judge, which knows the truth.",
        html=render_html(
            TEMPLATES / "exchanges.html.jinja", exchanges=summary["exchanges"], name_of=name_of, marks=marks
        ),
        markdown=table(["prompt", "stage", "answer", "gold judge"], rows),
    )


def _numbers(summary: Summary) -> Section:
    stages = summary["stages"]
    rows = [
        TableRow(
            name, [format_metric(key, metrics.get(key)) for metrics in stages.values()], note, key == "gold_score"
        )
        for key, (name, _, note) in METRICS.items()
        if any(metrics.get(key) is not None for metrics in stages.values())
    ]
    columns = [name_of(stage) for stage in stages]
    return Section(name="numbers", title="After each stage, in numbers", table=Table(columns, rows))


def _corpus_only(summary: Summary) -> Section:
    facts = summary["corpus_only"]
    shares = [(name_of(stage), share, percent(share)) for stage, share in facts["right"].items()]
    return Section(
        name="corpus_only",
        title="Facts that no training question asks for",
        text=f"The corpus states {facts['facts']} facts that appear in no demonstration, preference or training prompt. "
        f"Below are the shares of right answers to {facts['questions']} questions about them. "
        "These questions count in no other number of this report.",
        html=render_html(TEMPLATES / "shares.html.jinja", shares=shares),
        markdown=", ".join(f"{escape_markdown(name)} {text}" for name, _, text in shares),
    )


def _reproduction(summary: Summary) -> Reproduction | None:
    if "reproduction" not in summary:
        return None
    facts = summary["reproduction"]
    run = [f"{duration(total_seconds(summary))} on {facts['hardware']}", f"seed {facts['seed']}", facts["date"]]
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    return Reproduction(facts["command"], [" · ".join(run), " · ".join(versions)])

"""Markdown tables that compare evaluated models."""

from rlhf_recipes.core.markdown import escape_markdown, table
from rlhf_recipes.data import plain_text
from rlhf_recipes.evaluation.models import METRICS, Evaluation

SAMPLES_ON_CARD = 3


def comparison_tables(measured: dict[str, dict[str, float]], evaluations: dict[str, Evaluation]) -> str:
    """Return Markdown tables: the metrics with a column per model, and the models' answers to the first prompts."""
    names = [escape_markdown(name) for name in measured]
    numbers = [
        [
            escape_markdown(key),
            *(_format_metric(metrics, key) for metrics in measured.values()),
            escape_markdown(meaning),
        ]
        for key, meaning in METRICS.items()
        if any(key in metrics for metrics in measured.values())
    ]
    rows = next(iter(evaluations.values())).rows
    first = {row["index"]: place for place, row in reversed(list(enumerate(rows)))}  # each prompt's first answer
    answers = [
        [
            escape_markdown(plain_text(rows[place]["prompt"])),
            *(escape_markdown(each.rows[place]["completion"]) for each in evaluations.values()),
        ]
        for place in sorted(first.values())[:SAMPLES_ON_CARD]
    ]
    columns = range(1, len(names) + 1)
    return f"{table(['', *names, 'meaning'], numbers, columns)}\n\n{table(['prompt', *names], answers)}"


def _format_metric(metrics: dict[str, float], key: str) -> str:
    if key not in metrics:
        return ""
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return f"{metrics[key]:.4g}" + (f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else "")

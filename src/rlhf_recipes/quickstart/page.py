"""The page: a template, filled in. Everything from outside is escaped by the template engine, without exception."""

from pathlib import Path

from rlhf_recipes.quickstart import summary as words
from rlhf_recipes.quickstart.summary import METRICS, Summary
from rlhf_recipes.reports import chart_of, decimal, duration, percent, reliability_chart

HOME = Path(__file__).parent
SECTIONS = ("pretrain", "sft", "reward", "ppo")


def page(summary: Summary) -> str:
    """The whole report as one HTML document that needs nothing else: no script, no font, no file, no network."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HOME), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    stages = summary["stages"]
    rows = [
        {"name": name, "hint": hint, "key": key, "cells": [words.written(key, of.get(key)) for of in stages.values()]}
        for key, (name, _, hint) in METRICS.items()
        if any(of.get(key) is not None for of in stages.values())
    ]
    charts = {
        section: [chart_of(curve) for curve in summary.get("curves", {}).get(section, ()) if curve["series"]]
        for section in SECTIONS
    }
    bad = summary.get("overoptimization")
    return environment.get_template("report.html.jinja").render(
        title=words.headline(summary),
        story=words.story(summary),
        eyebrow=words.eyebrow(summary),
        steps=words.steps(summary),
        names={stage: words.name_of(stage) for stage in stages},
        rows=rows,
        charts=charts,
        reliability=reliability_chart(summary["reliability"]) if summary.get("reliability") else None,
        exchanges=summary.get("exchanges", ()),
        marks=words.marks,
        percent=percent,
        decimal=decimal,
        corpus_only=summary.get("corpus_only"),
        bad={"note": bad["note"], "charts": [chart_of(curve) for curve in bad["curves"]]} if bad else None,
        reproduction=summary.get("reproduction"),
        total=duration(words.total_seconds(summary)),
        reward_model=words.reward_model_in_words(summary),
    )

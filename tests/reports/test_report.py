"""Reports: a page shows all of its data, data never becomes markup, and the page needs no other file."""

import copy
import dataclasses
import math
import re
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.markdown import escape_markdown
from rlhf_recipes.quickstart.picture import ladder_picture
from rlhf_recipes.quickstart.report import write_report
from rlhf_recipes.quickstart.story import marks
from rlhf_recipes.quickstart.summarize import _side_by_side
from rlhf_recipes.quickstart.summary import Summary
from rlhf_recipes.reports.chart import Bar, Chart, Series, chart_from_log
from rlhf_recipes.reports.layout import SMOOTHED_FROM, ticks
from rlhf_recipes.reports.page import Page, Section
from rlhf_recipes.reports.report import write_page
from rlhf_recipes.reports.style import DARK, LIGHT
from rlhf_recipes.reports.svg import svg_chart
from rlhf_recipes.reports.text import decimal, duration, percent

HOSTILE = (
    "\"'></style></p><script>alert(1)</script><img src=x onerror=alert(1)>"
    "{{ 7*7 }}|`*_[a](b)_*`\\ $\\frac{1}$ &amp; \n# x"
)


def reply(text: str, right: float, polite: float, concise: float) -> dict[str, Any]:
    return {"text": text, "right": right, "polite": polite, "concise": concise}


def example() -> Summary:
    log = [{"step": step, "loss": 5 / step, "episode": 10 * step, "gold": 0.1 * step} for step in range(1, 9)]
    exchange = {
        "prompt": "Where does Mara live?",
        "answer": "mill",
        "replies": {
            "pretrain": reply("the river and", 0, 0.5, 0),
            "sft": reply("In the bakery, silly.", 0, 0, 1),
            "ppo": reply("Gladly: in the mill.", 1, 1, 1),
        },
    }
    other = {"prompt": "What does Otto play?", "answer": "fiddle", "replies": {"ppo": reply("", 0, 0.5, 0)}}
    return {
        "parameters": 1_050_000,
        "stages": {
            "pretrain": {"gold_score": 0.012, "perplexity": 3.217, "eos_share": 0.11, "seconds": 88.3},
            "sft": {"gold_score": 0.4213, "perplexity": 3.92, "kl": 0.0, "length": 14.64, "seconds": 42.1},
            "reward": {"reward_accuracy": 0.943, "longer_accuracy": 0.38, "calibration_error": 0.021, "seconds": 51.7},
            "ppo": {"gold_score": 0.9312, "right": 0.951, "perplexity": 4.35, "kl": 8.13, "seconds": 71.4},
        },
        "charts": {
            "pretrain": [chart_from_log("Loss in nats", log, {"loss": "training loss"})],
            "ppo": [chart_from_log("Gold over episodes", log, {"gold": "gold"}, x="episode", by="episode")],
        },
        "reliability": [
            {"low": 0.5, "high": 0.75, "confidence": 0.62, "accuracy": 0.6, "count": 10},
            {"low": 0.75, "high": 1.0, "confidence": 0.9, "accuracy": 0.95, "count": 30},
        ],
        "exchanges": [exchange, other],  # type: ignore[list-item]
        "corpus_only": {"facts": 12, "questions": 84, "right": {"sft": 0.21, "ppo": 0.34}},
        "overoptimization": {
            "note": "A KL coefficient of 0.005 lets the reward model be fooled.",
            "charts": [chart_from_log("Gold, good and bad", log, {"gold": "gold", "loss": "bad"})],
        },
        "reproduction": {
            "command": "make quickstart SEED=3",
            "seed": 3,
            "versions": {"torch": "2.13.0"},
            "hardware": "2 CPU cores",
            "date": "2026-11-21",
        },
    }


class ParsedPage(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(name, value or "") for name, value in attrs]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_style else data


def strings_of(value: Any) -> list[str]:
    """Return every text of a summary that comes from outside; colours are code."""
    if isinstance(value, str):
        return [value]
    if dataclasses.is_dataclass(value):
        value = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "colour"
        }
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for part in parts for text in strings_of(part)]


def poisoned(value: Any) -> Any:
    """Return the same data with the hostile text at the end of every text but a line's colour."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name != "colour"]
        return dataclasses.replace(value, **{name: poisoned(getattr(value, name)) for name in names})
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value else value


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), example()).parent


def test_page_shows_all_data(report: Path) -> None:
    text = ParsedPage((report / "report.html").read_text(encoding="utf-8")).text
    assert [string for string in strings_of(dict(example())) if string not in text] == []
    numbers = [
        *"3.22 0.42 0.93 4.35 8.13 14.6 12 84 2.13.0".split(),
        "94 %",
        "95 %",
        "38 %",
        "2.1 percentage points",
        "11 %",
    ]
    shares = ["21 %", "34 %", "88 s", "42 s", "52 s", "71 s", "4 min 14 s", "1.1 million", "empty answer"]
    assert [number for number in numbers + shares if number not in text] == []
    for verdict in ("✗ wrong", "rude", "✓ right", "polite", "concise", "long", "plain"):
        assert verdict in text


def test_markdown_shows_the_same_data(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    strings = strings_of([example()["exchanges"], example()["reproduction"]["versions"]])
    assert [string for string in strings if string not in text] == []
    assert "    make quickstart SEED=3\n" in text and "seed 3 · 2026-11-21" in text
    for number in ("3.22", "0.42", "0.93", "94 %", "38 %", "21 %", "4 min 14 s"):
        assert number in text
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert sorted(pictures) == [
        "ladder.png",
        *(f"report-{name}.png" for name in ("language", "overoptimization", "ppo", "reward")),
    ]
    for picture in pictures:
        assert (report / picture).read_bytes().startswith(b"\x89PNG")


def test_page_loads_no_other_file(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    page = ParsedPage(html)
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in page.elements)
    assert {"src", "href", "srcset", "data", "action"}.isdisjoint(name for name, _ in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert "default-src 'none'" in html


def test_data_cannot_become_markup(report: Path, tmp_path: Path) -> None:
    """With hostile text in every field the page has the same elements and attributes, and shows the text unchanged."""
    friendly = ParsedPage((report / "report.html").read_text(encoding="utf-8"))
    hostile = ParsedPage(write_report(tmp_path, poisoned(copy.deepcopy(dict(example())))).read_text(encoding="utf-8"))
    assert hostile.elements == friendly.elements
    assert hostile.text.count(HOSTILE) > 20
    assert {name: value for name, value in hostile.attributes if name == "style"} == {
        name: value for name, value in friendly.attributes if name == "style"
    }


def test_data_cannot_become_markdown(report: Path, tmp_path: Path) -> None:
    write_report(tmp_path, poisoned(copy.deepcopy(dict(example()))))

    def cells(folder: Path) -> list[int]:
        lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
        return [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]

    assert cells(tmp_path) == cells(report) and len(cells(report)) > 10
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"(?<!\\)<", outside_code) and not re.search(r"(?<!\\)\[a", outside_code)
    assert escape_markdown("# a_b _c <i>\n- |") == "\\# a_b \\_c \\<i\\> - \\|"


def test_missing_parts_leave_no_gap(tmp_path: Path) -> None:
    stages = {"sft": {"gold_score": 0.5}, "ppo": {"gold_score": 0.25}}
    page = ParsedPage(write_report(tmp_path, {"stages": stages}).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("h2") == 1
    assert "does not raise the gold score: it goes from 0.50 to 0.25" in page.text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ladder.png", "report.html", "report.md"]


def test_gauges_show_gold_scores_and_shares(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    gauges, shares = ["1.2", "42.1", "93.1"], ["21.0", "34.0"]
    assert re.findall(r"class=\"fill\" style=\"width: ([\d.]+)%\"", html) == gauges + shares


def test_picture_is_drawn_to_scale(tmp_path: Path) -> None:
    """The picture has 1600 x 900 pixels, and the length of its golden bars is proportional to the gold score."""
    from matplotlib.image import imread

    summary = example()
    summary["stages"]["ppo"]["gold_score"], summary["stages"]["sft"]["gold_score"] = 0.8, 0.2  # type: ignore[index]
    path = ladder_picture(summary, tmp_path / "ladder.png")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1600, 900)
    pixels = imread(path)[:, :, :3]
    gold = (abs(pixels - [0xA8 / 255, 0x74 / 255, 0x08 / 255]) < 0.02).all(axis=2)
    row = gold[int(900 * (1 - 0.525 - 0.0405))]  # the height of the gauges
    sft, ppo = row[400:800].sum(), row[1200:].sum()
    assert ppo > 200 and ppo / sft == pytest.approx(4, rel=0.03)


def test_dollar_sign_starts_no_formula(tmp_path: Path) -> None:
    summary = example()
    summary["exchanges"][0]["prompt"] = "For $\\frac{2$?"
    summary["charts"]["ppo"] = [Chart("In $\\frac{2$", "$x^$", [Series("$^$", [(0, 1), (1, 2)])])]  # type: ignore[index]
    assert ladder_picture(summary, tmp_path / "ladder.png").is_file()


def test_svg_points_agree_with_the_labels_of_the_axes() -> None:
    """Read back through the labels of the axes, every position on the path is the point of the data."""
    points = [(0.0, 0.25), (10.0, 0.5), (30.0, 1.0), (40.0, 0.75), (45.0, math.nan)]
    chart = svg_chart(Chart("t", "x", [Series("n", points)]))
    positions = [tuple(map(float, pair.split())) for pair in re.split("[ML]", chart.lines[0].path)[1:]]

    def value(position: float, labels: Sequence[tuple[float, str]]) -> float:
        (first, low), (last, high) = labels[0], labels[-1]
        return float(low) + (position - first) / (last - first) * (float(high) - float(low))

    assert len(chart.x_ticks) >= 3 and len(chart.y_ticks) >= 3
    for (x, y), (across, up) in zip(points[:4], positions, strict=True):
        assert value(across, chart.x_ticks) == pytest.approx(x, abs=0.2)
        assert value(up, chart.y_ticks) == pytest.approx(y, abs=0.005)
        assert chart.left <= across <= chart.right and 0 <= up <= chart.bottom
    assert chart.lines[0].last == "0.75"
    assert [(round(x, 1), round(y, 1)) for x, y in chart.lines[0].dots] == positions


def test_svg_path_starts_again_after_a_gap() -> None:
    points = [(0, 0), (1, 1), (2, math.nan), (3, 1), (4, math.inf), (5, 0)]
    [line] = svg_chart(Chart("t", "x", [Series("n", points)])).lines
    assert re.sub("[^ML]", "", line.path) == "MLMM" and len(line.dots) == 4


def test_bars_and_dotted_lines_are_drawn_to_scale() -> None:
    bars = [Bar(0.5, 0.75, 10), Bar(0.75, 1.0, 40)]
    chart = svg_chart(
        Chart("t", "x", [Series("n", [(0.5, 0.5), (1.0, 1.0)], dotted=True)], bars, "pairs", show_last=False)
    )
    (first, first_width, low), (second, second_width, high) = chart.bars
    assert high == pytest.approx(4 * low) and second - first == pytest.approx(first_width + 2)
    assert first_width == pytest.approx(second_width) and first == pytest.approx(chart.left + 1)
    assert chart.lines[0].dotted and chart.lines[0].last == "" and chart.lines[0].dots == []


def test_ticks_of_counts_are_whole_numbers() -> None:
    assert [label for _, label in ticks(0, 2, 5, whole=True)] == ["0", "1", "2"]
    assert [label for _, label in ticks(0, 1, 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 4.9), (0.41, 0.94), (0, 12345), (1e-6, 4e-6), (0.5, 1.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = ticks(low, high, 5)
    assert 2 <= len(values) <= 6
    steps = {round((after - before) / (high - low), 6) for (before, _), (after, _) in pairwise(values)}
    assert len(steps) == 1
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in values)
    assert [float(label.replace(",", "")) for _, label in values] == pytest.approx([value for value, _ in values])


def test_long_series_shows_its_trend_over_its_values() -> None:
    noisy = [(float(step), float((-1) ** step)) for step in range(SMOOTHED_FROM)]
    long, short = svg_chart(Chart("", "", [Series("long", noisy), Series("short", noisy[1:])])).lines
    assert long.raw_path and long.raw_path != long.path and abs(float(long.last)) < 0.3
    assert not short.raw_path and short.last == "-1.00"


def test_chart_holds_the_logged_numbers() -> None:
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5, "gold": None},
        {"loss": 9.0},
        {"step": 3, "loss": 1.0},
    ]
    chart = chart_from_log("Loss", log, {"loss": "training", "eval_loss": "held out", "gold": "gold"})
    assert chart.series == [
        Series("training", [(1.0, 2.0), (3.0, 1.0)], "ink"),
        Series("held out", [(2.0, 1.5)], "blue"),
    ]


def test_two_runs_share_one_chart() -> None:
    good, bad = (Chart("Gold", "step", [Series("gold", [(1, 0.5), (2, last)], "accent")]) for last in (0.9, 0.1))
    assert _side_by_side(good, bad, "KL 0").series == [
        Series("this run", [(1, 0.5), (2, 0.9)], "accent"),
        Series("KL 0", [(1, 0.5), (2, 0.1)], "faint"),
    ]


def test_numbers_as_text() -> None:
    assert [decimal(value) for value in (0.9312, 14.64, 1234.5)] == ["0.93", "14.6", "1,234"]
    assert [percent(value) for value in (0.943, 0.995, 1.0, 0.0, 0.004)] == ["94 %", "99.5 %", "100 %", "0 %", "0.4 %"]
    assert [duration(value) for value in (7.4, 99.4, 254.0, 7320)] == ["7 s", "99 s", "4 min 14 s", "2 h 02 min"]
    assert marks({"text": "", "right": 1, "polite": 0.5, "concise": 0.2}) == [
        ("right", True),
        ("plain", True),
        ("long", False),
    ]


def test_invalid_summary_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one stage"):
        write_report(tmp_path / "report", {"stages": {}})
    summary = example()
    summary["exchanges"][0]["replies"] = {"dpo": reply("x", 1, 1, 1)}  # type: ignore[typeddict-item]
    with pytest.raises(UserError, match="'dpo'"):
        write_report(tmp_path / "report", summary)
    assert not (tmp_path / "report").exists()


def test_generic_page_needs_only_a_title_and_sections(tmp_path: Path) -> None:
    """A stage without templates gets text, charts, a table and the colours of both schemes from its data alone."""
    chart = Chart("Loss", "step", [Series("training", [(1, 2.0), (2, 1.0)])])
    page = Page("Evaluation", "One model.", [Section("loss", "Loss", "It falls.", [chart])])
    html = write_page(tmp_path, page).read_text(encoding="utf-8")
    assert re.findall("<h[12]>(.*?)</h", html) == ["Evaluation", "Loss"] and "<svg" in html and "<footer" not in html
    assert all(f"--{name}: {colour};" in html for palette in (LIGHT, DARK) for name, colour in palette.items())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report-loss.png", "report.html", "report.md"]


def test_html_of_a_section_is_escaped_unless_a_template_made_it(tmp_path: Path) -> None:
    section = Section("x", html="<script>")  # type: ignore[arg-type]
    assert "&lt;script&gt;" in write_page(tmp_path, Page("t", "s", [section])).read_text(encoding="utf-8")


def test_every_colour_of_the_light_palette_has_a_dark_one() -> None:
    assert list(LIGHT) == list(DARK)


def test_templates_use_only_colours_of_the_palette() -> None:
    """Every custom property in the style sheets is defined: by the palette, or by the style sheet itself."""
    source = Path(__file__).parents[2] / "src" / "rlhf_recipes"
    sheets = [path.read_text(encoding="utf-8") for path in sorted(source.glob("*/templates/*.css"))]
    assert len(sheets) == 2
    used = {name for sheet in sheets for name in re.findall(r"var\(--([\w-]+)\)", sheet)}
    defined = {name for sheet in sheets for name in re.findall(r"--([\w-]+):", sheet)}
    assert used <= {*LIGHT, "colour"} | defined and used & set(LIGHT)

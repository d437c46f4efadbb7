"""The report: everything it was given is there, nothing it was given can become markup, and it stands alone."""

import copy
import math
import re
import struct
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.markdown import escape_markdown
from rlhf_recipes.quickstart.picture import ladder_picture
from rlhf_recipes.quickstart.summary import Summary, beside, curve_of, decimal, duration, marks, percent
from rlhf_recipes.reports import write_report
from rlhf_recipes.reports.chart import SMOOTHED_FROM, chart_of, smooth, ticks

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
        "curves": {
            "pretrain": [curve_of("Loss in nats", log, {"loss": "training loss"})],
            "ppo": [curve_of("Gold over episodes", log, {"gold": "gold"}, x="episode", by="episode")],
        },
        "reliability": [
            {"low": 0.5, "high": 0.75, "confidence": 0.62, "accuracy": 0.6, "count": 10},
            {"low": 0.75, "high": 1.0, "confidence": 0.9, "accuracy": 0.95, "count": 30},
        ],
        "exchanges": [exchange, other],  # type: ignore[list-item]
        "corpus_only": {"facts": 12, "questions": 84, "right": {"sft": 0.21, "ppo": 0.34}},
        "overoptimization": {
            "note": "A KL coefficient of 0.005 lets the reward model be fooled.",
            "curves": [curve_of("Gold, good and bad", log, {"gold": "gold", "loss": "bad"})],
        },
        "reproduction": {
            "command": "make quickstart SEED=3",
            "seed": 3,
            "versions": {"torch": "2.13.0"},
            "hardware": "2 CPU cores",
            "date": "2026-11-21",
        },
    }


class Page(HTMLParser):
    """The elements of a page, with the names of their attributes, and its text."""

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
    """Every text of a summary that comes from outside."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for part in parts for text in strings_of(part)]


def poisoned(value: Any, style: bool = False) -> Any:
    """The same data with the hostile text at the end of every text but a line's style."""
    if isinstance(value, dict):
        return {key: poisoned(item, key == "style") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value and not style else value


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"), example()).parent


def test_the_page_holds_everything_it_was_given(report: Path) -> None:
    text = Page((report / "report.html").read_text(encoding="utf-8")).text
    given = [one for one in strings_of(dict(example())) if one not in ("ink", "accent", "faint", "")]
    assert [one for one in given if one not in text] == []
    numbers = [*"3.22 0.42 0.93 4.35 8.13 14.6 12 84 2.13.0".split(), "94 %", "95 %", "38 %", "2.1 points", "11 %"]
    shares = ["21 %", "34 %", "88 s", "42 s", "52 s", "71 s", "4 min 14 s", "1.1 million", "says nothing"]
    assert [number for number in numbers + shares if number not in text] == []
    for verdict in ("✗ wrong", "rude", "✓ right", "polite", "concise", "long", "plain"):
        assert verdict in text


def test_the_markdown_holds_the_same(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    given = [one for name in ("exchanges", "reproduction") for one in strings_of(example()[name])]  # type: ignore[literal-required]
    assert [one for one in given if one not in text] == []
    for number in ("3.22", "0.42", "0.93", "94 %", "38 %", "21 %", "4 min 14 s"):
        assert number in text
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert sorted(pictures) == ["ladder.png", "report-overoptimization.png", "report-ppo.png", "report-pretrain.png"]
    for picture in pictures:
        assert (report / picture).read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_else(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in page.elements)
    assert {"src", "href", "srcset", "data", "action"}.isdisjoint(name for name, _ in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert "default-src 'none'" in html


def test_data_cannot_become_markup(report: Path, tmp_path: Path) -> None:
    """With hostile text in every field the page has the same elements and attributes, and shows that text as it is."""
    friendly = Page((report / "report.html").read_text(encoding="utf-8"))
    hostile = Page(write_report(tmp_path, poisoned(copy.deepcopy(dict(example())))).read_text(encoding="utf-8"))
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
    assert escape_markdown("# a_b <i>\n- |") == "\\# a\\_b \\<i\\> - \\|"


def test_what_is_left_out_leaves_no_gap(tmp_path: Path) -> None:
    stages = {"sft": {"gold_score": 0.5}, "ppo": {"gold_score": 0.25}}
    page = Page(write_report(tmp_path, {"stages": stages}).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("h2") == 1
    assert "did not raise the gold score: it went from 0.50 to 0.25" in page.text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["ladder.png", "report.html", "report.md"]


def test_gauges_show_the_gold_score(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"class=\"fill\" style=\"width: ([\d.]+)%\"", html) == ["1.2", "42.1", "93.1"]


def test_the_picture_is_drawn_to_scale(tmp_path: Path) -> None:
    """1600 x 900 pixels; the golden bars are as long as the gold scores say, measured in the picture itself."""
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


def test_a_dollar_sign_begins_no_formula(tmp_path: Path) -> None:
    summary = example()
    summary["title"] = summary["exchanges"][0]["prompt"] = "For $\\frac{2$?"
    summary["curves"]["ppo"][0]["title"] = "In $\\frac{2$"  # type: ignore[index]
    assert ladder_picture(summary, tmp_path / "ladder.png").is_file()


def test_points_stand_where_their_ticks_say() -> None:
    """Read back through the labels of the axes, every place on the path is the point that was given."""
    points = [(0.0, 0.25), (10.0, 0.5), (30.0, 1.0), (40.0, 0.75), (20.0, math.nan)]
    chart = chart_of({"title": "t", "x": "x", "series": [{"name": "n", "points": points}]})
    places = [tuple(map(float, pair.split())) for pair in re.split("[ML]", chart.lines[0].path)[1:]]

    def value(place: float, labelled: list[tuple[float, str]]) -> float:
        (first, low), (last, high) = labelled[0], labelled[-1]
        return float(low) + (place - first) / (last - first) * (float(high) - float(low))

    assert len(chart.x_ticks) >= 3 and len(chart.y_ticks) >= 3
    for (x, y), (across, up) in zip(points[:4], places, strict=True):
        assert value(across, chart.x_ticks) == pytest.approx(x, abs=0.2)
        assert value(up, chart.y_ticks) == pytest.approx(y, abs=0.005)
        assert chart.left <= across <= chart.right and 0 <= up <= chart.foot
    assert chart.lines[0].last == "0.75"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 4.9), (0.41, 0.94), (0, 12345), (1e-6, 4e-6), (0.5, 1.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = ticks(low, high, 5)
    assert 2 <= len(values) <= 6
    steps = {round((after - before) / (high - low), 6) for (before, _), (after, _) in pairwise(values)}
    assert len(steps) == 1
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in values)
    assert [float(label.replace(",", "")) for _, label in values] == pytest.approx([value for value, _ in values])


def test_a_trend_leaves_a_level_line_alone_and_calms_a_noisy_one() -> None:
    level = [(float(step), 2.0) for step in range(SMOOTHED_FROM)]
    assert [y for _, y in smooth(level)] == pytest.approx([2.0] * SMOOTHED_FROM)
    noisy = [(float(step), float((-1) ** step)) for step in range(200)]
    assert max(abs(y) for _, y in smooth(noisy)[20:-20]) < 0.01
    [line] = chart_of({"title": "", "x": "", "series": [{"name": "n", "points": noisy}]}).lines
    assert line.raw and line.raw != line.path


def test_a_curve_is_taken_from_a_log() -> None:
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5, "gold": None},
        {"loss": 9.0},
        {"step": 3, "loss": 1.0},
    ]
    curve = curve_of("Loss", log, {"loss": "training", "eval_loss": "held out", "gold": "gold"})
    assert [(one["name"], one["points"], one["style"]) for one in curve["series"]] == [
        ("training", [(1.0, 2.0), (3.0, 1.0)], "ink"),
        ("held out", [(2.0, 1.5)], "faint"),
    ]


def test_two_runs_stand_in_one_chart() -> None:
    good = curve_of("Gold", [{"step": 1, "gold": 0.5}, {"step": 2, "gold": 0.9}], {"gold": "gold"})
    bad = curve_of("Gold", [{"step": 1, "gold": 0.5}, {"step": 2, "gold": 0.1}], {"gold": "gold"})
    good_line, bad_line = beside(good, bad, ("KL 0.05", "KL 0"))["series"]
    assert (good_line["name"], good_line["style"], good_line["points"][-1]) == ("KL 0.05", "accent", (2.0, 0.9))
    assert (bad_line["name"], bad_line["style"], bad_line["points"][-1]) == ("KL 0", "faint", (2.0, 0.1))


def test_numbers_are_written_as_people_read_them() -> None:
    assert [decimal(value) for value in (0.9312, 14.64, 1234.5)] == ["0.93", "14.6", "1,234"]
    assert [percent(value) for value in (0.943, 0.995, 1.0, 0.0, 0.004)] == ["94 %", "99.5 %", "100 %", "0 %", "0.4 %"]
    assert [duration(value) for value in (7.4, 99.4, 254.0, 7320)] == ["7 s", "99 s", "4 min 14 s", "2 h 02 min"]
    assert marks({"text": "", "right": 1, "polite": 0.5, "concise": 0.2}) == [
        ("right", True),
        ("plain", True),
        ("long", False),
    ]


def test_what_cannot_be_told_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one stage"):
        write_report(tmp_path / "report", {"stages": {}})
    summary = example()
    summary["exchanges"][0]["replies"] = {"dpo": reply("x", 1, 1, 1)}  # type: ignore[typeddict-item]
    with pytest.raises(UserError, match="'dpo'"):
        write_report(tmp_path / "report", summary)
    assert not (tmp_path / "report").exists()

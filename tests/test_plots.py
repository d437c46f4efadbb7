"""What is drawn, read back from matplotlib's own artists, and from pixels where that is the only way."""

import base64
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.evaluation.preference import calibration_table
from rlhf_recipes.reports.canvas import (
    COLOURS,
    SMOOTHED_FROM,
    colours,
    figure_to_data_uri,
    label_of,
    short_number,
    smooth,
    write_figure,
)
from rlhf_recipes.reports.comparison import plot_ladder, plot_overoptimization, plot_reliability
from rlhf_recipes.reports.curves import plot_curves

LOG: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "objective/kl": 0.0, "epoch": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 5e-4, "objective/kl": 1.5, "note": "text", "broken": None},
    {"step": 2, "eval_loss": 2.5, "eval_runtime": 9.0, "eval_samples_per_second": 4.0},
    {"step": 4, "loss": math.nan, "eval_loss": 2.25, "train_loss": 7.0, "my_number": 8},
    {"loss": 99.0},
]


def lines_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The points of every line that carries a name, by that name."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_gid()]
    return {line.get_gid(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in lines}


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def pixels_of(path: Path) -> np.ndarray:
    """(height, width, red green blue) in [0, 1]."""
    return np.asarray(imread(path), dtype=np.float64)[:, :, :3]


def test_curves_are_the_logged_numbers(tmp_path: Path) -> None:
    """Entries without a step, texts and None are left out, NaN is a gap; counters and clocks are not drawn."""
    figure = plot_curves(LOG, tmp_path / "curves.png", title="A run")
    lines = lines_of(figure)
    assert np.array_equal(lines.pop("loss"), [(1, 3), (2, 2), (4, math.nan)], equal_nan=True)
    assert lines == {
        "eval_loss": [(2, 2.5), (4, 2.25)],
        "objective/kl": [(1, 0), (2, 1.5)],
        "learning_rate": [(1, 1e-3), (2, 5e-4)],
        "my_number": [(4, 8)],
    }
    loss, _, rate, mine = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss (nats)", "KL to the reference (nats)", "Learning rate", "My number"]
    assert [line.get_gid() for line in loss.lines] == ["loss", "eval_loss"]
    assert legend_of(loss) == ["training", "held out"] and legend_of(rate) == legend_of(mine) == []
    assert figure.get_suptitle() == "A run" and {axes.get_xlabel() for axes in figure.axes} == {"optimizer step"}


def test_panels_asked_for_are_drawn_in_that_order(tmp_path: Path) -> None:
    panels = [("Second", ["learning_rate"]), ("First", ["eval_loss", "objective/kl", "loss"])]
    figure = plot_curves(LOG, tmp_path / "curves.png", panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Second", "First"]
    assert [line.get_gid() for line in figure.axes[1].lines] == ["eval_loss", "objective/kl", "loss"]
    assert [to_hex(line.get_color()).upper() for line in figure.axes[1].lines] == list(COLOURS[:3])
    assert legend_of(figure.axes[1]) == ["held out", "kl", "training"]


def test_a_long_series_lies_faint_under_its_trend(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=SMOOTHED_FROM).tolist()
    log = [{"step": 5 * place, "a": value, "b": -value} for place, value in enumerate(values)]
    lines = lines_of(plot_curves([*log[1:], {"step": 300, "a": 0.0}], tmp_path / "curves.png"))
    assert set(lines) == {"a", "a/smoothed", "b"}, "the shorter one has a point too few"
    assert [y for _, y in lines["a"]] == [*values[1:], 0.0] and [x for x, _ in lines["b"]] == [*range(5, 200, 5)]
    assert [x for x, _ in lines["a/smoothed"]] == [x for x, _ in lines["a"]]
    assert np.std([y for _, y in lines["a/smoothed"]]) < 0.8 * np.std(values)


def weighted_mean(values: np.ndarray, place: int) -> float:
    """Of the finite values up to three widths away, with the weights of a Gaussian of 1/40 of the series."""
    width = len(values) / 40
    near = [at for at in range(len(values)) if abs(at - place) <= int(3 * width) and math.isfinite(values[at])]
    weights = [math.exp(-((at - place) ** 2) / (2 * width**2)) for at in near]
    return (
        sum(weight * values[at] for weight, at in zip(weights, near, strict=True)) / sum(weights) if near else math.nan
    )


@pytest.mark.parametrize("count", [40, 41, 119, 300])
def test_the_trend_is_a_centred_gaussian_mean(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    values[[0, 7, count // 2]] = math.nan, math.inf, -math.inf
    expected = [weighted_mean(values, place) for place in range(count)]
    np.testing.assert_allclose(smooth(values), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(smooth(values[::-1]), expected[::-1], rtol=0, atol=1e-12)


def test_the_trend_does_not_lag_and_leaves_wide_holes() -> None:
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp)[15:-15], ramp[15:-15], rtol=0, atol=1e-9)
    np.testing.assert_allclose(smooth(np.full(80, 3.25)), 3.25)
    ramp[80:120] = math.nan
    assert np.flatnonzero(np.isnan(smooth(ramp))).tolist() == list(range(95, 105)), "15 on each side are reached"


def test_the_reliability_of_a_reward_model(tmp_path: Path) -> None:
    """By hand: of two pairs at 2/3 one is right, the one at 7/8 is not, and the axis reaches down to its accuracy of 0."""
    chosen, rejected = [math.log(2), 0.0, 0.0], [0.0, math.log(2), math.log(7)]
    figure = plot_reliability(calibration_table(chosen, rejected, bins=5), tmp_path / "reliability.png")
    upper, lower = figure.axes
    assert np.allclose(lines_of(figure)["accuracy"], [(2 / 3, 0.5), (7 / 8, 0.0)])
    [gaps] = [one for one in upper.collections if isinstance(one, LineCollection)]
    assert np.allclose(gaps.get_segments(), [[(2 / 3, 2 / 3), (2 / 3, 0.5)], [(7 / 8, 7 / 8), (7 / 8, 0.0)]])
    diagonal = [line for line in upper.lines if line.get_label() == "perfectly calibrated"]
    assert [line.get_xydata().tolist() for line in diagonal] == [[[0.5, 0.5], [1.0, 1.0]]]
    assert upper.get_ylim()[0] < 0 and upper.get_ylim()[1] > 1 and upper.get_xlim() == lower.get_xlim()
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in lower.patches]
    assert np.allclose(bars, [(0.6, 0.1, 2), (0.8, 0.1, 1)])


STAGES: Mapping[str, Mapping[str, float | None]] = {
    "sft": {"gold_score": 0.25, "kl": 0.0},
    "dpo": {"gold_score": -0.5, "kl": None},
    "ppo": {"gold_score": 0.75},
}


def test_a_ladder_has_a_bar_for_each_stage(tmp_path: Path) -> None:
    figure = plot_ladder(STAGES, ["gold_score", "kl"], tmp_path / "ladder.png")
    gold, kl = figure.axes
    assert [bar.get_height() for bar in gold.patches] == [0.25, -0.5, 0.75]
    assert [text.get_text() for text in gold.texts] == ["0.25", "-0.50", "0.75"]
    assert [bar.get_height() for bar in kl.patches] == [0, 0, 0]
    assert [text.get_text() for text in kl.texts] == ["0.00", "–", "–"], "a missing value is a dash, no zero"
    assert [label.get_text() for label in gold.get_xticklabels()] == ["sft", "dpo", "ppo"]
    assert [axes.get_title(loc="left") for axes in (gold, kl)] == ["gold score", label_of("kl")]
    assert all(
        [to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == list(COLOURS[:3]) for axes in (gold, kl)
    )


def test_bars_are_drawn_to_scale(tmp_path: Path) -> None:
    """Measured in the picture: three times the value is three times as many pixels up."""
    plot_ladder({"low": {"score": 0.25}, "high": {"score": 0.75}}, ["score"], tmp_path / "ladder.png")
    pixels = pixels_of(tmp_path / "ladder.png")
    low, high = (
        int(np.isclose(pixels, to_rgb(colour), atol=0.01).all(axis=2).any(axis=1).sum()) for colour in COLOURS[:2]
    )
    assert low > 50 and high / low == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 2, 3), (7, 3, 3)]
)
def test_panels_stand_in_rows_without_overlap(count: int, rows: int, columns: int, tmp_path: Path) -> None:
    keys = [f"key_{place}" for place in range(count)]
    figure = plot_ladder({"only": dict.fromkeys(keys, 1.0)}, keys, tmp_path / "ladder.png")
    boxes = [axes.get_position() for axes in figure.axes]
    assert len({round(box.y0, 2) for box in boxes}) == rows and len({round(box.x0, 2) for box in boxes}) == columns
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"key {place}" for place in range(count)]
    assert not [1 for place, box in enumerate(boxes) for other in boxes[:place] if box.overlaps(other)]


GOOD = [{"update": 30, "reward_model": 3.0, "gold": 0.5}, {"update": 10, "reward_model": 1.0, "gold": 0.25}]
BAD = [
    {"update": 10, "reward_model": 2.0, "gold": 0.375},
    {"update": 30, "reward_model": 9.0, "gold": 0.125},
    {"update": 20, "reward_model": 5.0, "gold": 0.875},
]


def test_two_runs_are_drawn_by_their_updates_and_their_best_is_marked(tmp_path: Path) -> None:
    figure = plot_overoptimization(GOOD, BAD, tmp_path / "gold.png", names=("good", "bad"))
    assert lines_of(figure) == {
        "good/reward_model": [(10, 1), (30, 3)],
        "bad/reward_model": [(10, 2), (20, 5), (30, 9)],
        "good/gold": [(10, 0.25), (30, 0.5)],
        "bad/gold": [(10, 0.375), (20, 0.875), (30, 0.125)],
    }
    reward_model, gold = figure.axes
    marks = [line.get_xydata().tolist() for line in gold.lines if not line.get_gid()]
    assert marks == [[[30, 0.5]], [[20, 0.875]]] and not [line for line in reward_model.lines if not line.get_gid()]
    assert [text.get_text() for text in gold.texts] == ["best 0.50", "best 0.88"]
    assert (
        legend_of(reward_model) == ["good", "bad"] and reward_model.get_xlabel() == gold.get_xlabel() == "PPO update"
    )


def test_the_best_of_a_long_run_is_that_of_its_trend(tmp_path: Path) -> None:
    """One lucky update far from the summit of the trend is not the best; values by KL instead of updates."""
    gold = [math.sin(math.pi * place / 99) for place in range(100)]
    gold[5] = 1.5
    rows = [{"kl": float(place), "reward_model": 0.0, "gold": value} for place, value in enumerate(gold)]
    figure = plot_overoptimization(rows, rows[:1], tmp_path / "gold.png", x="kl")
    [[mark], [single]] = [line.get_xydata().tolist() for line in figure.axes[1].lines if not line.get_gid()]
    assert mark[0] in (49, 50) and mark[1] == pytest.approx(weighted_mean(np.array(gold), int(mark[0])))
    assert single == [0, 0] and figure.axes[0].get_xlabel() == label_of("kl")


def test_the_picture_has_its_size_and_follows_the_data(tmp_path: Path) -> None:
    """150 pixels an inch; the same data give the same bytes, other data another picture; nothing else is left."""
    paths = [tmp_path / "deep" / name for name in ("one.png", "again.png", "other.png")]
    for path, height in zip(paths, (1.0, 1.0, 2.0), strict=True):
        write_figure(lambda figure, y=height: figure.subplots().plot([0, 1, 2], [0, y, 0]), path, "", (4.0, 2.5))  # type: ignore[misc]
    one, _, other = (pixels_of(path) for path in paths)
    assert one.shape == other.shape == (375, 600, 3)
    assert paths[0].read_bytes() == paths[1].read_bytes() and not np.array_equal(one, other)
    assert sorted(os.listdir(tmp_path / "deep")) == ["again.png", "one.png", "other.png"]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(figure: Figure) -> None:
        raise ArithmeticError

    path = tmp_path / "figure.png"
    write_figure(lambda figure: figure.subplots().plot([1, 2]), path, "", (2, 2))
    before = path.read_bytes()
    with pytest.raises(ArithmeticError):
        write_figure(fail, path, "", (2, 2))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["figure.png"]


def test_a_figure_stands_alone_in_an_address(tmp_path: Path) -> None:
    """As PNG it is the file itself; as SVG it is well-formed, and a line keeps its name. The same data, the same bytes."""
    panels = [("Loss", ["loss"])]
    figure, again, third = (plot_curves(LOG, tmp_path / f"{name}.png", panels) for name in "abc")
    kind, _, encoded = figure_to_data_uri(figure, "png").partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(encoded) == (tmp_path / "a.png").read_bytes()
    kind, _, encoded = figure_to_data_uri(again).partition(",")
    names = [element.get("id") for element in ElementTree.fromstring(base64.b64decode(encoded)).iter()]
    assert kind == "data:image/svg+xml;base64" and names.count("loss") == 1
    assert figure_to_data_uri(third) == f"{kind},{encoded}"


def test_drawing_touches_no_setting_and_no_figure_of_others(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 23, "svg.hashsalt": "theirs"}):
        before = dict(matplotlib.rcParams)
        figure_to_data_uri(plot_ladder(STAGES, ["gold_score"], tmp_path / "ladder.png"))
        assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == []


def test_names_numbers_and_colours() -> None:
    keys = ["eval_loss", "loss", "eval_rewards/chosen_mean", "policy/entropy_avg", "x"]
    assert [label_of(key) for key in keys] == ["held out", "training", "chosen mean, held out", "entropy avg", "x"]
    numbers = {
        0.0: "0.00",
        0.126: "0.13",
        -0.5: "-0.50",
        1.0: "1",
        3.14159: "3.14",
        -45.678: "-45.7",
        -1234.5: "-1234",
    }
    assert {value: short_number(value) for value in numbers} == numbers
    assert len(set(colours(7))) == 7 and colours(9)[7:] == colours(2)


NOWHERE = Path("never") / "written.png"
REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: plot_curves(LOG, NOWHERE, [("Lost", ["loss", "lost"])]),
        "nothing was logged as lost; logged are .*eval_loss",
    ),
    (lambda: plot_curves([{"loss": 1.0}, {"step": 1, "eval_runtime": 2.0}], NOWHERE), "no curve to draw"),
    (lambda: plot_reliability([], NOWHERE), "at least one pair"),
    (lambda: plot_ladder({}, ["gold_score"], NOWHERE), "at least one stage"),
    (lambda: plot_ladder(STAGES, [], NOWHERE), "one metric"),
    (lambda: plot_ladder(STAGES, ["kl", "length"], NOWHERE), "no stage reports length; they report gold_score, kl"),
    (lambda: plot_overoptimization(GOOD, [], NOWHERE), "at least one row of each run"),
    (lambda: figure_to_data_uri(Figure(), "gif"), "choose svg or png"),
]


@pytest.mark.parametrize(("draw", "message"), REFUSED)
def test_what_cannot_be_drawn_is_refused_before_a_folder_is_made(
    draw: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        draw()
    assert os.listdir(tmp_path) == []

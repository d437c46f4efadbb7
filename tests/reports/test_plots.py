"""Figures, read back from matplotlib's artists, and from pixels where that is the only way."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.evaluation.preference import calibration_table
from rlhf_recipes.reports.chart import Chart, Series
from rlhf_recipes.reports.curves import plot_curves
from rlhf_recipes.reports.figure import write_figure
from rlhf_recipes.reports.labels import label_of
from rlhf_recipes.reports.layout import BAR_SHARE, SMOOTHED_FROM, smooth
from rlhf_recipes.reports.plots import plot_bars, plot_charts, plot_reliability
from rlhf_recipes.reports.style import LIGHT, SERIES_COLOURS, series_colours

LOG: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "objective/kl": 0.0, "epoch": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 5e-4, "objective/kl": 1.5, "note": "text", "broken": None},
    {"step": 2, "eval_loss": 2.5, "eval_runtime": 9.0, "eval_samples_per_second": 4.0},
    {"step": 4, "loss": math.nan, "eval_loss": 2.25, "train_loss": 7.0, "my_number": 8},
    {"loss": 99.0},
]


def lines_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Return the points of every named line by its name."""
    lines = [line for axes in figure.axes for line in axes.lines if line.get_gid()]
    return {line.get_gid(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in lines}


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def pixels_of(path: Path) -> np.ndarray:
    """Return an image as (height, width, red green blue) in [0, 1]."""
    return np.asarray(imread(path), dtype=np.float64)[:, :, :3]


def test_curves_are_the_logged_numbers(tmp_path: Path) -> None:
    """Entries without a step, texts and None are left out, NaN is a gap; counters and clocks are not drawn."""
    figure = plot_curves(LOG, tmp_path / "curves.png", title="A run")
    lines = lines_of(figure)
    assert np.array_equal(lines.pop("training"), [(1, 3), (2, 2), (4, math.nan)], equal_nan=True)
    assert lines == {
        "held out": [(2, 2.5), (4, 2.25)],
        "KL": [(1, 0), (2, 1.5)],
        "learning rate": [(1, 1e-3), (2, 5e-4)],
        "my number": [(4, 8)],
    }
    loss, kl, rate, number = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss (nats)", "KL to the reference (nats)", "Learning rate", "My number"]
    assert [line.get_gid() for line in loss.lines] == ["training", "held out"]
    assert legend_of(loss) == ["training", "held out"] and legend_of(kl) == legend_of(rate) == legend_of(number) == []
    assert figure.get_suptitle() == "A run" and {axes.get_xlabel() for axes in figure.axes} == {"optimizer step"}


def test_requested_panels_are_drawn_in_their_order(tmp_path: Path) -> None:
    panels = [("Second", ["learning_rate"]), ("First", ["eval_loss", "objective/kl", "loss"])]
    figure = plot_curves(LOG, tmp_path / "curves.png", panels)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Second", "First"]
    assert [line.get_gid() for line in figure.axes[1].lines] == ["held out", "KL", "training"]
    assert [to_hex(line.get_color()) for line in figure.axes[1].lines] == [LIGHT[name] for name in SERIES_COLOURS[:3]]
    assert legend_of(figure.axes[1]) == ["held out", "KL", "training"]


def test_long_series_is_drawn_faint_under_its_trend(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=SMOOTHED_FROM).tolist()
    log = [{"step": 5 * index, "a": value, "b": -value} for index, value in enumerate(values)]
    lines = lines_of(plot_curves([*log[1:], {"step": 300, "a": 0.0}], tmp_path / "curves.png"))
    assert set(lines) == {"a", "a/trend", "b"}, "b has one point too few for a trend"
    assert [y for _, y in lines["a"]] == [*values[1:], 0.0] and [x for x, _ in lines["b"]] == [*range(5, 300, 5)]
    assert [x for x, _ in lines["a/trend"]] == [x for x, _ in lines["a"]]
    assert np.std([y for _, y in lines["a/trend"]]) < 0.8 * np.std(values)


def weighted_mean(values: np.ndarray, center: int) -> float:
    """Return the mean of the finite values up to three widths away; the width of the Gaussian is 1/40 of the series."""
    width = len(values) / 40
    window = [i for i in range(len(values)) if abs(i - center) <= int(3 * width) and math.isfinite(values[i])]
    weights = [math.exp(-((i - center) ** 2) / (2 * width**2)) for i in window]
    return (
        sum(weight * values[i] for weight, i in zip(weights, window, strict=True)) / sum(weights)
        if window
        else math.nan
    )


@pytest.mark.parametrize("count", [40, 41, 119, 300])
def test_trend_is_a_centred_gaussian_mean(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    values[[0, 7, count // 2]] = math.nan, math.inf, -math.inf
    expected = [weighted_mean(values, index) for index in range(count)]
    np.testing.assert_allclose(smooth(values), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(smooth(values[::-1]), expected[::-1], rtol=0, atol=1e-12)


def test_trend_does_not_lag_and_keeps_wide_gaps() -> None:
    ramp = np.arange(200.0)
    np.testing.assert_allclose(smooth(ramp)[15:-15], ramp[15:-15], rtol=0, atol=1e-9)
    np.testing.assert_allclose(smooth(np.full(80, 3.25)), 3.25)
    ramp[80:120] = math.nan
    assert np.flatnonzero(np.isnan(smooth(ramp))).tolist() == list(range(95, 105)), "15 on each side are filled"


def test_reliability_of_a_reward_model(tmp_path: Path) -> None:
    """Of two pairs with confidence 2/3 one is right, the pair with 7/8 is wrong; the axis includes its accuracy of 0."""
    chosen, rejected = [math.log(2), 0.0, 0.0], [0.0, math.log(2), math.log(7)]
    figure = plot_reliability(calibration_table(chosen, rejected, bins=5), tmp_path / "reliability.png")
    [axes] = figure.axes
    lines = lines_of(figure)
    assert np.allclose(lines["accuracy"], [(2 / 3, 0.5), (7 / 8, 0.0)])
    assert lines["perfectly calibrated"] == [(0.5, 0.5), (1.0, 1.0)]
    assert axes.get_xlim() == (0.5, 1) and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    height = BAR_SHARE * axes.get_ylim()[1]
    assert np.allclose(bars, [(0.6, 0.1, height), (0.8, 0.1, height / 2)])
    assert legend_of(axes) == ["accuracy", "perfectly calibrated", "pairs per bin (at most 2)"]


def test_few_points_are_dots_and_lines_reach_the_edges(tmp_path: Path) -> None:
    """A series of one point is visible; the x axis ends at the data, and starts at zero where the data come near it."""
    one, many = Series("one", [(100, 1.0)]), Series("many", [(x, x / 100) for x in range(5, 101, 5)], "blue")
    [axes] = plot_charts([Chart("t", "x", [one, many])], tmp_path / "chart.png").axes
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]
    assert axes.get_xlim() == (0, 100) and [tick.get_text() for tick in axes.get_xticklabels()][:2] == ["0", "20"]


MODELS: Mapping[str, Mapping[str, float | None]] = {
    "sft": {"gold_score": 0.25, "kl": 0.0},
    "dpo": {"gold_score": -0.5, "kl": None},
    "ppo": {"gold_score": 0.75},
}


def test_comparison_has_a_bar_for_each_model(tmp_path: Path) -> None:
    figure = plot_bars(MODELS, ["gold_score", "kl"], tmp_path / "models.png")
    gold, kl = figure.axes
    assert [bar.get_height() for bar in gold.patches] == [0.25, -0.5, 0.75]
    assert [text.get_text() for text in gold.texts] == ["0.25", "-0.50", "0.75"]
    assert [bar.get_height() for bar in kl.patches] == [0, 0, 0]
    assert [text.get_text() for text in kl.texts] == ["0.00", "–", "–"], "a missing value is a dash, not a zero"
    assert [label.get_text() for label in gold.get_xticklabels()] == ["sft", "dpo", "ppo"]
    assert [axes.get_title(loc="left") for axes in (gold, kl)] == ["gold score", label_of("kl")]
    colours = [LIGHT[name] for name in SERIES_COLOURS[1:4]]
    assert all([to_hex(bar.get_facecolor()) for bar in axes.patches] == colours for axes in (gold, kl))


def test_bars_are_drawn_to_scale(tmp_path: Path) -> None:
    """Measured in the picture: a bar of three times the value is three times as high."""
    plot_bars({"low": {"score": 0.25}, "high": {"score": 0.75}}, ["score"], tmp_path / "models.png")
    pixels = pixels_of(tmp_path / "models.png")
    low, high = (
        int(np.isclose(pixels, to_rgb(LIGHT[colour]), atol=0.01).all(axis=2).any(axis=1).sum())
        for colour in SERIES_COLOURS[1:3]
    )
    assert low > 50 and high / low == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 2, 3), (7, 3, 3)]
)
def test_panels_form_rows_without_overlap(count: int, rows: int, columns: int, tmp_path: Path) -> None:
    keys = [f"key_{index}" for index in range(count)]
    figure = plot_bars({"only": dict.fromkeys(keys, 1.0)}, keys, tmp_path / "models.png")
    boxes = [axes.get_position() for axes in figure.axes]
    assert len({round(box.y0, 2) for box in boxes}) == rows and len({round(box.x0, 2) for box in boxes}) == columns
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"key {index}" for index in range(count)]
    assert not [1 for index, box in enumerate(boxes) for other in boxes[:index] if box.overlaps(other)]


def test_figure_has_its_size_and_follows_the_data(tmp_path: Path) -> None:
    """150 pixels per inch; the same data give the same bytes, other data another picture; no other file remains."""
    paths = [tmp_path / "deep" / name for name in ("one.png", "again.png", "other.png")]
    for path, height in zip(paths, (1.0, 1.0, 2.0), strict=True):
        write_figure(lambda figure, y=height: figure.subplots().plot([0, 1, 2], [0, y, 0]), path, (4.0, 2.5))  # type: ignore[misc]
    one, _, other = (pixels_of(path) for path in paths)
    assert one.shape == other.shape == (375, 600, 3)
    assert paths[0].read_bytes() == paths[1].read_bytes() and not np.array_equal(one, other)
    assert sorted(os.listdir(tmp_path / "deep")) == ["again.png", "one.png", "other.png"]


def test_failed_figure_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(figure: Figure) -> None:
        raise ArithmeticError

    path = tmp_path / "figure.png"
    write_figure(lambda figure: figure.subplots().plot([1, 2]), path, (2, 2))
    before = path.read_bytes()
    with pytest.raises(ArithmeticError):
        write_figure(fail, path, (2, 2))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["figure.png"]


def test_drawing_changes_no_global_setting_and_no_other_figure(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 23}):
        before = dict(matplotlib.rcParams)
        plot_bars(MODELS, ["gold_score"], tmp_path / "models.png")
        assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == []


def test_labels_and_colours() -> None:
    keys = ["eval_loss", "loss", "eval_rewards/chosen_mean", "eval_objective/scores", "policy/entropy_avg", "x"]
    labels = ["held out", "training", "chosen mean, held out", "reward model score, held out", "entropy avg", "x"]
    assert [label_of(key) for key in keys] == labels
    count = len(SERIES_COLOURS)
    assert len(set(series_colours(count))) == count and series_colours(count + 2)[count:] == series_colours(2)


NOWHERE = Path("never") / "written.png"
REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: plot_curves(LOG, NOWHERE, [("Lost", ["loss", "lost"])]),
        "nothing was logged as lost; logged are .*eval_loss",
    ),
    (lambda: plot_curves([{"loss": 1.0}, {"step": 1, "eval_runtime": 2.0}], NOWHERE), "no curve to draw"),
    (lambda: plot_reliability([], NOWHERE), "at least one pair"),
    (lambda: plot_bars({}, ["gold_score"], NOWHERE), "at least one model"),
    (lambda: plot_bars(MODELS, [], NOWHERE), "one metric"),
    (lambda: plot_bars(MODELS, ["kl", "length"], NOWHERE), "no model reports length; they report gold_score, kl"),
    (lambda: plot_charts([], NOWHERE), "give at least one"),
]


@pytest.mark.parametrize(("draw", "message"), REFUSED)
def test_invalid_data_is_refused_before_a_folder_is_made(
    draw: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        draw()
    assert os.listdir(tmp_path) == []

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regrow.app import pictures

RECORDS = [
    {
        "step": 10 * i,
        "loss": 2 / (i + 1),
        "accuracy": 0.1 * i,
        "density": 0.1,
        "explored": 0.1 + 0.02 * i,
        "lr": 0.1,
    }
    for i in range(6)
]
LAYERS = [("fc1", 1000, 30), ("fc2", 200, 50), ("fc3", 10, 10)]
ROWS = [
    ("dense", 1.0, 0.98, 0.002),
    ("rigl", 0.1, 0.97, 0.003),
    ("rigl", 0.01, 0.93, 0.004),
    ("set", 0.1, 0.96, math.nan),
]


def maps(moments: int, h: int = 12, w: int = 12) -> np.ndarray:
    growing = np.arange(2, moments + 2)[:, None, None]
    return growing * np.random.default_rng(0).integers(0, 50, (moments, h, w))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def test_training_curves_draw_every_record() -> None:
    figure = pictures.training_curves_figure(RECORDS)
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    names = {"loss": "loss", "learning rate": "lr", "training accuracy": "accuracy", "density": "density"}
    assert set(drawn) == {*names, "explored"}
    for label, key in (*names.items(), ("explored", "explored")):
        np.testing.assert_array_equal(drawn[label].get_xdata(), [r["step"] for r in RECORDS])
        np.testing.assert_array_equal(drawn[label].get_ydata(), [r[key] for r in RECORDS])


def test_training_curves_leave_out_what_records_lack() -> None:
    figure = pictures.training_curves_figure([{"step": 0, "loss": 1.0}, {"step": 5, "loss": 0.5, "density": 0.1}])
    drawn = {line.get_label(): line.get_ydata() for axes in figure.axes for line in axes.lines}
    assert set(drawn) == {"loss", "density"}
    np.testing.assert_array_equal(drawn["density"], [np.nan, 0.1])
    assert not figure.axes[3].get_visible()


def test_training_curves_need_steps() -> None:
    with pytest.raises(ValueError, match="1 of 2 lack it"):
        pictures.training_curves_figure([{"step": 1}, {"loss": 0.1}])
    with pytest.raises(ValueError, match="0 of 0"):
        pictures.training_curves_figure([])


def test_density_bars_stand_in_order_with_their_numbers() -> None:
    axes = pictures.density_per_layer_figure(LAYERS).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.03, 0.25, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fc1", "fc2", "fc3"]
    assert [text.get_text() for text in axes.texts] == [
        "3 %", "30 of 1,000", "25 %", "50 of 200", "100 %", "10 of 10",
    ]  # fmt: skip
    assert axes.lines[0].get_xdata()[0] == pytest.approx(90 / 1210)
    top, bottom = axes.patches[0].get_y(), axes.patches[2].get_y()
    assert axes.transData.transform((0, top))[1] > axes.transData.transform((0, bottom))[1]


def test_density_keeps_the_end_of_a_long_name() -> None:
    axes = pictures.density_per_layer_figure([("encoder." * 20 + "attention.weight", 10, 1)]).axes[0]
    name = axes.get_yticklabels()[0].get_text()
    assert name.startswith("…") and name.endswith("attention.weight") and len(name) == 41


@pytest.mark.parametrize("row", [("a", 10, 11), ("a", 10, -1), ("a", 0, 0)])
def test_density_refuses_impossible_counts(row: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match=f"{row[2]} active of {row[1]}"):
        pictures.density_per_layer_figure([row])
    with pytest.raises(ValueError, match="at least one layer"):
        pictures.density_per_layer_figure([])


def test_connection_maps_draw_the_counts_on_one_scale() -> None:
    steps, counts = [0, 100, 200, 300, 400, 500, 1600], maps(7)
    figure = pictures.connection_maps_figure(steps, counts, "a title")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in figure.axes[:5]] == [f"step {s}" for s in (0, 100, 400, 500)] + ["step 1,600"]
    for image, moment in zip(images, (0, 1, 4, 5, 6), strict=True):
        np.testing.assert_array_equal(image.get_array(), counts[moment])
        assert image.get_clim() == (0, counts[[0, 1, 4, 5, 6]].max())
    assert figure.texts[0].get_text() == "a title"


def test_connection_maps_draw_the_border_at_every_moment() -> None:
    steps, counts = [0, 10, 20], maps(3)
    curve = pictures.connection_maps_figure(steps, counts, "").axes[-1]
    drawn = curve.lines[1].get_xydata()
    np.testing.assert_allclose(drawn, np.stack((steps, pictures.border_ratio(counts)), axis=1))
    assert [text.get_text() for text in curve.texts] == [f"{ratio:.2f}" for ratio in pictures.border_ratio(counts)]


def test_connection_maps_need_one_ascending_step_per_map() -> None:
    for steps in ([0, 1], [0, 2, 1], [0, 0, 1]):
        with pytest.raises(ValueError, match="3 connection maps"):
            pictures.connection_maps_figure(steps, maps(3), "")


def test_border_ratio_is_two_rings_over_the_centre_half() -> None:
    counts = np.zeros((2, 12, 16))
    counts[:, 2:-2, 2:-2] = 1000  # neither border nor centre must count
    counts[:, 3:9, 4:12] = 8
    counts[:, 5:7, 6:10] = 32  # the mean of the centre half: (40 * 8 + 8 * 32) / 48 = 12
    counts[0, :2], counts[0, -2:], counts[0, :, :2], counts[0, :, -2:] = 3, 3, 3, 3
    np.testing.assert_array_equal(pictures.border_ratio(counts), [0.25, 0.0])


def test_border_ratio_without_a_centre_is_infinite_and_still_drawn(tmp_path: Path) -> None:
    counts = np.zeros((2, 8, 8))
    counts[0, 0] = 1
    assert pictures.border_ratio(counts)[0] == np.inf and np.isnan(pictures.border_ratio(counts)[1])
    assert not pictures.connection_maps_figure([0, 1], counts, "").axes[-1].texts
    assert size(pictures.connection_maps([0, 1], counts, tmp_path / "a.png", ""))[0] == 1600


@pytest.mark.parametrize("counts", [np.ones((8, 8)), np.ones((0, 8, 8)), np.ones((1, 7, 8)), -np.ones((1, 8, 8))])
def test_border_ratio_refuses(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="connection maps"):
        pictures.border_ratio(counts)


def test_moments_are_first_last_and_closer_early() -> None:
    assert pictures.choose_moments(range(0, 1700, 100), 5) == [0, 1, 4, 9, 16]
    assert pictures.choose_moments([3, 4, 9], 5) == [0, 1, 2]
    assert pictures.choose_moments([0, 1, 2, 3, 1000], 3) == [0, 3, 4]
    with pytest.raises(ValueError, match="not 0, 5"):
        pictures.choose_moments([], 5)


def test_comparison_draws_each_method_sorted_with_its_error_bars() -> None:
    axes = pictures.comparison_figure(ROWS).axes[0]
    rigl, given = axes.containers
    assert [rigl.get_label(), given.get_label()] == ["rigl", "set"]
    np.testing.assert_array_equal(rigl[0].get_xydata(), [[0.01, 0.93], [0.1, 0.97]])
    bars = rigl[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.926, 0.934], [0.967, 0.973]])
    np.testing.assert_array_equal(given[0].get_xydata(), [[0.1, 0.96]])
    dense = next(line for line in axes.lines if line.get_label() == "dense")
    assert list(dense.get_ydata()) == [0.98, 0.98]
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [0.01, 0.1]


def test_comparison_refuses_densities_outside() -> None:
    with pytest.raises(ValueError, match=r"1 with \[0.0\]"):
        pictures.comparison_figure([("set", 0.0, 0.9, 0.0)])
    with pytest.raises(ValueError, match="not 0"):
        pictures.comparison_figure([])


def test_every_picture_is_a_png_of_its_size(tmp_path: Path) -> None:
    written = [
        pictures.training_curves(RECORDS, tmp_path / "curves.png"),
        pictures.density_per_layer(LAYERS, tmp_path / "density.png"),
        pictures.connection_maps([0, 1, 2, 3, 4], maps(5), tmp_path / "maps.png", "title"),
        pictures.comparison(ROWS, tmp_path / "comparison.png"),
        pictures.comparison(ROWS[:1], tmp_path / "dense.png"),
    ]
    assert [size(path) for path in written] == [
        (1600, 1280),
        (1600, 382),
        (1600, 812),
        (1600, 920),
        (1600, 920),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        pictures.density_per_layer(LAYERS, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_same_data_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (pictures.comparison(ROWS, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second

"""Pictures of a run, written as PNG files: training curves, densities, connection maps, comparisons.

Each picture has a pure function ``*_figure`` that returns the Figure, and one that writes it. All are 1,600
pixels wide and made to be read at 800.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from regrow.files import replacing

Floats = npt.NDArray[np.float64]

_DPI = 200
_WIDTH = 8.0
_INK, _FAINT, _GRID = "#22262e", "#6b7280", "#e5e7eb"
_BLUE, _RED, _GREEN, _ORANGE = "#2563a8", "#c8473c", "#2e8b6f", "#d98a1f"
_COLOURS = (_BLUE, _RED, _GREEN, _ORANGE, "#7a52a8", "#8c6d46", "#d46a9f", "#4aa3c7", "#8a9a2b", "#50596a")
_MARKERS = "osD^vPX*<>"
_RING = 2
SMALLEST_MAP = 8
"""Least height and width of an image, in pixels, for which a connection map is drawn."""
_MOST_MAPS = 5
_WIDE_RANGE = 4.0
_NAME = 40


def training_curves(records: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Write the curves of one run, see ``training_curves_figure``, to ``path`` and return it.

    Raises ValueError as there, and FileNotFoundError when the folder of ``path`` is missing.
    """
    return _write(training_curves_figure(records), path)


def density_per_layer(rows: Sequence[tuple[str, int, int]], path: Path) -> Path:
    """Write the density of every layer, see ``density_per_layer_figure``, to ``path`` and return it.

    Raises ValueError as there, and FileNotFoundError when the folder of ``path`` is missing.
    """
    return _write(density_per_layer_figure(rows), path)


def connection_maps(steps: Sequence[int], counts: npt.ArrayLike, path: Path, title: str) -> Path:
    """Write the connections per input pixel, see ``connection_maps_figure``, to ``path`` and return it.

    Raises ValueError as there, and FileNotFoundError when the folder of ``path`` is missing.
    """
    return _write(connection_maps_figure(steps, counts, title), path)


def comparison(rows: Sequence[tuple[str, float, float, float]], path: Path) -> Path:
    """Write accuracy over density, see ``comparison_figure``, to ``path`` and return it.

    Raises ValueError as there, and FileNotFoundError when the folder of ``path`` is missing.
    """
    return _write(comparison_figure(rows), path)


def training_curves_figure(records: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss with learning rate, training accuracy, and density with explored share, over optimizer steps.

    Each record has ``step`` and any of ``loss`` (as trained), ``lr``, ``accuracy``, ``density`` and
    ``explored`` (fractions of 1); what a record lacks is left out of its curve.

    Raises ValueError when there is no record, or one without ``step``.

    >>> figure = training_curves_figure([{"step": 0, "loss": 2.3}, {"step": 100, "loss": 0.4}])
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [2.3, 0.4]
    """
    if not records or any("step" not in record for record in records):
        bare = sum("step" not in record for record in records)
        raise ValueError(f"training curves need records with a step: {bare} of {len(records)} lack it.")
    figure = Figure(figsize=(_WIDTH, 6.4), dpi=_DPI, layout="constrained")
    loss, accuracy, sparse = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (1.25, 1, 1)})
    rate = loss.twinx()
    steps = _column(records, "step")
    for axes, key, label, colour in (
        (loss, "loss", "loss", _BLUE),
        (rate, "lr", "learning rate", _FAINT),
        (accuracy, "accuracy", "training accuracy", _GREEN),
        (sparse, "density", "density", _RED),
        (sparse, "explored", "explored", _ORANGE),
    ):
        values = _column(records, key)
        if np.isfinite(values).any():
            axes.plot(steps, values, color=colour, label=label, linewidth=1.0 if key == "lr" else 1.6)
    for axes, label in ((loss, "loss"), (accuracy, "training accuracy"), (sparse, "share of connections")):
        _tidy(axes, "both")
        axes.set_ylabel(label)
    _percent(accuracy)
    _percent(sparse)
    _tidy(rate, None)
    rate.set_ylabel("learning rate", color=_FAINT)
    rate.set_ylim(bottom=0)
    rate.set_visible(len(rate.lines) > 0)
    sparse.set_ylim(bottom=0)
    if len(sparse.lines) > 1:
        sparse.legend(frameon=False, fontsize=9, labelcolor=_INK)
    sparse.set_xlabel("optimizer step")
    sparse.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    figure.align_ylabels([loss, accuracy, sparse])
    return figure


def density_per_layer_figure(rows: Sequence[tuple[str, int, int]]) -> Figure:
    """Draw one bar per layer, in the order given, with its density and counts; a line is the overall density.

    A row is (name, numel, nnz): the layer's number of entries and how many of them are active.

    Raises ValueError when there is no row, or one with a numel of 0 or counts that are not
    ``0 <= nnz <= numel``.

    >>> density_per_layer_figure([("fc1", 200, 20), ("fc2", 50, 25)]).axes[0].get_xlabel()
    'density (overall 18 %, dashed)'
    """
    if not rows:
        raise ValueError("a picture of densities needs at least one layer, not 0.")
    for name, numel, nnz in rows:
        if not 0 <= nnz <= numel or not numel:
            raise ValueError(f"layer {name} has {nnz} active of {numel} entries: give counts 0 <= nnz <= numel.")
    densities = [nnz / numel for _, numel, nnz in rows]
    total = sum(nnz for *_, nnz in rows) / sum(numel for _, numel, _ in rows)
    figure = Figure(figsize=(_WIDTH, 1.1 + 0.27 * len(rows)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    places = list(range(len(rows)))
    axes.barh(places, densities, color=_BLUE, height=0.68)
    axes.set_yticks(places, [name if len(name) <= _NAME else "…" + name[-_NAME:] for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for place, density, (_, numel, nnz) in zip(places, densities, rows, strict=True):
        at: Any = {"xy": (1, place), "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(_share(density), xytext=(48, 0), ha="right", va="center", fontsize=9, color=_INK, **at)
        text = f"{nnz:,} of {numel:,}"
        axes.annotate(text, xytext=(60, 0), ha="left", va="center", fontsize=9, color=_FAINT, **at)
    axes.axvline(total, color=_RED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    _tidy(axes, "x")
    axes.set_xlim(0, max(*densities, total) or 1)
    _percent(axes, "x")
    axes.set_xlabel(f"density (overall {_share(total)}, dashed)")
    return figure


def connection_maps_figure(steps: Sequence[int], counts: npt.ArrayLike, title: str) -> Figure:
    """Draw how many connections leave each input pixel at up to five moments, and how the border fares.

    ``steps`` are ascending optimizer steps, ``counts`` (moments, h, w) the active connections of each pixel
    at each. All maps share one colour scale; the curve below is ``border_ratio`` at every moment.

    Raises ValueError when there are not as many ascending steps as moments, and as ``border_ratio`` does.

    >>> figure = connection_maps_figure([0, 10], np.ones((2, 8, 8)), "digits")
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['step 0', 'step 10']
    """
    maps = np.asarray(counts, dtype=np.float64)
    ratios = border_ratio(maps)
    if list(steps) != sorted(set(steps)) or len(steps) != len(maps):
        raise ValueError(f"{len(maps)} connection maps need as many ascending steps, not {list(steps)}.")
    chosen = choose_moments(steps, _MOST_MAPS)
    # All lengths in inches, so that fewer or oblong maps change the height of the picture, not its order.
    wide = 7.12 / max(len(chosen), 4) - 0.11
    tall = wide * maps.shape[1] / maps.shape[2]
    height = 0.75 + tall + 2.0
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    _heading(figure, title, "Active connections leaving each input pixel")

    def place(left: float, bottom: float, width: float, high: float) -> Axes:
        return figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, high / height))

    for i, moment in enumerate(chosen):
        axes = place(0.2 + i * (wide + 0.11), 2.0, wide, tall)
        image = axes.imshow(maps[moment], cmap="magma", vmin=0, vmax=maps[chosen].max() or 1)
        axes.set_axis_off()
        axes.set_title(f"step {steps[moment]:,}", y=-0.22 / tall, fontsize=10, color=_INK)
    _colour_bar(figure, place(0.2 + len(chosen) * (wide + 0.11), 2.0, 0.11, tall), image)
    _border_curve(place(0.68, 0.5, 6.53, 0.85), steps, ratios, chosen)
    return figure


def comparison_figure(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """Draw accuracy over density, one line with error bars per method; ``dense`` is a level line and band.

    A row is (method, density, mean, std): density, mean accuracy and its standard deviation over seeds, all
    as fractions of 1. A ``std`` that is NaN, as of a single seed, has no bar.

    Raises ValueError when there is no row, or a density outside 0 .. 1 (0 excluded).

    >>> figure = comparison_figure([("dense", 1.0, 0.98, 0.001), ("rigl", 0.1, 0.97, 0.002)])
    >>> figure.axes[0].get_legend_handles_labels()[1]
    ['dense', 'rigl']
    """
    wrong = [density for _, density, *_ in rows if not 0 < density <= 1]
    if not rows or wrong:
        raise ValueError(f"a comparison needs rows with densities above 0 and up to 1, not {len(rows)} with {wrong}.")
    figure = Figure(figsize=(_WIDTH, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for _, _, mean, std in (row for row in rows if row[0] == "dense"):
        axes.axhline(mean, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1.4, label="dense", zorder=1)
        if std > 0:
            axes.axhspan(mean - std, mean + std, color=_FAINT, alpha=0.12, linewidth=0)
    names = list(dict.fromkeys(name for name, *_ in rows if name != "dense"))
    for i, name in enumerate(names):
        density, mean, std = np.array(sorted(row[1:] for row in rows if row[0] == name)).T
        look: Any = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        axes.errorbar(density, mean, std, label=name, markersize=6, linewidth=1.6, capsize=3, **look)
    _tidy(axes, "y")
    _percent(axes)
    axes.set_ylabel("test accuracy")
    _density_axis(axes, sorted(row[1] for row in rows if row[0] != "dense"))
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, ncols=1 + len(names) // 8)
    return figure


def border_ratio(counts: npt.ArrayLike) -> Floats:
    """Divide the mean of the two outermost rings of each map by the mean of its central half.

    Takes counts (moments, h, w) and returns (moments,): 1 where connections are spread evenly, towards 0 as
    they leave the border, infinite or NaN where the centre has none.

    Raises ValueError unless there is at least one map, of at least 8 x 8, of finite counts from 0 on.

    >>> border_ratio(np.ones((2, 8, 8)))
    array([1., 1.])
    """
    maps = np.asarray(counts, dtype=np.float64)
    if maps.ndim != len("mhw") or not len(maps) or min(maps.shape[1:]) < SMALLEST_MAP:
        raise ValueError(f"connection maps have the shape (moments, h, w) from (1, 8, 8) on, not {maps.shape}.")
    if not (np.isfinite(maps).all() and (maps >= 0).all()):
        raise ValueError(f"connection maps count from 0 on, not from {maps.min()} to {maps.max()}.")
    _, h, w = maps.shape
    inner = maps[:, _RING:-_RING, _RING:-_RING]
    ring = maps.sum((1, 2)) - inner.sum((1, 2))
    centre = maps[:, h // 4 : h - h // 4, w // 4 : w - w // 4].mean((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = ring / (h * w - inner[0].size) / centre
    return ratio


def choose_moments(steps: Sequence[int], most: int) -> list[int]:
    """Choose up to ``most`` indices into ascending ``steps``: first, last, and some between, denser at first.

    They are the nearest to squares of evenly spaced fractions of the run, as topologies change most early on.

    Raises ValueError when there is no step, or ``most`` is below 2.

    >>> choose_moments([0, 100, 200, 300, 400], 3)
    [0, 1, 4]
    """
    if not steps or most < len(("first", "last")):
        raise ValueError(f"moments are chosen from at least 1 step and at least 2 of them, not {len(steps)}, {most}.")
    if len(steps) <= most:
        return list(range(len(steps)))
    at = np.asarray(steps, dtype=np.float64)
    wanted = at[0] + (at[-1] - at[0]) * np.linspace(0, 1, most) ** 2
    return sorted({int(np.abs(at - step).argmin()) for step in wanted})


def _write(figure: Figure, path: Path) -> Path:
    """Write a PNG so that a reader sees the old picture or the new one, never half of it."""
    path = Path(path)
    buffer = BytesIO()
    # Not savefig, which a user's matplotlibrc can make crop the picture.
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path


def _column(records: Sequence[Mapping[str, float]], key: str) -> Floats:
    return np.array([record.get(key, math.nan) for record in records], dtype=np.float64)


def _share(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _tidy(axes: Axes, grid: Any) -> None:
    """Give axes the common look, with grid lines across ``grid`` ("x", "y", "both" or None)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=_INK, fontsize=10)
    if grid is not None:
        axes.grid(axis=grid, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)


def _percent(axes: Axes, which: str = "y") -> None:
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g} %"))


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    left, top = 0.2 / figure.get_figwidth(), 1 - 0.15 / figure.get_figheight()
    figure.text(left, top, title, fontsize=14, fontweight="bold", color=_INK, va="top")
    figure.text(left, top - 0.33 / figure.get_figheight(), subtitle, fontsize=10.5, color=_FAINT, va="top")


def _colour_bar(figure: Figure, axes: Axes, image: Any) -> None:
    bar = figure.colorbar(image, cax=axes)
    bar.outline.set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)


def _border_curve(axes: Axes, steps: Sequence[int], ratios: Floats, chosen: Sequence[int]) -> None:
    """Draw the ratio at every moment, with dots and numbers at the chosen ones."""
    axes.axhline(1.0, color=_FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.plot(steps, ratios, color=_RED, linewidth=1.8)
    axes.plot([steps[i] for i in chosen], ratios[list(chosen)], "o", color=_RED, markersize=5)
    for i in (i for i in chosen if np.isfinite(ratios[i])):
        look: Any = {"ha": "center", "fontsize": 9, "color": _INK}
        axes.annotate(f"{ratios[i]:.2f}", (steps[i], ratios[i]), (0, 6), textcoords="offset points", **look)
    _tidy(axes, "y")
    finite = ratios[np.isfinite(ratios)]
    axes.set_ylim(0, 1.35 * max(1.0, finite.max(initial=0.0)))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_title("Connections per border pixel, relative to the centre", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("optimizer step", fontsize=9, color=_FAINT)


def _density_axis(axes: Axes, densities: Sequence[float]) -> None:
    """Tick the ascending densities that occur; logarithmic where they span more than a factor of four."""
    axes.set_xlabel("density")
    if not densities:
        axes.xaxis.set_major_locator(NullLocator())
        return
    if densities[-1] > _WIDE_RANGE * densities[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list({_share(density): density for density in densities}.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _share(x)))

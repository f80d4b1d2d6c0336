"""study.png: the metric over a number that was varied, a line for every value of another axis, error bars over seeds.

x is the axis of numbers with the most values (the learning rate, mostly), lines are the first axis of names, whatever
axes are left make panels. matplotlib is an extra; without it there is the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdqat.files import whole_file
from kdqat.study.expand import Label
from kdqat.study.file import Study
from kdqat.study.screen import metric_of
from kdqat.study.summary import Row

NO_MATPLOTLIB = "no study.png: matplotlib is missing; `pip install 'kdqat[report]'`"
MAX_PANELS = 24


def draw(study: Study, stages: Mapping[str, Sequence[Row]], path: Path) -> str | None:
    """Write the plot; None, or why there is none.

    Args:
        stages: rows by their title; each gets a line of panels.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        return NO_MATPLOTLIB
    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = [row for found in stages.values() for row in found]
    x_axis, line_axis, panel_axes = roles(every)
    panels = list(dict.fromkeys(_panel(row, panel_axes) for row in every))[:MAX_PANELS]
    lines = list(dict.fromkeys(row.variation.labels.get(line_axis, "") for row in every)) if line_axis else [""]
    shape = len(stages), len(panels)
    size = (1.5 + 4.2 * shape[1], 0.8 + 3.4 * shape[0])
    figure, grid = pyplot.subplots(*shape, squeeze=False, figsize=size, sharex=x_axis is not None)
    for across, (title, found) in zip(grid, stages.items(), strict=True):
        metric = metric_of(study, study.screen) if study.screen and title.startswith("Short") else study.metric
        for axes, panel in zip(across, panels, strict=True):
            here = [row for row in found if _panel(row, panel_axes) == panel]
            for index, line in enumerate(lines):
                points = [row for row in here if not line_axis or row.variation.labels.get(line_axis, "") == line]
                _line(axes, points, x_axis, metric, str(line), index)
            _dress(axes, [row.mean[metric] for row in here], here, x_axis)
            axes.set_title(", ".join(filter(None, [title.partition(":")[0], panel])), fontsize=9)
        across[0].set_ylabel(metric)
    handles, names = _legend(grid)
    if line_axis:
        figure.legend(handles, names, title=line_axis, loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.2 / size[0] if line_axis else 1, 1))
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")
    pyplot.close(figure)
    return None


def roles(found: Sequence[Row]) -> tuple[str | None, str | None, list[str]]:
    """Which axis is x, which makes lines, which make panels; axes with one value are left out."""
    values: dict[str, list[Label]] = {}
    for row in found:
        for axis, label in row.variation.labels.items():
            values.setdefault(axis, [])
            values[axis] += [label] if label not in values[axis] else []
    varied = {axis: seen for axis, seen in values.items() if len(seen) > 1}
    numeric = [axis for axis, seen in varied.items() if all(_is_number(label) for label in seen)]
    x_axis = max(numeric, key=lambda axis: len(varied[axis]), default=None)
    others = [axis for axis in varied if axis != x_axis]
    named = [axis for axis in others if axis not in numeric] or others
    line_axis = max(named, key=lambda axis: len(varied[axis]), default=None)
    return x_axis, line_axis, [axis for axis in others if axis != line_axis]


def _line(axes: Any, points: Sequence[Row], x_axis: str | None, metric: str, line: str, index: int) -> None:
    if x_axis:
        points = sorted(
            (row for row in points if x_axis in row.variation.labels), key=lambda r: r.variation.labels[x_axis]
        )
    if not points:
        return
    x = [row.variation.labels[x_axis] if x_axis else line or row.variation.name for row in points]
    marker = "osD^v<>P*X"[index % 10]
    axes.errorbar(
        x,
        [row.mean[metric] for row in points],
        [row.std[metric] or 0.0 for row in points],
        marker=marker,
        color=f"C{index % 10}",
        linestyle=("-", "--", ":")[index // 10 % 3] if x_axis else "none",
        capsize=3,
        markersize=4.5,
        linewidth=1.2,
        label=line,
    )


def _dress(axes: Any, values: Sequence[float], found: Sequence[Row], x_axis: str | None) -> None:
    axes.grid(alpha=0.3)
    good = [value for value in values if value == value and 0 < value < float("inf")]
    if good and len(good) == len(values) and max(good) > 10 * min(good):
        axes.set_yscale("log")
    if x_axis:
        axes.set_xlabel(x_axis)
        x = [row.variation.labels[x_axis] for row in found if x_axis in row.variation.labels]
        if x and min(x) > 0 and max(x) >= 10 * min(x):  # type: ignore[operator]
            axes.set_xscale("log")


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)


def _panel(row: Row, axes: Sequence[str]) -> str:
    return ", ".join(f"{row.variation.labels[axis]}" for axis in axes if axis in row.variation.labels)


def _is_number(label: Label) -> bool:
    return isinstance(label, int | float) and not isinstance(label, bool)

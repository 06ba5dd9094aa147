"""Charts as inline SVG and pages from templates, for reports that open offline."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Chart = dict[str, str]
"""A `title` and the `svg`."""


def line_chart(
    title: str, label: str, rows: Sequence[dict[str, Any]], axis: str, lines: Sequence[tuple[str, str]]
) -> Chart | None:
    """A line for each (column of the rows, its name); None if no row has any of the columns."""
    present = [(column, name) for column, name in lines if any(column in row for row in rows)]
    if not present:
        return None

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for column, name in present:
            points = [(row[axis], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 12 else None, markersize=3.5, label=name)
        axes.set_xlabel("policy version" if axis == "version" else "step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if label == "policy versions":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(0, max(1, axes.get_ylim()[1]))
        if label.startswith("share"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if label == "share":
            lowest = min(min(line.get_ydata()) for line in axes.lines)
            axes.set_ylim(max(0.0, min(lowest - 0.05, 0.8)), 1.02 if lowest > 0.3 else None)
        if len(present) > 1:
            axes.legend(frameon=False, fontsize=8)

    return _chart(title, draw)


def bar_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Mapping[str, float]]) -> Chart | None:
    """Groups of bars, one series per colour; None if there is nothing to show."""
    names = list(dict.fromkeys(name for bars in series.values() for name in bars))
    if not names:
        return None

    def draw(axes: Any) -> None:
        width = 0.8 / len(series)
        for index, (label, bars) in enumerate(series.items()):
            places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(names))]
            axes.bar(places, [bars.get(name, 0) for name in names], width, label=label)
        level = sum(map(len, names)) < 40
        axes.set_xticks(range(len(names)), names, rotation=0 if level else 35, ha="center" if level else "right")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(series) > 1:
            axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)

    return _chart(title, draw)


def dot_chart(title: str, x_label: str, rows: Mapping[str, Sequence[float]], against: str) -> Chart | None:
    """A row for each name: its values as a line from the lowest to the highest with a dot at the mean. The axis shows
    the range of the values alone, with a line at the mean of `against`. None if there is nothing to show."""
    if not rows:
        return None

    def draw(axes: Any) -> None:
        for place, values in enumerate(rows.values()):
            axes.plot([min(values), max(values)], [place, place], color="C0", linewidth=2, alpha=0.5)
            axes.plot(fmean(values), place, "o", color="C0", markersize=4)
        axes.axvline(fmean(rows[against]), color="C1", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)

    return _chart(title, draw)


def render_page(template: str, **values: Any) -> str:
    """A template of this folder, filled in; what it shows is escaped."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template(template).render(**values)


def _chart(title: str, draw: Callable[[Any], None]) -> Chart:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(4.2, 2.6), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return {"title": title, "svg": svg[svg.index("<svg") :]}

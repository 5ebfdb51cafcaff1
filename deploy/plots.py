"""The report's plots: numbers in, inline SVG out. The only file that draws; it knows no log and no settings.

A plot is drawn with made-up colours (`Ink`), each of which becomes a CSS variable in the SVG: so the page decides
the colours, light and dark, and the text takes the page's own font.
"""

import bisect
import io
import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from deploy.summary import Histogram, Lines, Point

WIDTH = 560
"""Width of a plot in SVG units; the page shows it at about as many pixels, so font sizes are pixels."""

HEIGHT = 250
ROW_HEIGHT = 34
"""Height of a bar of the time account, in SVG units."""

MAX_MARKED = 48
"""Points of a line up to which each gets a dot."""

NUM_BARS = 40
TAIL = 0.005
"""Share of the values on either side that may fall beyond a histogram's axis: they count in its outermost bars."""


ROUND_STEPS = (1, 2, 2.5, 5, 10)
"""Distances between the numbers on an axis, times a power of ten."""


class Ink(StrEnum):
    """A colour of the page, by the made-up colour that stands for it while drawing."""

    TEXT = "#000001"
    MUTED = "#000002"
    GRID = "#000003"
    PAPER = "#000004"
    FIRST = "#000005"
    SECOND = "#000006"
    THIRD = "#000007"
    QUIET = "#000008"

    @property
    def css(self) -> str:
        return f"var(--{self.name.lower()})"


class Series(NamedTuple):
    """Lines of one colour: one per epoch of the learner."""

    lines: Lines
    ink: Ink
    word: str  # in the legend
    has_dots_only: bool = False

    @property
    def is_empty(self) -> bool:
        return not any(line.points() for line in self.lines.values())


class Bar(NamedTuple):
    """One role's time, as shares that add up to 1."""

    label: str
    shares: Sequence[float]


STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "font.size": 12.0,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "text.color": Ink.TEXT.value,
    "axes.labelcolor": Ink.MUTED.value,
    "axes.edgecolor": Ink.GRID.value,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": Ink.GRID.value,
    "grid.linewidth": 1.0,
    "xtick.color": Ink.GRID.value,
    "ytick.color": Ink.GRID.value,
    "xtick.labelcolor": Ink.MUTED.value,
    "ytick.labelcolor": Ink.MUTED.value,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def held_out(lines: dict[int, list[Point]], *, best: Point | None, target: float | None) -> Markup:
    """Held-out reward by weight version: a line per epoch with a band of one standard error either side."""

    def draw(axes: Axes) -> None:
        for points in lines.values():
            _band(axes, points, Ink.FIRST)
            _line(axes, points, Ink.FIRST)
        if target is not None:
            axes.axhline(target, color=Ink.MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"target {target:.3g}", (0, target), (2, -4), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="top", color=Ink.MUTED, fontsize=11,
            )  # fmt: skip
        if best is not None:
            axes.plot(best.x, best.mean, "o", markersize=10, markerfacecolor="none", markeredgecolor=Ink.SECOND)
        _label(axes, "weight version", "mean held-out reward")

    return _svg("held-out", "Held-out reward by weight version", draw)


def trend(name: str, title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> Markup:
    """Means by version or step, a colour per series."""

    def draw(axes: Axes) -> None:
        for one in series:
            for line in one.lines.values():
                _line(axes, line.points(), one.ink, has_dots_only=one.has_dots_only)
        _label(axes, x_label, y_label)

    return _svg(name, title, draw)


def histogram(name: str, title: str, values: Histogram, *, x_label: str) -> Markup:
    """How often which value; a line at zero where the values lie on both sides of it."""

    def draw(axes: Axes) -> None:
        centres, counts, width = bars(values)
        axes.bar(centres, counts, width=width * 0.9, color=Ink.FIRST)
        if min(centres) < 0 < max(centres):
            axes.axvline(0, color=Ink.TEXT, linewidth=1)
        _fit(axes, centres, width)
        _label(axes, x_label, "pairs", is_counted=True)

    return _svg(name, title, draw)


def staleness(trained: Histogram, dropped: Histogram, *, bound: int) -> Markup:
    """Examples by staleness; those that were dropped for it stand on the others, in another colour."""
    values = [value for counts in (trained, dropped) for value, _ in counts.values()]
    width = 1 + int(max(values) - min(values)) // NUM_BARS

    def draw(axes: Axes) -> None:
        below = _whole_bars(trained, width)
        above = _whole_bars(dropped, width)
        axes.bar([*below], [*below.values()], width=width * 0.9, color=Ink.FIRST)
        axes.bar(
            [*above], [*above.values()], bottom=[below.get(at, 0) for at in above], width=width * 0.9, color=Ink.SECOND
        )
        if bound <= max(values) + 2 * width:
            axes.axvline(bound + 0.5, color=Ink.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _fit(axes, [*below, *above], width)
        _label(axes, "staleness (weight versions)", "examples", is_counted=True)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=ROUND_STEPS))

    return _svg("staleness", "Staleness of the examples", draw)


def time_account(rows: Sequence[Bar], inks: Sequence[Ink]) -> Markup:
    """A bar per role that always fills the axis, in the given colours from left to right."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        left = [0.0] * len(rows)
        for part, ink in enumerate(inks):
            shares = [row.shares[part] for row in rows]
            axes.barh(places, shares, left=left, height=0.62, color=ink)
            for place, share, start in zip(places, shares, left, strict=True):
                if share >= 0.07:  # a narrower piece has no room for its number
                    axes.text(start + share / 2, place, f"{share:.0%}", ha="center", va="center_baseline",
                              color=Ink.TEXT if ink is Ink.QUIET else Ink.PAPER, fontsize=11)  # fmt: skip
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_yticks(list(places), [row.label for row in rows])
        axes.tick_params(axis="y", labelcolor=Ink.TEXT)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the role's time since its start")

    return _svg("time", "Time of each role by cause", draw, width=2 * WIDTH, height=48 + ROW_HEIGHT * len(rows))


def bars(values: Histogram) -> tuple[list[float], list[float], float]:
    """(centres, counts, width) of at most NUM_BARS bars. Values beyond the tails count in the outermost bars."""
    found = values.values()
    if not has_tails(values):
        centres = [value for value, _ in found]
        gaps = np.diff(centres)
        return centres, [float(count) for _, count in found], float(gaps.min()) if len(gaps) else 1.0
    places = np.array([value for value, _ in found])
    counts = np.array([count for _, count in found])
    shares = (np.cumsum(counts) / counts.sum()).tolist()
    low, high = (float(places[bisect.bisect_left(shares, share)]) for share in (TAIL, 1 - TAIL))
    heights, edges = np.histogram(places.clip(low, high), bins=NUM_BARS, weights=counts)
    return list((edges[:-1] + edges[1:]) / 2), list(heights), float(edges[1] - edges[0])


def has_tails(values: Histogram) -> bool:
    """Whether values may lie beyond the drawn ones, counted in the outermost bars."""
    return len(values.values()) > NUM_BARS


def _whole_bars(values: Histogram, width: int) -> dict[float, int]:
    """Counts by the centre of bars that each hold `width` whole numbers."""
    found: dict[float, int] = {}
    for value, count in values.values():
        centre = int(value) // width * width + (width - 1) / 2
        found[centre] = found.get(centre, 0) + count
    return found


def per_point(series: Sequence[Series]) -> int:
    """How many steps or versions the coarsest line shows as one point."""
    return max((line.width for one in series for line in one.lines.values()), default=1)


def _line(axes: Axes, points: Sequence[Point], ink: Ink, *, has_dots_only: bool = False) -> None:
    xs, ys = [point.x for point in points], [point.mean for point in points]
    if has_dots_only:
        axes.plot(xs, ys, "o", markersize=4, markerfacecolor="none", markeredgecolor=ink)
        return
    axes.plot(xs, ys, color=ink, marker="o" if len(points) <= MAX_MARKED else "", markersize=3.5)


def _band(axes: Axes, points: Sequence[Point], ink: Ink) -> None:
    xs = [point.x for point in points]
    errors = [point.standard_error or 0.0 for point in points]
    low = [point.mean - error for point, error in zip(points, errors, strict=True)]
    high = [point.mean + error for point, error in zip(points, errors, strict=True)]
    axes.fill_between(xs, low, high, color=ink, alpha=0.18, linewidth=0)


def _fit(axes: Axes, centres: Sequence[float], width: float) -> None:
    """Room for a few bars at least, so that a single value is a bar and not a wall."""
    room = max(0.0, 5 * width - (max(centres) - min(centres))) / 2 + width
    axes.set_xlim(min(centres) - room, max(centres) + room)
    axes.grid(visible=False, axis="x")


def _label(axes: Axes, x_label: str, y_label: str, *, is_counted: bool = False) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=is_counted, steps=ROUND_STEPS))
    if not is_counted:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=ROUND_STEPS))
        axes.grid(visible=False, axis="x")


def _svg(name: str, title: str, draw: Callable[[Axes], None], *, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """One set of axes as an SVG element to stand in an HTML page; `name` keeps its ids apart from other plots'."""
    buffer = io.StringIO()
    # At 72 dots per inch a point, an SVG unit and a pixel are the same. The salt makes ids the same every time.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type")))
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> Markup:
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)
    body = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    for ink in Ink:
        body = body.replace(ink.value, ink.css)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    return Markup('<svg {} role="img" aria-label="{}">{}').format(
        Markup(size.group()), escape(title), Markup(body.strip())
    )

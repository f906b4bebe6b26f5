"""Curves by matplotlib: loss.png, and pictures for report.html.

A picture for the page is the SVG that matplotlib writes, as a data: address, without a date and with fixed ids, so that
equal values give equal bytes. Its words are only English: matplotlib measures them with its own font, which has no
Chinese.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.evaluation.thresholds import Answered
from minilora.system.optional import broken, import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, SECOND = "#1c2127", "#56606a", "#d0d6db", "#1f6fb5", "#b3560c"
LogLines = Sequence[dict[str, Any]]
Draw = Callable[["Axes", LogLines], None]
# Equal bytes for equal values; text instead of outlines; points less than a third of a pixel apart are one.
SVG_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "minilora",
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.3,
    "font.size": 11,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page: its caption, what it shows in words, and the data: address of its SVG."""

    title: str
    alt: str
    uri: str


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Around what draws: MissingPackageError for whatever matplotlib raises, at its import or later."""
    import_optional("matplotlib.figure")
    try:
        yield
    except Exception as error:
        raise broken("matplotlib", error) from error


def points(log: LogLines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have a value under `name`."""
    found = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_loss(axes: "Axes", log: LogLines) -> None:
    """Loss of each step, its mean over a thirtieth of the run, and loss of each validation."""
    steps, losses = points(log, "train_loss")
    window = len(losses) // 30
    alpha = 0.35 if window > 1 else 1.0
    axes.plot(steps, losses, _line(steps), color=ACCENT, linewidth=1, alpha=alpha, label="training")
    if window > 1:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], means, color=ACCENT, linewidth=1.8, label="running mean")
    axes.plot(*points(log, "eval_loss"), "o-", color=SECOND, markersize=4, label="validation")
    axes.set_ylabel("loss, nats a token")


def draw_scores(axes: "Axes", log: LogLines) -> None:
    """Accuracy and F1 of each validation, where there are labels."""
    for name, label, colour, style in (("accuracy", "accuracy", ACCENT, "o-"), ("f1", "F1", SECOND, "s--")):
        axes.plot(*points(log, f"eval_{name}"), style, color=colour, markersize=4, label=label)
    axes.set_ylabel("validation")


def draw_rate(axes: "Axes", log: LogLines) -> None:
    """Learning rate of each step."""
    steps, rates = points(log, "learning_rate")
    axes.plot(steps, rates, _line(steps), color=ACCENT, linewidth=1.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")


def _line(steps: list[int]) -> str:
    """The style of a curve: a single point makes no line."""
    return "o" if len(steps) == 1 else "-"


@_matplotlib()
def loss_png(log: LogLines) -> bytes:
    """Content of loss.png: loss, scores and learning rate over the steps. MissingPackageError without matplotlib."""
    from matplotlib.figure import Figure

    heights = {draw_loss: 3, draw_scores: 2, draw_rate: 1}
    if not points(log, "eval_accuracy")[0]:
        del heights[draw_scores]
    figure = Figure(figsize=(8, 1 + sum(heights.values())), layout="constrained")
    parts = figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values()))
    for axes, draw in zip(parts, heights, strict=True):
        draw(axes, log)
        _dress(axes)
    parts[-1].set_xlabel("optimizer step")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


@_matplotlib()
def curve_picture(title: str, draw: Draw, log: LogLines, alt: str) -> Picture:
    """What one of the `draw_` functions above draws; `alt` says it in words. MissingPackageError as above."""
    from matplotlib.ticker import MaxNLocator

    def fill(figure: "Figure") -> None:
        axes = figure.subplots()
        draw(axes, log)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.set_xlabel("optimizer step")

    return Picture(title, alt, _svg_uri(fill, height=3.2))


@_matplotlib()
def runs_picture(name: str, runs: Sequence[tuple[int, LogLines]]) -> Picture:
    """A value of the logs of several runs over their steps; runs with the same number are in one colour."""
    from matplotlib.ticker import MaxNLocator

    def fill(figure: "Figure") -> None:
        axes = figure.subplots()
        for number, log in runs:
            steps, values = points(log, name)
            window = max(1, len(values) // 30)
            means = np.convolve(values or [0.0], np.ones(window) / window, "valid")[: len(values)]
            style = _line(steps) if name.startswith("train") else "o-"
            colour = f"C{(number - 1) % 10}"
            label = None if str(number) in axes.get_legend_handles_labels()[1] else str(number)
            axes.plot(steps[window - 1 :], means, style, color=colour, markersize=3, linewidth=1.2, label=label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.set(xlabel="optimizer step", ylabel=name.replace("_", " "))

    return Picture(name, "over the steps of all runs; the numbers are those of the table", _svg_uri(fill, height=3.2))


@_matplotlib()
def reliability_picture(title: str, counts: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray) -> Picture:
    """Accuracy over confidence, the gap to the diagonal, and below them the number of reviews in each bin.

    Args:
        title: of the picture.
        counts: (B,) int, reviews in each bin; the bins divide 0..1 evenly.
        accuracy: (B,) float64, the share of them that is right; any value in an empty bin.
        confidence: (B,) float64, their mean confidence.
    """
    from matplotlib.ticker import MaxNLocator

    used, width = counts > 0, 1 / len(counts)
    edges = np.arange(len(counts)) * width
    lowest = float(edges[used].min())

    def fill(figure: "Figure") -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([lowest, 1], [lowest, 1], "--", color=MUTED, linewidth=1, label="calibrated")
        top.vlines(confidence[used], confidence[used], accuracy[used], color=SECOND, label="gap")
        top.plot(confidence[used], accuracy[used], "o", color=ACCENT, label="accuracy", clip_on=False)
        top.set(xlim=(lowest, 1), ylim=(-0.04, 1.04), ylabel="accuracy")
        bottom.bar(edges[used], counts[used], 0.9 * width, align="edge", color=ACCENT, alpha=0.5)
        bottom.set(ylabel="reviews", xlabel="confidence")
        bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return Picture(title, "accuracy over confidence; the table has its values", _svg_uri(fill, height=3.8))


@_matplotlib()
def answered_picture(table: Sequence[Answered]) -> Picture:
    """Accuracy of what is answered over the share that is, with its interval."""
    shares = [row.answered.value or 0.0 for row in table]
    accuracies = [row.right.value or 0.0 for row in table]
    low, high = zip(*(row.right.interval for row in table), strict=True)

    def fill(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.fill_between(shares, low, high, color=ACCENT, alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(shares, accuracies, _line([len(shares)] * len(shares)), color=ACCENT, linewidth=1.8, label="accuracy")
        axes.set(xlim=(0, 1), ylabel="accuracy of the answered", xlabel="share that is answered")
        axes.set_ylim(top=1.01)

    return Picture(
        "Accuracy by the share that is answered", "the table has its values at some shares", _svg_uri(fill, height=3.2)
    )


def _svg_uri(fill: Callable[["Figure"], None], height: float) -> str:
    """A figure, 5 inches wide, as the data: address of its SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    svg = io.BytesIO()
    with matplotlib.rc_context(SVG_SETTINGS):
        figure = Figure(figsize=(5, height), layout="constrained")
        fill(figure)
        for axes in figure.axes:
            _dress(axes)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()


def _dress(axes: "Axes") -> None:
    """Quiet axes: two lines, a faint grid, no frame around the legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=MUTED, length=0, pad=5)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
        text.set_color(MUTED)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, labelcolor=INK)

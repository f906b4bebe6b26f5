"""Curves by matplotlib: loss.png, and pictures for a page that is read in light and in the dark.

A picture for a page is SVG whose colours are the page's own: matplotlib draws with placeholders, and each of them
becomes a variable of the page's style sheet. Words stay text, in the page's font. They are numbers and English words
alone, because matplotlib measures them with a font of its own, which has no Chinese.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minilora.reports.markup import Markup, element, escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The roles of colours, as loss.png has them; a page's style sheet has --ink, --muted and so on.
COLOURS = {"ink": "#1c2127", "muted": "#5c6670", "line": "#d9dee3", "accent": "#1f6fb5", "second": "#b3560c"}
PLACEHOLDERS = {role: f"#0102{number:02x}" for number, role in enumerate(COLOURS)}
Rows = Sequence[dict[str, Any]]


def is_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under `name`."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _line(steps: list[int]) -> str:
    """The style of a curve: one point alone makes no line."""
    return "o" if len(steps) == 1 else "-"


def draw_loss(axes: "Axes", rows: Rows, colours: dict[str, str]) -> None:
    """Loss of each step, its mean over a thirtieth of the run, and loss of each validation."""
    steps, losses = points(rows, "train_loss")
    window = len(losses) // 30
    alpha = 0.35 if window > 1 else 1.0
    axes.plot(steps, losses, _line(steps), color=colours["accent"], linewidth=1, alpha=alpha, label="training")
    if window > 1:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], means, color=colours["accent"], linewidth=1.8, label="running mean")
    axes.plot(*points(rows, "eval_loss"), "o-", color=colours["second"], markersize=4, label="validation")
    axes.set_ylabel("loss, nats a token")


def draw_scores(axes: "Axes", rows: Rows, colours: dict[str, str]) -> None:
    """Accuracy and F1 of each validation, where there are labels."""
    for name, label, colour, style in (("accuracy", "accuracy", "accent", "o-"), ("f1", "F1", "second", "s--")):
        steps, values = points(rows, f"eval_{name}")
        if steps:
            axes.plot(steps, values, style, color=colours[colour], markersize=4, label=label)
    axes.set_ylabel("validation")


def draw_rate(axes: "Axes", rows: Rows, colours: dict[str, str]) -> None:
    """Learning rate of each step."""
    steps, rates = points(rows, "learning_rate")
    axes.plot(steps, rates, _line(steps), color=colours["accent"], linewidth=1.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")


def save_loss_png(path: Path, rows: Rows) -> None:
    """Writes loss.png: loss, scores and learning rate over the steps.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    heights = {draw_loss: 3, draw_scores: 2, draw_rate: 1}
    if not points(rows, "eval_accuracy")[0]:
        del heights[draw_scores]
    figure = Figure(figsize=(8, 1 + sum(heights.values())), layout="constrained")
    parts = figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values()))
    for axes, draw in zip(parts, heights, strict=True):
        draw(axes, rows, COLOURS)
        _dress(axes, COLOURS)
    parts[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)


def curve_picture(title: str, draw: Callable[["Axes", Rows, dict[str, str]], None], rows: Rows, alt: str) -> Markup:
    """What one of the `draw_` functions above draws, as a figure of a page, `alt` being what it shows in words."""
    from matplotlib.ticker import MaxNLocator

    def fill(figure: "Figure") -> None:
        axes = figure.subplots()
        draw(axes, rows, PLACEHOLDERS)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.set_xlabel("optimizer step")

    return _figure(title, fill, 3.2, alt)


def reliability_picture(counts: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray, alt: str) -> Markup:
    """Accuracy over confidence, the gap to the diagonal, and below them how many reviews each bin has.

    Args:
        counts: (B,) int, reviews in each bin; the bins share 0..1 evenly.
        accuracy: (B,) float64, the share of them that is right, anything where there are none.
        confidence: (B,) float64, their mean confidence.
        alt: what it shows in words.
    """
    from matplotlib.ticker import MaxNLocator

    colours, used, width = PLACEHOLDERS, counts > 0, 1 / len(counts)
    edges = np.arange(len(counts)) * width
    lowest = float(edges[used].min())

    def fill(figure: "Figure") -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([lowest, 1], [lowest, 1], "--", color=colours["muted"], linewidth=1, label="calibrated")
        top.vlines(confidence[used], confidence[used], accuracy[used], color=colours["second"], label="gap")
        top.plot(confidence[used], accuracy[used], "o", color=colours["accent"], label="accuracy", clip_on=False)
        top.set(xlim=(lowest, 1), ylim=(-0.04, 1.04), ylabel="accuracy")
        bottom.bar(edges[used], counts[used], 0.9 * width, align="edge", color=colours["accent"], alpha=0.5)
        bottom.set(ylabel="reviews", xlabel="confidence")
        bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return _figure("Reliability diagram", fill, 3.8, alt)


def _figure(title: str, fill: Callable[["Figure"], None], height: float, alt: str) -> Markup:
    """A figure element with an SVG that is 360 units wide, as a narrow phone is, in the page's colours and font."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": alt,
        "font.size": 11,
        "path.simplify_threshold": 0.3,
    }
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5, height), layout="constrained")
        fill(figure)
        for axes in figure.axes:
            _dress(axes, PLACEHOLDERS)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue().strip()
    svg = svg[svg.index("<g ") :]  # behind the declarations, the size and a style for the whole page
    linked = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in linked else "", svg)
    svg = re.sub(r" font-family: [^;]+;", "", svg)
    for role, placeholder in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{role})")
    start = f'<svg viewBox="0 0 360 {72 * height:g}" role="img" aria-label="{escaped(f"{title}: {alt}")}">'
    return element("figure", element("figcaption", title), Markup(start + svg))


def _dress(axes: "Axes", colours: dict[str, str]) -> None:
    """Quiet axes: two lines, a faint grid, no frame around the legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours["line"])
    axes.tick_params(colors=colours["muted"], length=0, pad=5)
    axes.grid(color=colours["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
        text.set_color(colours["muted"])
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, labelcolor=colours["ink"])

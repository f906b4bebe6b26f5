"""Curves are drawn from whatever lines of the log there are."""

import base64
import random
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from minilora.reports import plots
from minilora.system.optional import MissingPackageError

LOG = [
    {"step": 1, "train_loss": 2.0, "learning_rate": 1e-4},
    {"step": 2, "train_loss": None, "learning_rate": 2e-4, "skipped": True},
    {"step": 3, "train_loss": 1.0, "learning_rate": 1e-4, "eval_loss": 1.1, "eval_accuracy": 0.9, "eval_f1": 0.8},
]
DRAWN = (plots.draw_loss, plots.draw_scores, plots.draw_rate)


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib is not installed; pip install matplotlib"):
        plots.loss_png(LOG)


def test_a_matplotlib_that_fails_while_it_draws_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: 1 / 0)
    for draw in (lambda: plots.loss_png(LOG), lambda: plots.curve_picture("T", plots.draw_loss, LOG, "x")):
        with pytest.raises(MissingPackageError, match=r"matplotlib .+ZeroDivisionError: division by zero"):
            draw()


def test_points_leave_out_the_lines_without_a_value() -> None:
    assert plots.points(LOG, "train_loss") == ([1, 3], [2.0, 1.0])
    assert plots.points(LOG, "eval_loss") == ([3], [1.1])
    assert plots.points([], "eval_loss") == ([], [])


@pytest.fixture(autouse=True)
def needs_matplotlib(request: pytest.FixtureRequest) -> None:
    if "monkeypatch" not in request.fixturenames:
        pytest.importorskip("matplotlib")


def svg(picture: plots.Picture) -> str:
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


@pytest.mark.parametrize("log", [[], LOG[:1], LOG], ids=["none", "one", "three"])
def test_loss_png_is_drawn_from_lines_with_different_keys(log: plots.LogLines) -> None:
    assert plots.loss_png(log).startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", DRAWN, ids=["loss", "scores", "rate"])
@pytest.mark.parametrize("log", [[], LOG], ids=["no lines", "lines"])
def test_a_picture_is_svg_whose_words_are_text(log: plots.LogLines, draw: plots.Draw) -> None:
    picture = plots.curve_picture("Title", draw, log, "from 2 to 1")
    assert (picture.title, picture.alt) == ("Title", "from 2 to 1")
    assert ElementTree.fromstring(svg(picture)).attrib["version"] == "1.1"
    assert "optimizer step</text>" in svg(picture)


def test_equal_logs_make_equal_bytes_and_different_ones_different_bytes() -> None:
    first, second = (plots.curve_picture("T", plots.draw_loss, LOG, "x") for _ in range(2))
    assert first == second
    assert first != plots.curve_picture("T", plots.draw_loss, LOG[:2], "x")


def test_a_long_run_has_a_running_mean_and_a_picture_that_stays_small() -> None:
    chooser = random.Random(0)
    log = [{"step": step, "train_loss": chooser.random(), "learning_rate": 1e-4} for step in range(1, 20_001)]
    picture = plots.curve_picture("T", plots.draw_loss, log, "x")
    assert "running mean</text>" in svg(picture)
    assert "running mean" not in svg(plots.curve_picture("T", plots.draw_loss, log[:20], "x"))
    # 20,000 points at some 20 bytes each are 400 kB; points less than a third of a pixel apart are one
    assert len(svg(picture)) < 200_000


@pytest.mark.parametrize("draw", [plots.draw_loss, plots.draw_rate], ids=["loss", "rate"])
def test_a_run_of_one_step_is_a_dot_at_a_whole_step(draw: plots.Draw) -> None:
    dot = svg(plots.curve_picture("T", draw, [{"step": 7, "train_loss": 0.5, "learning_rate": 1e-4}], "x"))
    line = svg(plots.curve_picture("T", draw, [{**LOG[0], "step": step} for step in (7, 8)], "x"))
    assert dot.count("<use ") > line.count("<use ")
    ticks = re.findall(r">([0-9.]+)</text>", dot)
    assert "7" in ticks
    assert not any(tick.startswith(("6.", "7.")) for tick in ticks)


def test_a_reliability_diagram_shows_the_bins_that_are_not_empty() -> None:
    counts, accuracy, confidence = np.array([0, 4, 0, 9]), np.array([0, 0.5, 0, 1.0]), np.array([0, 0.4, 0, 0.9])
    picture = svg(plots.reliability_picture("Reliability diagram", counts, accuracy, confidence))
    assert picture.count("<use ") == 2 + 1  # two bins, and the legend
    assert "reviews</text>" in picture
    assert "confidence</text>" in picture

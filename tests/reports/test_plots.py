"""Curves are drawn from whatever rows there are, in the page's colours and with its font."""

import builtins
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from minilora.reports import plots

ROWS = [
    {"step": 1, "train_loss": 2.0, "learning_rate": 1e-4},
    {"step": 2, "train_loss": None, "learning_rate": 2e-4, "skipped": True},
    {"step": 3, "train_loss": 1.0, "learning_rate": 1e-4, "eval_loss": 1.1, "eval_accuracy": 0.9, "eval_f1": 0.8},
]
DRAWN = (plots.draw_loss, plots.draw_scores, plots.draw_rate)


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> ModuleType:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return plain(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_it_is_known_whether_matplotlib_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    without_matplotlib(monkeypatch)
    assert not plots.is_available()


def test_points_leave_out_the_rows_without_a_number() -> None:
    assert plots.points(ROWS, "train_loss") == ([1, 3], [2.0, 1.0])
    assert plots.points(ROWS, "eval_loss") == ([3], [1.1])
    assert plots.points([], "eval_loss") == ([], [])


@pytest.fixture(autouse=True)
def needs_matplotlib(request: pytest.FixtureRequest) -> None:
    if "monkeypatch" not in request.fixturenames:
        pytest.importorskip("matplotlib")


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS], ids=["none", "one", "three"])
def test_loss_png_is_drawn_from_rows_with_different_keys(tmp_path: Path, rows: plots.Rows) -> None:
    plots.save_loss_png(tmp_path / "loss.png", rows)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draw", DRAWN, ids=["loss", "scores", "rate"])
@pytest.mark.parametrize("rows", [[], ROWS], ids=["no rows", "rows"])
def test_a_picture_has_the_colours_and_the_font_of_its_page(rows: plots.Rows, draw: Callable[..., None]) -> None:
    picture = plots.curve_picture("Title", draw, rows, 'from "2" to <1>')
    svg = ElementTree.fromstring(picture[picture.index("<svg") : picture.index("</svg>") + 6].replace("xlink:", ""))
    assert svg.attrib["viewBox"] == "0 0 360 230.4"
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-label"] == 'Title: from "2" to <1>'
    assert "<figcaption>Title</figcaption>" in picture
    assert "var(--muted)" in picture
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata|DOCTYPE", picture)
    assert "optimizer step</text>" in picture  # text, not outlines


def test_pictures_of_one_page_share_no_id_and_keep_what_they_link_to() -> None:
    pictures = [plots.curve_picture("T", draw, ROWS, f"picture {number}") for number, draw in enumerate(DRAWN)]
    ids = [name for picture in pictures for name in re.findall(r' id="([^"]+)"', picture)]
    assert len(ids) == len(set(ids)) > 0
    for picture in pictures:
        links = set(re.findall(r'"#([^"]+)"|url\(#([^)]+)\)', picture))
        assert {a or b for a, b in links} == set(re.findall(r' id="([^"]+)"', picture))


def test_the_same_rows_make_the_same_picture() -> None:
    assert plots.curve_picture("T", plots.draw_loss, ROWS, "x") == plots.curve_picture("T", plots.draw_loss, ROWS, "x")


def test_a_long_run_has_a_running_mean_and_a_picture_that_stays_small() -> None:
    chooser = random.Random(0)
    rows = [{"step": step, "train_loss": chooser.random(), "learning_rate": 1e-4} for step in range(1, 20_001)]
    picture = plots.curve_picture("T", plots.draw_loss, rows, "x")
    assert "running mean</text>" in picture
    assert "running mean" not in plots.curve_picture("T", plots.draw_loss, rows[:20], "x")
    # 20,000 points at some 20 bytes each are 400 kB; what is less than a third of a pixel apart is one point
    assert len(picture) < 200_000


@pytest.mark.parametrize("draw", [plots.draw_loss, plots.draw_rate], ids=["loss", "rate"])
def test_a_run_of_one_step_is_a_dot_at_a_whole_step(draw: Callable[..., None]) -> None:
    picture = plots.curve_picture("T", draw, [{"step": 7, "train_loss": 0.5, "learning_rate": 1e-4}], "x")
    line = plots.curve_picture("T", draw, [{**ROWS[0], "step": step} for step in (7, 8)], "x")
    assert picture.count("<use ") > line.count("<use ")
    ticks = re.findall(r">([0-9.]+)</text>", picture)
    assert "7" in ticks
    assert not any(tick.startswith(("6.", "7.")) for tick in ticks)


def test_a_reliability_diagram_shows_the_bins_that_are_not_empty() -> None:
    counts, accuracy, confidence = np.array([0, 4, 0, 9]), np.array([0, 0.5, 0, 1.0]), np.array([0, 0.4, 0, 0.9])
    picture = plots.reliability_picture(counts, accuracy, confidence, "x")
    assert picture.count("<use ") == 2 + 1  # two bins, and the legend
    assert "reviews</text>" in picture
    assert "confidence</text>" in picture

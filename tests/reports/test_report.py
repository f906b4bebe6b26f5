"""report.html shows what it was given as text, needs nothing but itself, and no browser complains about it."""

import dataclasses
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora.config import Config, load_config
from minilora.data.records import Record
from minilora.evaluation.metrics import classification_metrics
from minilora.reports import plots
from minilora.reports.answers import ScoredExamples
from minilora.reports.report import Report, render_report

ATTACK = "<script>document.title = 'hacked'</script>"
NAMES = ("负面", "正面")
VOID = {"meta", "link", "wbr"}


def make_report(**changes: Any) -> Report:
    """A report of a run in which everything has happened, and whose words are all an attack."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    positive = 1 / (1 + np.exp(-(2 * labels - 1) * 1.5 + generator.normal(0, 2, 60)))
    probabilities = np.stack([1 - positive, positive], axis=1)
    rows = [Record(f"test.jsonl:{n}", f"房间很好{ATTACK}" + "服务也很热情，" * n) for n in range(60)]
    after = {**classification_metrics(labels, probabilities, NAMES, 1), "loss": 0.2}
    before = {**classification_metrics(labels, np.full((60, 2), 0.5), NAMES, 1), "loss": 0.7}
    log: list[dict[str, Any]] = [
        {"step": n, "epoch": n / 90, "train_loss": 1 / n, "learning_rate": 1e-4, "peak_memory_bytes": n}
        for n in range(1, 91)
    ]
    log[29] |= {"eval_loss": 0.3, "eval_accuracy": 0.8, "eval_f1": 0.79}
    log[59] |= {"train_loss": None, "skipped": True, "rows": ["train.jsonl:17", ATTACK]}
    config = load_config(None, ["lora.r=16", "lora.alpha=16.0", f"prompt.instruction={ATTACK}"])
    report = Report(
        title="Training report",
        remark="Test set: 60 records.",
        results={"before training": before, "after training": after},
        answers=ScoredExamples(rows, labels, probabilities, NAMES),
        log=log,
        ledger={"projections (nf4)": 3_000_000, "activations of 640 rows": 1_000_000},
        peak_bytes=4_100_000,
        config=config.to_dict(),
        defaults=Config().to_dict(),
        facts={
            "adapter": {"step": 90},
            "folder": Path("a/b"),
            "f1": 0.888888,
            ATTACK: {ATTACK: ATTACK},
            "SHA-256": {"f": "ab" * 32},
        },
    )
    return dataclasses.replace(report, **changes)


class Page(HTMLParser):
    """A page's elements and text; fails where a tag is not closed in its place."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))  # SVG has such ones

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def titles(report: Report) -> list[str | None]:
    return [attributes["href"] for attributes in Page(render_report(report)).named("a")]


def test_a_review_a_key_and_a_fact_stay_text() -> None:
    page = Page(render_report(make_report()))
    assert page.named("script") == []
    # the shown mistakes, the instruction, a skipped record, and three in the facts
    assert page.text.count(ATTACK) > 5
    assert json.dumps(ATTACK) in page.text


def test_the_page_needs_nothing_but_itself_and_forbids_itself_the_rest() -> None:
    page = Page(render_report(make_report()))
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "action", "onload", "onclick"} & set(attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    policies = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_says_its_language_and_names_every_table_picture_and_part() -> None:
    page = Page(render_report(make_report()))
    assert page.named("html") == [{"lang": "en"}]
    assert page.named("title") == [{}]
    assert len(page.named("caption")) == len(page.named("table")) == 7
    assert all(attributes["scope"] in ("col", "row") for attributes in page.named("th"))
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in page.named("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = [attributes["id"] for attributes in page.named("h2")]
    assert [attributes["aria-labelledby"] for attributes in page.named("section")] == headings
    assert [attributes["href"] for attributes in page.named("a")] == [f"#{anchor}" for anchor in headings]


def test_headline_figures_stand_beside_those_before_with_their_intervals() -> None:
    report = make_report()
    text = Page(render_report(report)).text
    for name in ("accuracy", "f1"):
        before, after = report.results["before training"], report.results["after training"]
        (low, high), (low_before, high_before) = (m["confidence_intervals_95"][name] for m in (after, before))
        assert f"{after[name]:.4f}after training {low:.3f} to {high:.3f}" in text
        assert f"before training {before[name]:.4f} {low_before:.3f} to {high_before:.3f}" in text
    assert "0.2000after training before training 0.7000" in text  # the loss has no interval


def test_keys_that_differ_from_the_default_are_marked_and_no_others() -> None:
    page = render_report(make_report())
    marked = [part.partition("</mark>")[0].replace("<wbr>", "") for part in page.split("<mark>")[1:]]
    assert marked == ["lora.r", "prompt.instruction"]
    assert "<b>16</b><small> default 8</small>" in page
    keys = sum(len(section) for section in Config().to_dict().values())
    assert f"2 of {keys} keys differ from the default" in page


def test_memory_is_predicted_part_by_part_beside_the_measured_peak() -> None:
    text = Page(render_report(make_report())).text
    assert "Predicted 4.0 MB; measured peak while training: 4.1 MB." in text
    assert "projections (nf4)3.0activations of 640 rows1.0predicted in all4.0" in text
    assert "cannot be measured on this system" in Page(render_report(make_report(peak_bytes=None))).text


def test_facts_are_listed_with_their_parts() -> None:
    text = Page(render_report(make_report())).text
    assert f"adapterstep 90foldera/bf10.8889{ATTACK}{ATTACK} {ATTACK}SHA-256f {'ab' * 32}" in text


def test_skipped_steps_are_listed_with_their_records() -> None:
    assert f"60train.jsonl:17, {ATTACK}" in Page(render_report(make_report())).text
    assert "None: every step had a loss" in render_report(make_report(log=make_report().log[:50]))


def test_the_same_report_is_the_same_bytes() -> None:
    assert render_report(make_report()) == render_report(make_report())


def test_conversations_have_no_classes_and_an_evaluation_no_curves() -> None:
    loss = {"loss": 0.5, "num_examples": 4}
    chat = make_report(results={"before training": {"loss": 2.0}, "after training": loss}, answers=None)
    assert titles(chat) == ["#results", "#curves", "#memory", "#skipped-steps", "#configuration", "#made-from"]
    assert "accuracy" not in Page(render_report(chat)).text.partition("Curves")[0]
    evaluation = make_report(log=[], ledger=None)
    assert titles(evaluation)[1:5] == ["#classes", "#calibration", "#worst-mistakes", "#memory"]
    assert "Measured peak: 4.1 MB." in Page(render_report(evaluation)).text


def test_where_nothing_was_scored_the_page_says_why() -> None:
    page = Page(render_report(make_report(results={}, answers=None, remark=f"Not scored {ATTACK}")))
    assert f"Not scored {ATTACK}" in page.text
    assert page.named("script") == []


def test_a_metric_that_one_side_lacks_is_a_dash_and_one_that_no_side_has_is_left_out() -> None:
    report = make_report()
    after = {**report.results["after training"], "roc_auc": None}
    before = {name: value for name, value in report.results["before training"].items() if name != "log_loss"}
    page = render_report(make_report(results={"before": before, "after": after}))
    assert "ROC AUC" not in page
    assert '<th scope="row">log loss, nats</th><td>-</td><td>0.' in page


def test_without_matplotlib_there_is_a_page_that_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "is_available", lambda: False)
    page = Page(render_report(make_report()))
    assert page.named("svg") == []
    assert "No curves, because matplotlib is not installed" in page.text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = pytest.importorskip("tests.browser", reason="Chromium's pipe is POSIX's")
    if browser.PROGRAM is None:
        pytest.skip("Chromium is not installed")
    pytest.importorskip("matplotlib")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(make_report()), "utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (360, "light"), (360, "dark")])
def test_a_browser_shows_it_without_a_complaint_in_any_width_and_light(
    chromium: Any, page: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    chromium.open(page, width, scheme)
    chromium.screenshot(tmp_path / f"{width}-{scheme}.png")
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]
    assert chromium.value("innerWidth") == width
    assert chromium.value("document.documentElement.scrollWidth") <= width
    # no table needs its own scroll bar either, and no picture is cut
    inner = "[...document.querySelectorAll('.wide, figure, dd, li')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert chromium.value(inner) == 0
    assert chromium.value("document.title") == "Training report"
    assert chromium.value("document.querySelectorAll('section').length") == 9
    assert chromium.value("document.querySelectorAll('figure svg').length") == 4
    assert (tmp_path / f"{width}-{scheme}.png").stat().st_size > 10_000


LUMINANCE = """(e, what) => {
    const [r, g, b] = getComputedStyle(e)[what].match(/[0-9.]+/g).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("selector", ["body", "small", "caption", "mark", "nav a", "svg text"])
def test_text_stands_out_from_the_ground(chromium: Any, page: Path, scheme: str, selector: str) -> None:
    chromium.open(page, 1100, scheme)
    colour = "fill" if selector.startswith("svg") else "color"
    ground, text = (
        chromium.value(f"({LUMINANCE})(document.querySelector('{place}'), '{what}')")
        for place, what in (("body", "backgroundColor"), (selector, colour))
    )
    assert (ground < 0.1) == (scheme == "dark")
    # 4.5 is what WCAG 2.2, section 1.4.3, asks of small text
    assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) >= 4.5


def test_a_script_that_slips_in_does_not_run(chromium: Any, page: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(page.read_text("utf-8").replace("</main>", f"{ATTACK}</main>"), "utf-8")
    chromium.open(spoiled, 1100)
    assert chromium.value("document.title") == "Training report"
    assert "violates the following Content Security Policy" in "".join(chromium.complaints())


def test_a_long_review_opens(chromium: Any, page: Path) -> None:
    chromium.open(page, 360)
    height = "document.documentElement.scrollHeight"
    before = chromium.value(height)
    chromium.value("document.querySelector('.mistakes summary').click()")
    assert chromium.value(height) > before

"""report.html shows every value as text, loads nothing, and is readable on every screen, in light and dark."""

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.config import Config, load_config
from minilora.data.records import Record
from minilora.evaluation.calibration import calibration_figures
from minilora.evaluation.metrics import classification_metrics, final_metrics
from minilora.reports.report import MAX_MISTAKES, Report, ScoredExamples, render_report

ATTACK = "<script>document.title = 'hacked'</script>"
NAMES = ("负面", "正面")
START = "text starts here:"
VOID = {"meta", "link", "wbr", "img"}


@functools.cache
def full_report() -> Report:
    """A report with every part, and an attack wherever it takes text."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    positive = 1 / (1 + np.exp(-(2 * labels - 1) * 1.5 + generator.normal(0, 2, 60)))
    uncalibrated = np.stack([1 - positive, positive], axis=1)
    metrics, probabilities = final_metrics(labels, uncalibrated, 2.0, label_names=NAMES, positive=1)
    records = [Record(f"test.jsonl:{n}", f"房间很好{ATTACK}" + "服务也很热情，" * n) for n in range(60)]
    after = {**metrics, "loss": 0.2}
    before = {**classification_metrics(labels, np.full((60, 2), 0.5), NAMES, 1), "loss": 0.7}
    log: list[dict[str, Any]] = [
        {"step": n, "epoch": n / 90, "train_loss": 1 / n, "learning_rate": 1e-4, "peak_memory_bytes": n}
        for n in range(1, 91)
    ]
    log[29] |= {"eval_loss": 0.3, "eval_accuracy": 0.8, "eval_f1": 0.79}
    log[59] |= {"train_loss": None, "skipped": True, "rows": ["train.jsonl:17", ATTACK]}
    config = load_config(None, ["lora.r=16", "lora.alpha=16.0", f"prompt.instruction={ATTACK}"])
    return Report(
        title="Training report",
        remark="Test set: 60 records.",
        results={"before training": before, "after training": after},
        examples=ScoredExamples(records, labels, probabilities, NAMES, 1, uncalibrated, f"Temperature 2 {ATTACK}"),
        log=log,
        memory_estimate={"projections (nf4)": 3_000_000, "activations of 640 tokens": 1_000_000},
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


def make_report(**changes: Any) -> Report:
    return dataclasses.replace(full_report(), **changes)


class Page(HTMLParser):
    """A page's elements and text; fails on a tag that is closed in the wrong order."""

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

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def titles(report: Report) -> list[str | None]:
    return [attributes["href"] for attributes in Page(render_report(report)).named("a")]


def words(page: str) -> str:
    """The text of a page or a part of it, white space as one blank."""
    return " ".join(Page(page).text.split())


def section(page: str, title: str) -> str:
    """The HTML of one part of the page."""
    anchor = title.lower().replace(" ", "-")
    return page.partition(f'<section aria-labelledby="{anchor}"')[2].partition("</section>")[0]


def render_examples(texts: list[str], labels: list[int], positive: list[float], names: tuple[str, str] = NAMES) -> str:
    """The page of an evaluation whose probabilities of the second label are `positive`."""
    records = [Record(f"test.jsonl:{number}", text) for number, text in enumerate(texts, start=1)]
    probabilities = np.array([[1 - p, p] for p in positive])
    metrics = classification_metrics(np.array(labels), probabilities, names, 1)
    examples = ScoredExamples(records, np.array(labels), probabilities, names, positive=1)
    return render_report(make_report(results={"adapter": metrics}, examples=examples, log=[], memory_estimate=None))


# --- text stays text, and the page loads nothing


def test_a_review_a_key_and_a_fact_stay_text() -> None:
    page = Page(render_report(make_report()))
    assert page.named("script") == []
    # the shown mistakes, the instruction, a skipped record, and three in the facts
    assert page.text.count(ATTACK) > 5
    assert json.dumps(ATTACK) in page.text


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "'--><!--"])
def test_text_stays_text_in_elements_and_attributes(text: str) -> None:
    names = (text, "正面")  # shown in cells; the configuration's section names a table in an attribute
    page = Page(render_examples([text], [0], [0.9], names))
    assert page.text.count(text) >= 4  # two tables, label of the mistake, its text
    assert len(page.named("img")) <= 2  # reliability, and accuracy by the share that is answered
    report = make_report(config={text: {"key": 1}}, defaults={text: {"key": 1}}, results={}, examples=None, log=[])
    page = Page(render_report(report))
    assert {"role": "region", "tabindex": "0", "class": "wide", "aria-label": text} in page.named("div")


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_is_shown_as_it_is_except_what_no_page_may_hold(text: str) -> None:
    html = render_report(make_report(results={}, examples=None, log=[], remark=f"{START}{text}"))
    html.encode()  # a lone surrogate would raise
    shown = Page(html).text.partition(START)[2][: len(text)]
    for before, after in zip(text, shown, strict=True):
        assert after == before or after == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("character", ["\0", "\b", "\x1b", "\x7f", "\x85", "\ud800"])
def test_a_character_that_no_page_may_hold_is_replaced(character: str) -> None:
    assert "a\N{REPLACEMENT CHARACTER}b\n\t好" in render_report(make_report(remark=f"a{character}b\n\t好"))


def test_the_page_loads_nothing_and_its_policy_forbids_it() -> None:
    page = Page(render_report(make_report()))
    for _, attributes in page.elements:
        assert not {"srcset", "data", "action", "onload", "onclick"} & set(attributes)
        assert (attributes.get("src") or "data:image/svg+xml;").startswith("data:image/svg+xml;")
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    policies = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_says_its_language_and_names_every_table_picture_and_part() -> None:
    page = Page(render_report(make_report()))
    assert page.named("html") == [{"lang": "en"}]
    assert page.named("title") == [{}]
    assert len(page.named("caption")) == len(page.named("table")) >= 7
    assert all(attributes["scope"] in ("col", "row") for attributes in page.named("th"))
    assert all(attributes["alt"] for attributes in page.named("img"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    headings = [attributes["id"] for attributes in page.named("h2")]
    assert [attributes["aria-labelledby"] for attributes in page.named("section")] == headings
    assert [attributes["href"] for attributes in page.named("a")] == [f"#{anchor}" for anchor in headings]


# --- the parts


def test_headline_figures_are_beside_those_before_with_their_intervals() -> None:
    report = make_report()
    text = words(render_report(report))
    for name in ("accuracy", "f1"):
        before, after = report.results["before training"], report.results["after training"]
        (low, high), (low_before, high_before) = (m["confidence_intervals_95"][name] for m in (after, before))
        assert f"{after[name]:.4f} after training {low:.3f} to {high:.3f}" in text
        assert f"before training {before[name]:.4f} {low_before:.3f} to {high_before:.3f}" in text
    assert "0.2000 after training before training 0.7000" in text  # the loss has no interval


def test_keys_that_differ_from_the_default_are_marked_and_no_others() -> None:
    page = render_report(make_report())
    marked = [part.partition("</mark>")[0].replace("<wbr>", "") for part in page.split("<mark>")[1:]]
    assert marked == ["lora.r", "prompt.instruction"]
    assert "<b>16</b><small> default 8</small>" in page
    keys = sum(len(section) for section in Config().to_dict().values())
    assert f"2 of {keys} keys" in page


def test_memory_is_predicted_part_by_part_beside_the_measured_peak() -> None:
    text = words(render_report(make_report()))
    assert "Predicted 4.0 MB; measured peak while training: 4.1 MB." in text
    assert "projections (nf4)3.0 activations of 640 tokens1.0 total4.0" in text
    assert "cannot be measured on this system" in Page(render_report(make_report(peak_bytes=None))).text


def test_facts_are_listed_with_their_parts() -> None:
    text = words(render_report(make_report()))
    assert f"adapter step 90 folder a/b f1 0.8889 {ATTACK} {ATTACK} {ATTACK} SHA-256 f {'ab' * 32}" in text


def test_skipped_steps_are_listed_with_their_records() -> None:
    assert f"60train.jsonl:17, {ATTACK}" in words(section(render_report(make_report()), "Skipped steps"))
    assert "None" in section(render_report(make_report(log=make_report().log[:50])), "Skipped steps")


def test_the_same_report_is_the_same_bytes() -> None:
    assert render_report(make_report()) == render_report(make_report())


def test_conversations_have_no_classes_and_an_evaluation_no_curves() -> None:
    loss = {"loss": 0.5, "num_examples": 4}
    chat = make_report(results={"before training": {"loss": 2.0}, "after training": loss}, examples=None)
    assert titles(chat) == ["#results", "#curves", "#memory", "#skipped-steps", "#configuration", "#provenance"]
    assert "accuracy" not in Page(render_report(chat)).text.partition("Curves")[0]
    evaluation = make_report(log=[], memory_estimate=None)
    assert titles(evaluation)[1:6] == ["#classes", "#calibration", "#thresholds", "#worst-mistakes", "#memory"]
    assert "Measured peak: 4.1 MB." in Page(render_report(evaluation)).text


def test_where_nothing_was_scored_the_page_says_why() -> None:
    page = Page(render_report(make_report(results={}, examples=None, remark=f"Not scored {ATTACK}")))
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
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(render_report(make_report()))
    assert page.named("img") == []
    assert "pip install matplotlib" in page.text
    assert "0.867 to 0.933" in page.text  # calibration has its table


def row(page: str, name: str) -> list[str]:
    """The cells of every table row whose first cell is `name`."""
    found = re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>(.+?)</tr>', page)
    return [cell for cells in found for cell in re.findall("<td>(.*?)</td>", cells)]


def test_the_confusion_matrix_is_shaded_by_the_share_of_its_row() -> None:
    page = render_examples(["a"] * 5, [0, 0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9, 0.8], ("负面", "<正面>"))
    shares = [re.findall(r"--share: ([\d.]+)\">(\d+)<", cell) for cell in row(page, "负面")[:2]]
    assert shares == [[("0.667", "2")], [("0.333", "1")]]
    assert row(page, "&lt;正面&gt;")[2:] == ["0.6667", "1.0000", "0.8000", "2<small><mark>rare</mark></small>"]


def render_classes(count: int) -> str:
    """The part on `count` classes of 40 reviews each; two of the last are confused, one is rare, the last absent."""
    names = [f"类别{index}" for index in range(count)]
    labels = np.repeat(np.arange(count - 2), 40)
    answers = labels.copy()
    answers[40:47] = 3  # seven of class 1
    answers[80:82] = 0  # two of class 2
    labels, answers = np.append(labels, [count - 2] * 3), np.append(answers, [count - 2] * 3)
    probabilities = np.full((len(labels), count), 0.1 / (count - 1))
    probabilities[np.arange(len(labels)), answers] = 0.9
    metrics = classification_metrics(labels, probabilities, names, None)
    records = [Record(f"t:{index}", "评论") for index in range(len(labels))]
    examples = ScoredExamples(records, labels, probabilities, names)
    return section(render_report(make_report(results={"adapter": metrics}, examples=examples, log=[])), "Classes")


@pytest.mark.parametrize("count", [5, 100])
def test_the_most_confused_classes_the_rare_and_the_absent_are_named(count: int) -> None:
    page = render_classes(count)
    assert f"<mark>No review is of 类别{count - 1}</mark>" in page
    assert "Most confused: 9 of 9 wrong answers" in page
    assert row(page, "类别1")[:3] == ["类别3", "7", "0.175"]
    assert row(page, "类别2")[:3] == ["类别0", "2", "0.050"]
    assert page.count("<mark>rare</mark>") == page.count("<mark>absent</mark>") == 1
    averages = [
        row(page.replace("<b>", "").replace("</b>", ""), f"{kind} average")[1] for kind in ("macro", "weighted")
    ]
    recall = (40 * (count - 2) - 9 + 3) / (40 * (count - 2) + 3)
    assert averages == [f"{(count - 1 - 9 / 40) / count:.4f}", f"{recall:.4f}"]


def test_of_many_classes_the_matrix_has_those_that_are_confused_and_the_worst_come_first() -> None:
    few, many = render_classes(5), render_classes(100)
    heads = [re.findall('<th scope="col">(.*?)</th>', table) for table in many.split("<table")[1:]]
    assert heads[1] == ["label", "类别1", "类别3", "类别2", "类别0", "others"]
    assert len(many) < 40_000
    order = re.findall(r'<th scope="row">(类别\d+)</th>', many.split("<table")[3])
    assert order[:2] == ["类别1", "类别3"]
    assert order[-1] == "类别99"
    assert len(order) == 100
    assert [re.findall('<th scope="col">(.*?)</th>', table) for table in few.split("<table")[1:]][1] == [
        "label",
        *(f"类别{index}" for index in range(5)),
    ]


def test_a_matrix_of_more_than_four_classes_has_the_page_s_width() -> None:
    two = section(render_examples(["a"] * 2, [0, 1], [0.1, 0.9]), "Classes")
    assert [page.count('class="matrix"') for page in (two, render_classes(4), render_classes(5))] == [0, 0, 1]
    assert ".beside > .wide:has(> .matrix)" in render_report(make_report())


def test_a_class_that_never_occurs_has_no_share() -> None:
    assert section(render_examples(["a"], [0], [0.1]), "Classes").count("--share: 0.000") == 3


def test_calibration_shows_the_bins_that_are_not_empty() -> None:
    pytest.importorskip("matplotlib")
    # confidences 0.9 (right), 0.9 (wrong) and 0.6 (right): bins 14 and 9 of 15
    page = section(render_examples(["a"] * 3, [1, 0, 0], [0.9, 0.9, 0.4]), "Calibration")
    assert "0.4000" in page  # |1 - 1.8| and |1 - 0.6| of 3 reviews: 0.4
    assert row(page, "0.533 to 0.600") == ["1", "0.600", "1.000"]
    assert row(page, "0.867 to 0.933") == ["2", "0.900", "0.500"]
    assert page.count('<th scope="row">') == 2 + 2  # the bins, log loss and calibration error
    assert page.count("<img ") == 1
    assert "No temperature" in page


def test_calibration_is_shown_before_and_after_the_temperature_with_intervals() -> None:
    pytest.importorskip("matplotlib")
    report = make_report()
    page = section(render_report(report), "Calibration")
    examples = report.examples
    assert examples is not None
    assert examples.uncalibrated is not None
    figures = calibration_figures(examples.labels, examples.probabilities, examples.uncalibrated)
    for name, title in (("log_loss", "log loss, nats"), ("expected_calibration_error", "calibration error")):
        expected = []
        for part in (figures["uncalibrated"], figures, figures["change"]):
            low, high = part["confidence_intervals_95"][name]
            expected.append(f"{part[name]:.4f}<small>{low:.3f} to {high:.3f}</small>")
        assert row(page, title) == expected
    assert page.count("<img ") == 2
    assert f"Temperature 2 {ATTACK}" in words(page)
    assert "after" in words(page)


def test_thresholds_show_what_is_answered_and_what_precision_and_recall_cost() -> None:
    # confidences 0.9 (right), 0.8 (right), 0.7 (wrong), 0.6 (right); positive from 0.9, 0.8 and wrongly 0.7 on
    page = section(render_examples(["a"] * 4, [1, 1, 0, 0], [0.9, 0.8, 0.7, 0.4]), "Thresholds")
    shares = {cells[0]: cells[1:] for cells in map(cells_of, re.findall("<tr>(<th scope=.row.>.+?)</tr>", page))}
    assert shares["0.6000"][:2] == ["100.0 %", "4"]
    assert shares["0.6000"][2].startswith("0.7500<small>0.301 to 0.954")
    assert shares["0.7000"][:2] == ["75.0 %", "3"]
    assert shares["0.8000"][2].startswith("1.0000<small>")
    assert [cell.partition("<")[0] for cell in shares["precision 0.99"]] == ["0.8000", "1.0000", "1.0000"]
    assert [cell.partition("<")[0] for cell in shares["recall 0.9"]] == ["0.8000", "1.0000", "1.0000"]
    assert "--min_probability" in page


def test_a_precision_that_no_threshold_reaches_is_said() -> None:
    page = section(render_examples(["a"] * 2, [0, 1], [0.9, 0.8]), "Thresholds")
    assert row(page, "precision 0.8") == ["none", "-", "-"]
    assert row(page, "recall 0.8")[0] == "0.8000"


def cells_of(line: str) -> list[str]:
    return re.findall("<t[hd][^>]*>(.*?)</t[hd]>", line)


def test_mistakes_are_the_wrong_predictions_with_the_highest_confidence_first() -> None:
    page = section(render_examples(["right", "unsure", ATTACK], [1, 0, 0], [0.99, 0.6, 0.9]), "Worst mistakes")
    assert "2 of 3 reviews" in page
    assert "right</p>" not in page
    assert "<script" not in page
    text = words(page)
    assert text.index(ATTACK) < text.index("unsure")
    assert "label 负面prediction 正面probability 0.9000" in text
    assert "test.jsonl:3" in text


def test_of_many_mistakes_those_with_the_highest_confidence_are_shown_the_first_of_equals_first() -> None:
    count = MAX_MISTAKES + 3
    page = render_examples([f"[{n}]" for n in range(count)], [0] * count, [0.9] * (count - 1) + [0.95])
    page = section(page, "Worst mistakes")
    assert f"{count} of {count} reviews" in page
    assert re.findall(r"\[(\d+)\]", page) == [str(n) for n in (count - 1, *range(MAX_MISTAKES - 1))]


def test_without_mistakes_the_page_says_so() -> None:
    assert "None: all 1 reviews" in section(render_examples(["a"], [0], [0.1]), "Worst mistakes")


def test_a_long_review_is_clipped_and_opens() -> None:
    whole = "好" * 120
    short, long = (section(render_examples([text], [0], [0.9]), "Worst mistakes") for text in (whole, whole + "！"))
    assert "<details>" not in short
    assert f'<p class="review" dir="auto">{whole}</p>' in short
    assert f"{whole}… </span><small>all 121 characters</small></summary>" in long
    assert f'<p class="review" dir="auto">{whole}！</p></details>' in long


# --- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip("matplotlib")
    browser = pytest.importorskip("tests.browser", reason="selenium is not installed")
    if browser.PROGRAM is None or browser.DRIVER is None:
        pytest.skip("Chromium or chromedriver is not installed")
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(make_report()), "utf-8")
    return path


@pytest.mark.parametrize("width", [360, 1000, 1800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_a_complaint_at_any_width(
    chromium: Any, page: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    chromium.open(page, width, scheme)
    chromium.screenshot(tmp_path / "page.png")
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]
    assert chromium.value("innerWidth") == width
    assert chromium.value("document.documentElement.scrollWidth") <= width
    # no table needs its own scroll bar either, and no picture is cut
    inner = "[...document.querySelectorAll('.wide, figure, dd, li')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert chromium.value(inner) == 0
    assert chromium.value("document.title") == "Training report"
    assert chromium.value("document.querySelectorAll('section').length") == 10
    drawn = "[...document.querySelectorAll('figure img')].filter(e => e.complete && e.naturalWidth > 0).length"
    assert chromium.value(drawn) == 6
    assert (tmp_path / "page.png").stat().st_size > 10_000


LUMINANCE = """(e, what) => {
    const [r, g, b] = getComputedStyle(e)[what].match(/[0-9.]+/g).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("selector", ["section", "section small", "caption", "mark", "nav a", "footer p"])
def test_text_contrasts_with_its_background(chromium: Any, page: Path, scheme: str, selector: str) -> None:
    chromium.open(page, 1000, scheme)
    behind = "section" if selector not in ("nav a", "footer p") else "body"
    ground, text = (
        chromium.value(f"({LUMINANCE})(document.querySelector('{place}'), '{what}')")
        for place, what in ((behind, "backgroundColor"), (selector, "color"))
    )
    assert (ground < 0.1) == (scheme == "dark")
    # 4.5 is what WCAG 2.2, section 1.4.3, asks of small text
    assert (max(ground, text) + 0.05) / (min(ground, text) + 0.05) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_inverted_on_a_dark_page(chromium: Any, page: Path, scheme: str) -> None:
    chromium.open(page, 1000, scheme)
    is_inverted = chromium.value("getComputedStyle(document.querySelector('figure img')).filter") != "none"
    assert is_inverted == (scheme == "dark")


def test_a_script_that_gets_into_the_page_does_not_run(chromium: Any, page: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(page.read_text("utf-8").replace("</main>", f"{ATTACK}</main>"), "utf-8")
    chromium.open(spoiled, 1000)
    assert chromium.value("document.title") == "Training report"
    assert "violates the following Content Security Policy" in "".join(chromium.complaints())


def test_a_long_review_opens_on_a_click(chromium: Any, page: Path) -> None:
    chromium.open(page, 360)
    height = "document.documentElement.scrollHeight"
    before = chromium.value(height)
    chromium.value("document.querySelector('.mistakes summary').click()")
    assert chromium.value(height) > before

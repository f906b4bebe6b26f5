"""report.html: what a run or an evaluation came to, on one page that needs nothing but itself.

    results   curves   classes   calibration   worst mistakes   memory   skipped steps   configuration   made from

Style and pictures are in the file, and its policy forbids it to load or run anything. What comes from data and
configuration is text (`markup.py`). Words of the data's language stand in tables and never in pictures (`plots.py`).
A part that has nothing to show is left out, or says why.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.reports import plots
from minilora.reports.answers import ScoredExamples, iter_answer_parts
from minilora.reports.markup import Markup, element, escaped, joined, table

STYLE = Path(__file__).parents[1] / "assets" / "report" / "report.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# The metrics in reading order, and what the page calls them.
NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "macro_f1": "macro F1",
    "roc_auc": "ROC AUC",
    "log_loss": "log loss, nats",
    "expected_calibration_error": "calibration error",
    "loss": "loss, nats a token",
}
HEADLINES = ("accuracy", "f1", "loss")
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """All that a page shows.

    Attributes:
        title: its heading.
        remark: a sentence on the results, or on why there are none.
        results: metrics by what was scored ("before training", "after training"); the last one is what counts.
        answers: behind the last results; None for conversations, and where nothing was scored.
        log: rows of metrics.jsonl; none for an evaluation.
        ledger: predicted bytes by part, None where nothing was trained.
        peak_bytes: the most that was measured, None where it cannot be.
        config: values by section and key.
        defaults: the same of a configuration that changes nothing.
        facts: what it was made from, by name; a value may hold values by name itself.
    """

    title: str
    remark: str
    results: Mapping[str, Values]
    answers: ScoredExamples | None
    log: Sequence[dict[str, Any]]
    ledger: Mapping[str, int] | None
    peak_bytes: int | None
    config: Mapping[str, Values]
    defaults: Mapping[str, Values]
    facts: Values


def render_report(report: Report) -> str:
    """The page as HTML."""
    parts = {title.lower().replace(" ", "-"): (title, body) for title, body in _iter_parts(report)}
    links = (element("li", element("a", title, href=f"#{anchor}")) for anchor, (title, _) in parts.items())
    sections = (
        element("section", element("h2", title, id=anchor), body, aria_labelledby=anchor)
        for anchor, (title, body) in parts.items()
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report.title),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(STYLE.read_text("utf-8"))),
    )
    body = element(
        "body",
        element("header", element("h1", report.title), element("nav", element("ul", *links), aria_label="parts")),
        element("main", *sections),
        element("footer", element("p", f"written by minilora {__version__}")),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _iter_parts(report: Report) -> Iterator[tuple[str, Markup]]:
    """Title and content of each part that has something to show."""
    yield "Results", _results(report)
    if report.log:
        yield "Curves", _curves(report.log)
    if report.answers is not None:
        yield from iter_answer_parts(report.answers, list(report.results.values())[-1])
    yield "Memory", _memory(report.ledger, report.peak_bytes)
    if report.log:
        yield "Skipped steps", _skipped(report.log)
    yield "Configuration", _configuration(report.config, report.defaults)
    yield "Made from", _facts(report.facts)


def _results(report: Report) -> Markup:
    """Tiles with the headline figures, and a table of all."""
    remark = element("p", report.remark)
    if not report.results:
        return remark
    last = list(report.results.values())[-1]
    tiles = (_tile(name, report.results) for name in HEADLINES if name in last)
    rows = [
        (shown, *(_figure(metrics, name) for metrics in report.results.values()))
        for name, shown in NAMES.items()
        if last.get(name) is not None
    ]
    figures = table("All metrics, with 95 % bootstrap intervals", ("metric", *report.results), rows)
    return joined(element("div", *tiles, class_="tiles"), remark, figures)


def _tile(name: str, results: Mapping[str, Values]) -> Markup:
    """The last figure in large with those before it, and their intervals as marks on a strip from 0 to 1."""
    marks, notes = [], []
    last = list(results)[-1]
    for title, metrics in results.items():
        interval = _interval(metrics, name)
        if interval is not None:
            low, high = (100 * bound for bound in interval)
            style = f"left: min({low:.2f}%, 100% - 3px); right: {100 - high:.2f}%"  # a mark at 1 is to be seen too
            marks.append(element("span", class_=None if title == last else "earlier", style=style))
        if name in metrics:
            figure = None if title == last else element("b", f"{metrics[name]:.4f} ")
            notes.append(element("p", f"{title} ", figure, interval and f"{interval[0]:.3f} to {interval[1]:.3f}"))
    return element(
        "div",
        element("h3", NAMES[name]),
        element("p", f"{results[last][name]:.4f}", class_="figure"),
        element("div", *marks, class_="strip", aria_hidden="true") if marks else None,
        *reversed(notes),
        class_="tile",
    )


def _interval(metrics: Values, name: str) -> Sequence[float] | None:
    """The 95 % interval of a metric, low and high."""
    bounds: Sequence[float] | None = metrics.get("confidence_intervals_95", {}).get(name)
    return bounds


def _figure(metrics: Values, name: str) -> Markup:
    """A metric, and its interval below it."""
    if metrics.get(name) is None:
        return Markup("-")
    interval = _interval(metrics, name)
    return joined(f"{metrics[name]:.4f}", interval and element("small", f"{interval[0]:.3f} to {interval[1]:.3f}"))


def _curves(log: Sequence[dict[str, Any]]) -> Markup:
    """Loss, validation scores and learning rate over the steps."""
    if not plots.is_available():
        return element("p", "No curves, because matplotlib is not installed: pip install matplotlib")

    def course(name: str) -> str:
        steps, values = plots.points(log, name)
        return f"{values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}" if steps else "none"

    losses = f"training {course('train_loss')}; validation {course('eval_loss')}"
    pictures = [
        ("Loss of training and validation", plots.draw_loss, losses),
        ("Learning rate", plots.draw_rate, course("learning_rate")),
    ]
    if plots.points(log, "eval_accuracy")[0]:
        scores = f"accuracy {course('eval_accuracy')}; F1 {course('eval_f1')}"
        pictures.insert(1, ("Accuracy and F1 of validation", plots.draw_scores, scores))
    figures = (plots.curve_picture(title, draw, log, alt) for title, draw, alt in pictures)
    return element("div", *figures, class_="beside")


def _memory(ledger: Mapping[str, int] | None, peak_bytes: int | None) -> Markup:
    """Predicted bytes part by part beside what was measured."""
    peak = "cannot be measured on this system" if peak_bytes is None else f"{peak_bytes / 1e6:,.1f} MB"
    if ledger is None:
        return element("p", f"Measured peak: {peak}.")
    total = max(sum(ledger.values()), 1)
    rows = [
        (joined(part, element("span", class_="bar", style=f"--share: {size / total:.3f}")), f"{size / 1e6:,.1f}")
        for part, size in ledger.items()
    ]
    rows.append((element("b", "predicted in all"), element("b", f"{total / 1e6:,.1f}")))
    measured = element("p", f"Predicted {total / 1e6:,.1f} MB; measured peak while training: {peak}.")
    return joined(measured, table("Predicted for the largest micro-batch", ("part", "MB"), rows))


def _skipped(log: Sequence[dict[str, Any]]) -> Markup:
    """Steps that changed nothing, with the records that were in them."""
    rows = [(row["step"], element("small", ", ".join(row.get("rows", [])))) for row in log if row.get("skipped")]
    if not rows:
        return element("p", "None: every step had a loss and a gradient that were numbers.")
    return table("Steps whose loss or gradient was no number; they changed nothing", ("step", "records"), rows, "prose")


def _configuration(config: Mapping[str, Values], defaults: Mapping[str, Values]) -> Markup:
    """All keys; those that differ from the default are marked, with the default behind the value."""
    rows, changes = [], 0
    for section, keys in config.items():
        for name, value in keys.items():
            key: Markup = joined(f"{section}.", element("wbr"), name)
            shown, default = (json.dumps(v, ensure_ascii=False) for v in (value, defaults[section][name]))
            if value == defaults[section][name]:
                rows.append((key, escaped(shown)))
            else:
                changes += 1
                rows.append(
                    (element("mark", key), joined(element("b", shown), element("small", f" default {default}")))
                )
    note = element("p", f"{changes} of {len(rows)} keys differ from the default; they are marked.")
    return joined(note, table("All keys", ("key", "value"), rows, "prose"))


def _facts(facts: Values) -> Markup:
    """Names and what they stand for."""
    pairs: list[Markup] = []
    for name, value in facts.items():
        pairs.append(element("dt", name))
        for key, line in sorted(value.items()) if isinstance(value, Mapping) else [(None, value)]:
            shown = f"{line:.4f}" if isinstance(line, float) else line
            pairs.append(element("dd", key and element("span", f"{key} "), element("code", shown)))
    return element("dl", *pairs)

"""sweep.html and sweep.json: the settings of a sweep side by side, and the learning curves of all runs together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minilora import __version__
from minilora.evaluation.comparison import Comparison, best_of
from minilora.reports import plots
from minilora.reports.render import render
from minilora.reports.report import NAMES
from minilora.system.optional import MissingPackageError

OTHER_RECORDS = "validated on other records"  # than the best setting, so there is no paired difference


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep; without a score it is not finished."""

    name: str
    final: str  # path of its final adapter
    failure: str | None  # why it ended before its end
    log: Sequence[dict[str, Any]]  # lines of its metrics.jsonl
    step: int | None = None  # whose adapter is the final one
    score: float | None = None  # of that on the validation set

    @property
    def status(self) -> str:
        """In a word or two."""
        if self.score is not None:
            return f"finished, adapter of step {self.step}"
        steps = self.log[-1]["step"] if self.log else 0
        return "non-finite losses" if self.failure else f"stopped after step {steps}" if steps else "not begun"


@dataclass(frozen=True)
class SweepReport:
    """All that the page shows."""

    metric: str  # as `comparison.compare` takes them; empty while no run is finished
    settings: Mapping[str, Sequence[SweptRun]]  # the runs of each
    comparisons: Mapping[str, Comparison]  # of the settings that have a finished run

    @property
    def is_labelled(self) -> bool:
        """Otherwise the runs are of conversations, of which there is only a loss, without intervals."""
        return self.metric != "loss"

    @property
    def best(self) -> str | None:
        """The setting with the best mean."""
        scores = {name: one.scores for name, one in self.comparisons.items()}
        return best_of(scores, self.metric) if scores else None

    @property
    def best_run(self) -> SweptRun | None:
        """The best run of the best setting."""
        if self.best is None:
            return None
        finished = {run.name: run for run in self.settings[self.best] if run.score is not None}
        return finished[best_of({name: [run.score or 0.0] for name, run in finished.items()}, self.metric)]

    def to_json(self) -> dict[str, Any]:
        """Plain values, of sweep.json."""
        rows = []
        for name, runs in self.settings.items():
            one = self.comparisons.get(name)
            figures = {} if one is None else {"mean": one.mean, "spread": one.spread, **asdict(one)}
            shown = [{"name": run.name, "status": run.status, "step": run.step, "score": run.score} for run in runs]
            rows.append({"setting": name, **figures, "runs": shown})
        return {"metric": self.metric, "best": self.best, "settings": rows}

    def to_text(self) -> str:
        """The table as lines for a terminal."""
        width = max(map(len, self.settings))
        columns = f"{self.metric:>8}  spread  {'95 % interval':<16}  minus the best, 95 %, p"
        lines = [f"{'setting':{width}}  runs   {columns}"]
        for name, runs in self.settings.items():
            one = self.comparisons.get(name)
            count = f"{sum(run.score is not None for run in runs)}/{len(runs)}"
            figures = "" if one is None else f"{one.mean:8.4f}  {_spread(one)}  {_interval(one.interval):<16}"
            difference = ""
            if one is not None and one.difference is not None:
                difference = f"{one.difference:+.4f} ({_interval(one.difference_interval)}), {one.p_value:.3g}"
            elif name == self.best:
                difference = "best"
            elif one is not None and self.is_labelled:
                difference = OTHER_RECORDS
            lines.append(f"{name:{width}}  {count:<5}  {figures}  {difference}".rstrip())
        return "\n".join(lines)


def _spread(one: Comparison) -> str:
    return "     -" if one.spread is None else f"{one.spread:6.4f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def render_sweep(report: SweepReport) -> str:
    """The page as HTML."""
    curves, no_pictures = [], None
    numbers = {name: number for number, name in enumerate(report.settings, start=1)}
    logs = [(numbers[name], run.log) for name, runs in report.settings.items() for run in runs if run.log]
    try:
        for name in dict.fromkeys((f"eval_{report.metric}", "eval_loss", "train_loss")):
            if any(plots.points(log, name)[0] for _, log in logs):
                curves.append(plots.runs_picture(name, logs))
    except MissingPackageError as error:
        no_pictures = str(error)
    return render(
        "sweep.html",
        report=report,
        metric_name=NAMES.get(report.metric, report.metric),
        curves=curves,
        no_pictures=no_pictures,
        other_records=OTHER_RECORDS,
        version=__version__,
    )

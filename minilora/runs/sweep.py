"""`key=a,b,c` on the command line in, a run for each combination out, and what they say of one another.

    train.learning_rate=1e-4,3e-4 train.seed=1,2
        outputs/sweep/learning_rate=1e-4,seed=1/      a run like any other: `train.py` gives the same bytes
        outputs/sweep/learning_rate=1e-4,seed=2/
        outputs/sweep/learning_rate=3e-4,seed=1/      ...
        outputs/sweep/sweep.json, sweep.html          the table, written anew after each run

Runs that differ only in seed and fold are of one setting. A setting is judged on validation sets; the test set is for
the one that is chosen, so `train.do_predict` is false unless the command line says otherwise.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.config import Config, layer_of, load_config
from minilora.errors import UserError
from minilora.evaluation.comparison import Predictions, compare
from minilora.reports.sweep import SweepReport, SweptRun
from minilora.runs.metrics_log import read_metrics
from minilora.runs.predictions import read_predictions
from minilora.system.files import read_json

REPEATED = ("seed", "fold")  # runs that differ in these are of one setting
LONGEST_NAME = 100  # bytes of a folder; file systems take 255
OPENING, CLOSING, QUOTES = "[{(", "]})", "'\""


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str  # of its folder
    setting: str  # what it has in common with the runs of other seeds and folds
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.train.output_dir)

    @property
    def final(self) -> Path:
        return self.directory / "checkpoints" / "final"


def split_values(text: str) -> list[str]:
    """The values in `a,b,c`; a comma within brackets or quotes is part of a value."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and not values[-1].strip():  # elsewhere it is an apostrophe
            quote = character
        depth += (character in OPENING) - (character in CLOSING) if not quote else 0
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def expand(path: Path | None, overrides: Sequence[str], directory: Path, folds: Sequence[Path] = ()) -> list[Variant]:
    """All combinations, the last key changing fastest, and in each the folds of the data.

    Args:
        path: YAML file of the configuration.
        overrides: `section.key=value`, or several values with commas between them.
        directory: gets the runs' folders.
        folds: in place of data.dir, if there are any.

    Raises:
        UserError: a value that is given twice, a key that belongs to the sweep, or what is wrong with any of the
            configurations, all of it in one message.
    """
    if layer_of("train.output_dir", path, overrides) == 2:
        raise UserError("train.output_dir: each run of a sweep has its own; name the sweep's folder with --output_dir")
    choices = [_choices(override) for override in overrides]
    keys = [override.partition("=")[0].replace("-", "_") for override in overrides]
    for number, (key, values) in enumerate(zip(keys, choices, strict=True), start=1):
        if len(values) > 1 and key in keys[number:]:  # the last would win, under the names of these
            raise UserError(f"{key}: is given several values and given again; give all of them at once: {key}=A,B,C")
    if layer_of("train.do_predict", path, overrides) < 2:
        choices.append(["train.do_predict=false"])
    if folds:
        if any(len(words) > 1 and words[0].startswith("data.dir=") for words in choices):
            raise UserError("data.dir: got several folders beside --folds, expected one")
        choices.append([f"data.dir={fold}" for fold in folds])
    is_varied = [len(words) > 1 for words in choices]
    variants, problems = [], dict[str, None]()
    for words in itertools.product(*choices):
        varied = [word.partition(".")[2] for word in itertools.compress(words, is_varied)]
        if folds:
            varied[-1] = Path(varied[-1].partition("=")[2]).name.replace("-", "=")  # fold=1
        name = _folder_name(",".join(varied) or "run")
        setting = ", ".join(word for word in varied if word.partition("=")[0] not in REPEATED)
        try:
            config = load_config(path, [*words, f"train.output_dir={directory / name}"])
        except UserError as error:
            problems |= dict.fromkeys(str(error).splitlines())
        else:
            variants.append(Variant(name, setting or "all runs", config))
    if problems:
        raise UserError("\n".join(problems))
    return variants


def _choices(override: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`."""
    key, _, text = override.partition("=")
    values = [value.strip() for value in split_values(text)]
    if len(values) == 1:
        return [override]
    for value in values:
        if not value or values.count(value) > 1:
            raise UserError(
                f"{override}: got {value!r} {'between commas' if not value else 'twice'}, expected different values; "
                "a comma within one value stands in quotes or brackets"
            )
    return [f"{key}={value}" for value in values]


def _folder_name(text: str) -> str:
    """A name that every file system takes: some characters become dashes, and a hash tells such names apart."""
    name = re.sub(r"[^\w.=,+-]", "-", text).encode()[:LONGEST_NAME].decode(errors="ignore")
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _metric(validation: Mapping[str, Any], found: Predictions) -> str:
    """What settings are compared by: what has chosen a run's adapter; of labels, the loss without the closing token."""
    (name,) = (name for name in validation if name.startswith("eval_"))
    return "log_loss" if name == "eval_loss" and found.is_labelled else name.removeprefix("eval_")


def build_report(variants: Sequence[Variant], failed: Mapping[str, str]) -> SweepReport:
    """What the finished runs say, by setting; `failed` has the reasons of those that ended with non-finite losses."""
    metric, settings = "", dict[str, list[SweptRun]]()
    predictions: dict[str, list[Predictions]] = {}
    positive = variants[0].config.prompt.positive
    for variant in variants:
        run = SweptRun(variant.name, str(variant.final), failed.get(variant.name), log=read_metrics(variant.directory))
        if variant.final.is_dir():
            results, found = read_json(variant.final / "metrics.json"), read_predictions(variant.directory)
            metric = metric or _metric(results["validation"], found)
            run = replace(run, step=results["step"], score=found.score(metric, positive))
            predictions.setdefault(variant.setting, []).append(found)
        settings.setdefault(variant.setting, []).append(run)
    return SweepReport(metric, settings, compare(predictions, metric, positive) if predictions else {})

"""What a run says of its own splits: losses, metrics and label probabilities, of all ranks together."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.data.examples import Examples
from minilora.evaluation.metrics import classification_metrics, final_metrics
from minilora.evaluation.score import Scores, ScoringOptions, score
from minilora.planning.memory import scoring_tokens
from minilora.runs.advice import non_finite
from minilora.runs.run import Run
from minilora.system.console import progress


def score_split(
    run: Run,
    name: str,
    on_progress: Callable[[int], object] | None = None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Loss of a split, with its metrics and the (N, labels) probabilities behind them where it is labelled.

    The ranks share the work.
    """
    split = run.splits[name]
    prompt = run.prompt if split.labelled else None
    options = ScoringOptions(
        run.config.train.per_device_eval_batch_size,
        scoring_tokens(run.config),
        on_progress=on_progress,
        ranks=run.ranks,
        interruptible=interruptible,
    )
    run.scoring = name
    scores = score(run.model, split.examples, prompt, options)
    run.scoring = None
    if not math.isfinite(scores.loss):  # no single record does that: the adapter is ruined
        run.saved = run.state
        raise non_finite(run, run.state.step, f"the {name} loss is {scores.loss}, expected a finite number;")
    # On rank 0 only: all ranks have to agree on which checkpoint is best.
    return run.ranks.run_on_rank_0(lambda: _metrics(run, split, scores)), scores.probabilities


def _metrics(run: Run, split: Examples, scores: Scores) -> dict[str, Any]:
    metrics: dict[str, Any] = {"loss": scores.loss, "num_examples": len(split.examples)}
    if scores.probabilities is not None:
        labels = split.labels
        metrics |= classification_metrics(labels, scores.probabilities, run.prompt.labels, run.config.prompt.positive)
    return metrics


def score_test_set(run: Run, title: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """`score_split` of the test set, with a progress bar."""
    with progress(title, len(run.splits["test"].examples), "record") as bar:
        return score_split(run, "test", bar.update)


def validation_scores(run: Run, step: int) -> Scores:
    """The validation split with the adapter of `step`: at hand, unless the run was resumed since that validation."""
    if step not in run.validated:
        with progress("validation", len(run.splits["validation"].examples), "record") as bar:
            metrics, probabilities = score_split(run, "validation", bar.update)
        run.validated = {step: Scores(metrics["loss"], probabilities)}
    return run.validated[step]


@dataclass(frozen=True)
class Tested:
    """The test set after training; None where it has no labels, or was not scored."""

    metrics: dict[str, Any] | None = None
    probabilities: np.ndarray | None = None  # (N, labels), at the temperature
    uncalibrated: np.ndarray | None = None  # the model's own, where there is a temperature


def score_after_training(run: Run, temperature: float | None) -> Tested:
    """The test set with the final adapter, its probabilities at a temperature."""
    if not run.config.train.do_predict:
        return Tested()
    metrics, uncalibrated = score_test_set(run, "test after training")
    if uncalibrated is None:
        return Tested(metrics)
    names, positive = run.prompt.labels, run.config.prompt.positive
    final, probabilities = final_metrics(
        run.splits["test"].labels, uncalibrated, temperature, label_names=names, positive=positive
    )
    return Tested({**metrics, **final}, probabilities, None if temperature is None else uncalibrated)

"""The figures of an evaluation on a terminal: the same names and the same limit of classes as on the report's page."""

from typing import Any

import numpy as np

from minilora.evaluation.metrics import most_confused
from minilora.reports.report import FEW_CLASSES, NAMES


def print_table(results: dict[str, Any], kind: str, truncated: str) -> None:
    """The main figures of an "adapter" or "base model" with their intervals, beside the base's if both were scored."""
    base = results.get("base")
    intervals = results["confidence_intervals_95"]
    print(f"{results['num_examples']} reviews of {results['data']}, {truncated}")
    print(f"{'':28}{kind:>10}  {'95 % interval':<18}" + (f"{'base':>10}" if base else ""))
    for name in (*NAMES, "reviews_per_s"):
        low_high = "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""
        print(f"{name:28}{_figure(results[name])}  {low_high:<18}" + (_figure(base[name]) if base else ""))
    if results["temperature"] is not None:
        before = results["uncalibrated"]
        print(
            f"without the temperature of {results['temperature']:.4g}: log_loss {before['log_loss']:.4f}, "
            f"expected_calibration_error {before['expected_calibration_error']:.4f}"
        )
    print_classes(results)
    if "mcnemar" in results:
        test = results["mcnemar"]
        print(f"McNemar: {test['b']} only the adapter right, {test['c']} only the base, p = {test['p_value']:.3g}")


def print_classes(results: dict[str, Any]) -> None:
    """Scores of each class, of many those with the lowest F1, and the confusion matrix, or its largest errors."""
    classes, confusion = results["per_class"], np.array(results["confusion_matrix"])
    is_few = len(classes) <= FEW_CLASSES
    present = [name for name, figures in classes.items() if is_few or figures["support"]]
    for name in present if is_few else sorted(present, key=lambda name: classes[name]["f1"])[:FEW_CLASSES]:
        shown = "  ".join(f"{key} {value:.4f}" for key, value in classes[name].items() if key != "support")
        print(f"{name}: {shown}  ({classes[name]['support']} reviews)")
    if is_few:
        print(f"confusion matrix (rows true, columns predicted): {results['confusion_matrix']}")
        return
    print(f"these are the lowest F1 of {len(classes)} classes; the most frequent errors:")
    names = list(classes)
    for label, answer, count in most_confused(confusion, FEW_CLASSES):
        print(f"{names[label]} predicted as {names[answer]}: {count} of {classes[names[label]]['support']}")


def _figure(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4f}"

"""Scores an adapter on labelled reviews: label probabilities from the logits, then the metrics.

Ends with one line of JSON: accuracy, precision, recall, f1 and more; with --compare-base the same under "base".
"""

from minilora.script import answer_signals, build_parser, run_script

if __name__ == "__main__":
    answer_signals()  # before the imports that take seconds

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilora.build import Examples, build_examples, read_split
from minilora.config import Config
from minilora.console import progress, warn
from minilora.errors import UserError
from minilora.evaluate import score
from minilora.files import WRITING, StorageError, make_folder, sha256, write_file
from minilora.lora import adapter_disabled
from minilora.metrics import classification_metrics, mcnemar_test
from minilora.model import Qwen2ForCausalLM
from minilora.prompt import ClassificationPrompt
from minilora.rows import ENCODINGS, read_rows
from minilora.trained import open_trained, run_digests

EXAMPLES = """\
examples:
  python scripts/evaluate.py --model_path outputs/checkpoints/final
  python scripts/evaluate.py --model_path outputs/checkpoints/final --data reviews.tsv --compare-base
  python scripts/evaluate.py --model_path some/peft/adapter --base Qwen/Qwen2.5-0.5B-Instruct --data reviews.tsv \\
      model.quantization=none model.compute_dtype=float32
"""


def main() -> None:
    """Reads the command line, scores, writes the results."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--model_path", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--data", type=Path, help="TSV, CSV, JSONL or parquet (default: the test split of its run)")
    parser.add_argument("--encoding", choices=ENCODINGS, default="utf-8", help="of --data, where it is a text file")
    parser.add_argument("--allow-bin", action="store_true", help="read an adapter_model.bin, a pickle, if you trust it")
    parser.add_argument("--base", help="base model, where it is not the one that the adapter names")
    parser.add_argument("--output_dir", type=Path, help="folder for predictions.jsonl and evaluation.json")
    parser.add_argument("--compare-base", action="store_true", help="score the model without the adapter as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys as in train.py")
    arguments = parser.parse_intermixed_args()

    if arguments.output_dir is not None:
        make_folder(arguments.output_dir, "--output_dir")
    trained = open_trained(arguments.model_path, arguments.base, arguments.overrides, arguments.data is not None)
    config, prompt = trained.config, trained.prompt
    if arguments.data is None:
        data = Path(config.data.dir) / "test.jsonl"
        examples = read_split(config, prompt, "test")
        warn_of_another_test_set(arguments.model_path, data)
    else:
        data = arguments.data
        examples = build_examples(read_rows(data, encoding=arguments.encoding)[: config.data.max_test_examples], prompt)
    if not examples.examples or not examples.labelled:
        raise UserError(f"{data}: holds no labelled review or unlabelled ones; give a file with a text and a label")
    model = trained.load(arguments.allow_bin)

    results, probabilities = evaluate(config, model, prompt, examples, "evaluate")
    if arguments.compare_base:
        with adapter_disabled(model):
            results["base"], base_probabilities = evaluate(config, model, prompt, examples, "base model")
        labels = np.array(examples.labels)
        correct = probabilities.argmax(1) == labels
        results["mcnemar"] = mcnemar_test(correct, base_probabilities.argmax(1) == labels)
    results["model_path"], results["data"] = str(arguments.model_path), str(data)
    print_table(results, f"{examples.num_truncated} cut to {config.data.max_length} tokens")
    print(json.dumps(results, ensure_ascii=False))
    if arguments.output_dir is not None:
        write_results(arguments.output_dir, results, examples, probabilities, prompt)


def warn_of_another_test_set(model_path: Path, data: Path) -> None:
    """Says on standard error that `data` is not the file that the adapter's run kept aside, where the run is known."""
    digests = run_digests(model_path, "data")
    if digests is not None and digests.get(data.name) != sha256(data):
        warn(
            f"warning: {data}: is not the file of the adapter's run, its SHA-256 is another; reviews that the adapter "
            "was trained on may be in it"
        )


def evaluate(
    config: Config, model: Qwen2ForCausalLM, prompt: ClassificationPrompt, examples: Examples, title: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics and (N, labels) probabilities, behind a progress bar."""
    started = time.perf_counter()
    with progress(title, len(examples.examples), "review") as bar:
        scores = score(
            model, examples.examples, prompt, config.train.per_device_eval_batch_size, on_progress=bar.update
        )
    if not math.isfinite(scores.loss):
        raise UserError(
            f"{title}: the loss is {scores.loss}, expected a number; use model.compute_dtype=float32, or an adapter "
            "from before its run went astray"
        )
    assert scores.probabilities is not None  # a prompt was given
    seconds = time.perf_counter() - started
    labels = np.array(examples.labels)
    metrics = classification_metrics(labels, scores.probabilities, prompt.labels, config.prompt.positive)
    speed = round(len(labels) / seconds, 2)
    return {**metrics, "loss": scores.loss, "reviews_per_s": speed}, scores.probabilities


def print_table(results: dict[str, Any], truncated: str) -> None:
    """The main figures with their intervals, and the base model's beside them where it was scored."""
    base = results.get("base")
    intervals = results["confidence_intervals_95"]
    print(f"{results['num_examples']} reviews of {results['data']}, {truncated}")
    print(f"{'':28}{'adapter':>10}  {'95 % interval':<18}" + (f"{'base':>10}" if base else ""))
    single = (
        "accuracy",
        "precision",
        "recall",
        "f1",
        "macro_f1",
        "roc_auc",
        "log_loss",
        "expected_calibration_error",
    )
    for name in (*single, "reviews_per_s"):
        low_high = "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""
        print(f"{name:28}{_figure(results[name])}  {low_high:<18}" + (_figure(base[name]) if base else ""))
    for name, figures in results["per_class"].items():
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items() if key != "support")
        print(f"{name}: {shown}  ({figures['support']} reviews)")
    print(f"confusion matrix (rows true, columns predicted): {results['confusion_matrix']}")
    if "mcnemar" in results:
        test = results["mcnemar"]
        print(f"McNemar: {test['b']} only the adapter right, {test['c']} only the base, p = {test['p_value']:.3g}")


def _figure(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4f}"


def write_results(
    directory: Path,
    results: dict[str, Any],
    examples: Examples,
    probabilities: np.ndarray,
    prompt: ClassificationPrompt,
) -> None:
    """predictions.jsonl, a line a review in the file's order, and evaluation.json.

    Raises:
        UserError: they cannot be written.
    """
    lines = []
    for index, (row, label, scores) in enumerate(zip(examples.rows, examples.labels, probabilities, strict=True)):
        line = {
            "index": index,
            "text": row.text,
            "label": prompt.labels[label],
            "prediction": prompt.labels[int(scores.argmax())],
            "probabilities": dict(zip(prompt.labels, map(float, scores), strict=True)),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    contents = {
        "predictions.jsonl": "".join(lines),
        "evaluation.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        for name, content in contents.items():
            write_file(directory / f"{WRITING}{name}", content.encode())
        for name in contents:
            (directory / f"{WRITING}{name}").replace(directory / name)
    except (StorageError, OSError) as error:
        for name in contents:
            with contextlib.suppress(OSError):
                (directory / f"{WRITING}{name}").unlink()
        raise UserError(
            f"{directory}: the results cannot be written ({error}); the figures stand above, for the files choose "
            "another --output_dir"
        ) from None


if __name__ == "__main__":
    run_script(main)

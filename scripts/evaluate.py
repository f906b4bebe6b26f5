"""Scores an adapter or a base model on labelled reviews: label probabilities from the logits, then the metrics.

Ends with one line of JSON: accuracy, precision, recall, f1 and more; with --compare_base the same under "base".
"""

from minilora.system.cli import (
    add_adapter_options,
    add_overrides,
    add_reading_options,
    begin_script,
    build_parser,
    run_script,
)

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters.attach import adapter_disabled
from minilora.build import choose_device
from minilora.config import Config
from minilora.data.examples import Examples, lacking_classes
from minilora.data.readers import data_files
from minilora.data.records import ReadOptions
from minilora.errors import UserError
from minilora.evaluation.metrics import classification_metrics, mcnemar_test, only_answer
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.reports.report import Report, ScoredExamples, render_report
from minilora.runs.load_run import KEYS_READ, LoadedRun, load_run_or_base
from minilora.runs.provenance import model_digests
from minilora.system.console import warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import StorageError, make_folder, replacing, sha256, write_file
from minilora.system.memory import peak_memory_bytes
from minilora.system.process import tuned_process
from minilora.system.torchrun import with_ranks

EXAMPLES = """\
examples:
  python scripts/evaluate.py --model_path outputs/checkpoints/final
  python scripts/evaluate.py --model_path outputs/checkpoints/final --data reviews.tsv --compare_base
  python scripts/evaluate.py --model_path some/peft/adapter --base Qwen/Qwen2.5-0.5B-Instruct --data reviews.tsv \\
      model.quantization=none model.compute_dtype=float32
  python scripts/evaluate.py --model_path Qwen/Qwen2.5-0.5B-Instruct --data reviews.tsv
  torchrun --nproc-per-node 4 scripts/evaluate.py --model_path outputs/checkpoints/final
"""


def main(ranks: Ranks = SINGLE_RANK) -> None:
    """Reads the command line, scores, writes the results."""
    parser = build_parser(__doc__, EXAMPLES)
    add_adapter_options(parser, "adapter, or a base model as it is: a folder or a name on the hub")
    parser.add_argument(
        "--data", type=Path, help="TSV, CSV, JSON, parquet, Excel ... (default: the test split of its run)"
    )
    add_reading_options(parser, "--data")
    parser.add_argument("--output_dir", type=Path, help="folder for predictions.jsonl, evaluation.json, report.html")
    parser.add_argument("--compare_base", action="store_true", help="also score the model without the adapter")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()

    if arguments.output_dir is not None:
        ranks.run_on_rank_0(lambda: make_folder(arguments.output_dir, "--output_dir"))
    with ranks.rank_0_first():
        trained = load_run_or_base(
            arguments.model_path, arguments.base, arguments.overrides, KEYS_READ, other_data=arguments.data is not None
        )
    if arguments.compare_base and trained.path is None:
        raise UserError(
            f"--compare_base: {arguments.model_path} is the base model itself; leave it out, or give an adapter"
        )
    prompt = trained.prompt
    data, examples = trained.read_reviews(arguments.data, ReadOptions.given(arguments, trained.columns))
    model = trained.load(arguments.allow_bin, ranks)

    results, probabilities = evaluate(trained, model, examples, title="evaluate", ranks=ranks)
    if arguments.compare_base:
        with adapter_disabled(model):
            results["base"], base_probabilities = evaluate(trained, model, examples, title="base model", ranks=ranks)
        labels = np.array(examples.labels)
        correct = probabilities.argmax(1) == labels
        results["mcnemar"] = mcnemar_test(correct, base_probabilities.argmax(1) == labels)
    if not ranks.is_rank_0:
        return
    answers = only_answer(str(data), results)
    for text in answers:
        warn(f"warning: {text}")
    results["warnings"] = [*lacking_classes({str(data): examples}, prompt.labels), *answers]
    results["model_path"], results["data"] = str(arguments.model_path), str(data)
    print_table(results, trained.kind, examples.describe())
    print(json.dumps(results, ensure_ascii=False))
    if arguments.output_dir is not None:
        report = render_report(report_of(trained, results, examples, probabilities))
        lines = prediction_lines(examples, probabilities, prompt.labels)
        write_results(arguments.output_dir, results, lines, report)


def evaluate(
    trained: LoadedRun, model: Qwen2ForCausalLM, examples: Examples, title: str, ranks: Ranks
) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics and (N, labels) probabilities; the ranks divide the examples."""
    started = time.perf_counter()
    loss, probabilities = trained.score(model, examples, title, ranks)
    seconds = time.perf_counter() - started
    labels, prompt = np.array(examples.labels), trained.prompt
    metrics = classification_metrics(labels, probabilities, prompt.labels, trained.config.prompt.positive)
    return {**metrics, "loss": loss, "reviews_per_s": round(len(labels) / seconds, 2)}, probabilities


def print_table(results: dict[str, Any], kind: str, truncated: str) -> None:
    """The main figures of an "adapter" or "base model" with their intervals, beside the base's if both were scored."""
    base = results.get("base")
    intervals = results["confidence_intervals_95"]
    print(f"{results['num_examples']} reviews of {results['data']}, {truncated}")
    print(f"{'':28}{kind:>10}  {'95 % interval':<18}" + (f"{'base':>10}" if base else ""))
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


def report_of(trained: LoadedRun, results: dict[str, Any], examples: Examples, probabilities: np.ndarray) -> Report:
    """The report of an evaluation; of the configuration only the keys that scoring reads."""
    config, data = trained.config, Path(results["data"])
    scored = {"base model": results["base"]} if "base" in results else {}
    scored[trained.kind] = results
    remark = f"{data}: {len(examples.examples):,} reviews, {examples.describe()}."
    if "mcnemar" in results:
        test = results["mcnemar"]
        remark += f" {test['b']:,} only the adapter has right, {test['c']:,} only the base model"
        remark += f" (McNemar's test: p = {test['p_value']:.3g})."
    return Report(
        title="Evaluation report",
        remark=remark,
        results=scored,
        examples=ScoredExamples(examples.records, np.array(examples.labels), probabilities, trained.prompt.labels),
        log=[],
        memory_estimate=None,
        peak_bytes=peak_memory_bytes(choose_device(config)),
        config={
            section: {name: value for name, value in keys.items() if f"{section}.{name}".startswith(KEYS_READ)}
            for section, keys in config.to_dict().items()
        },
        defaults=Config().to_dict(),
        facts={
            **({} if trained.path is None else {"adapter": trained.path}),
            "base model": {"name": config.model.name_or_path, "folder": trained.model_folder},
            "speed": f"{results['reviews_per_s']} reviews a second",
            "SHA-256 of the data": {file.name: sha256(file) for file in data_files(data)},
            "SHA-256 of the base model": model_digests(trained.model_folder),
        },
        warnings=results["warnings"],
    )


def prediction_lines(examples: Examples, probabilities: np.ndarray, labels: Sequence[str]) -> str:
    """predictions.jsonl: one line per review, in the file's order."""
    lines = []
    for index, (record, label, scores) in enumerate(zip(examples.records, examples.labels, probabilities, strict=True)):
        line = {
            "index": index,
            "text": record.text,
            "label": labels[label],
            "prediction": labels[int(scores.argmax())],
            "probabilities": dict(zip(labels, map(float, scores), strict=True)),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_results(directory: Path, results: dict[str, Any], lines: str, report: str) -> None:
    """Writes predictions.jsonl, evaluation.json and report.html; UserError if they cannot be written."""
    contents = {
        "predictions.jsonl": lines,
        "evaluation.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
        "report.html": report,
    }
    try:
        with contextlib.ExitStack() as stack:
            for name, content in contents.items():
                write_file(stack.enter_context(replacing(directory / name)), content.encode())
    except StorageError as error:
        raise UserError(
            f"{directory}: the results cannot be written ({error}); the figures are above; for the files choose "
            "another --output_dir"
        ) from None


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))

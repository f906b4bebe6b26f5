"""Scores an adapter or a base model on labelled reviews: label probabilities from the logits, then the metrics.

Ends with one line of JSON: accuracy, precision, recall, f1 and more; with --compare_base the same under "base".
Probabilities are at the adapter's temperature, which training fits, or --calibrate; "uncalibrated" has those without.
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
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters.attach import adapter_disabled
from minilora.adapters.peft_files import CALIBRATION, weights_file
from minilora.build import choose_device
from minilora.config import Config
from minilora.data.examples import Examples, lacking_classes
from minilora.data.readers import data_files
from minilora.data.records import ReadOptions
from minilora.errors import UserError
from minilora.evaluation.calibration import fit_temperature
from minilora.evaluation.metrics import final_metrics, mcnemar_test, only_answer
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.reports.evaluation_table import print_table
from minilora.reports.report import Report, ScoredExamples, render_report
from minilora.runs.calibration_file import Calibration, usable_calibration
from minilora.runs.load_run import KEYS_READ, LoadedRun, load_run_or_base
from minilora.runs.provenance import model_digests, read_provenance
from minilora.system.console import info, warn
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.files import GrowingFile, StorageError, make_folder, replacing, sha256
from minilora.system.manifest import add_file
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
  python scripts/evaluate.py --model_path some/peft/adapter --calibrate more_reviews.tsv --data reviews.tsv
  torchrun --nproc-per-node 4 scripts/evaluate.py --model_path outputs/checkpoints/final
"""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of labelled reviews, and the (N, labels) probabilities behind them."""

    results: dict[str, Any]
    probabilities: np.ndarray
    uncalibrated: np.ndarray | None  # without the temperature, where there is one


def main(ranks: Ranks = SINGLE_RANK) -> None:
    """Reads the command line, scores, writes the results."""
    arguments = parse_arguments()
    if arguments.output_dir is not None:
        ranks.run_on_rank_0(lambda: make_folder(arguments.output_dir, "--output_dir"))
    with ranks.rank_0_first():
        trained = load_run_or_base(
            arguments.model_path, arguments.base, arguments.overrides, KEYS_READ, other_data=arguments.data is not None
        )
    check_options(arguments, trained)
    reading = ReadOptions.given(arguments, trained.columns)
    path, calibration, fitted_on = reviews_file(arguments, trained), None, None
    if arguments.calibrate is not None:
        fitted_on = unlimited(arguments, trained).read_reviews(arguments.calibrate, reading)
    if fitted_on is not None and path == arguments.calibrate:
        data, examples = fitted_on
    else:
        data, examples = trained.read_reviews(path, reading)
    if fitted_on is None:
        calibration = usable_calibration(trained, arguments.raw)
    model = trained.load(arguments.allow_bin, ranks)
    if fitted_on is not None:
        calibration = calibrate(trained, model, fitted_on, ranks=ranks)

    found = evaluate(trained, model, examples, calibration=calibration, ranks=ranks)
    results = found.results
    if arguments.compare_base:
        with adapter_disabled(model):
            base = evaluate(trained, model, examples, title="base model", ranks=ranks)
        labels = np.array(examples.labels)
        correct = found.probabilities.argmax(1) == labels
        results["base"] = base.results
        results["mcnemar"] = mcnemar_test(correct, base.probabilities.argmax(1) == labels)
    if not ranks.is_rank_0:
        return
    show(arguments, trained, calibration, reviews=Scored(data, examples), found=found)


def parse_arguments() -> Namespace:
    """The command line, with its defaults."""
    parser = build_parser(__doc__, EXAMPLES)
    add_adapter_options(parser, "adapter, or a base model as it is: a folder or a name on the hub")
    parser.add_argument(
        "--data", type=Path, help="TSV, CSV, JSON, parquet, Excel ... (default: the test split of its run)"
    )
    add_reading_options(parser, "--data")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help=f"fit a temperature on these labelled reviews, read as --data; kept beside the adapter ({CALIBRATION})",
    )
    parser.add_argument("--raw", action="store_true", help="the model's own probabilities, without a temperature")
    parser.add_argument("--output_dir", type=Path, help="folder for predictions.jsonl, evaluation.json, report.html")
    parser.add_argument("--compare_base", action="store_true", help="also score the model without the adapter")
    add_overrides(parser)
    arguments: Namespace = parser.parse_intermixed_args()
    if arguments.raw and arguments.calibrate is not None:
        parser.error("--raw leaves out the temperature that --calibrate fits; give one of them")
    return arguments


def check_options(arguments: Namespace, trained: LoadedRun) -> None:
    """Refuses what needs an adapter for a base model, and to calibrate an adapter that is not in a folder here."""
    for name in ("compare_base", "calibrate"):
        if getattr(arguments, name) and trained.path is None:
            raise UserError(
                f"--{name}: {arguments.model_path} is the base model itself; leave it out, or give an adapter"
            )
    if arguments.calibrate is not None and trained.path is not None:
        if trained.path != arguments.model_path:
            raise UserError(
                f"--calibrate: {arguments.model_path} is on the hub, and {CALIBRATION} goes into the adapter's folder; "
                f"give one of your own: hf download {arguments.model_path.as_posix()} --local-dir adapter"
            )
        make_folder(trained.path, "--calibrate")


def reviews_file(arguments: Namespace, trained: LoadedRun) -> Path | None:
    """What is scored: --data, None for the test split of the adapter's run, or else the file of --calibrate."""
    has_test = (Path(trained.config.data.dir) / "test.jsonl").is_file()
    given: Path | None = arguments.data
    return arguments.calibrate if given is None and not has_test else given


def unlimited(arguments: Namespace, trained: LoadedRun) -> LoadedRun:
    """With all of a file's reviews, unless the command line limits them: the run's own limit is for its test split."""
    if any(override.startswith("data.max_test_examples=") for override in arguments.overrides):
        return trained
    config = trained.config
    return replace(trained, config=replace(config, data=replace(config.data, max_test_examples=None)))


def calibrate(trained: LoadedRun, model: Qwen2ForCausalLM, reviews: tuple[Path, Examples], ranks: Ranks) -> Calibration:
    """Fits the temperature on labelled reviews and writes calibration.json into the adapter's folder, on rank 0."""
    path, examples = reviews
    folder = trained.path
    assert folder is not None  # `check_options`
    if read_provenance(folder).data_sha256.get("train.jsonl") in [sha256(file) for file in data_files(path)]:
        warn(f"warning: {path}: is what the adapter was trained on, where it is too sure; give held-out reviews")
    _, probabilities = trained.score(model, examples, "calibrate", ranks)
    calibration = Calibration.of(
        fit_temperature(np.array(examples.labels), probabilities),
        trained.prompt,
        quantization=trained.config.model.quantization,
        weights=sha256(weights_file(folder)),
        model=model_digests(trained.model_folder),
        data={file.name: sha256(file) for file in data_files(path)},
    )
    ranks.run_on_rank_0(lambda: add_file(folder, CALIBRATION, calibration.to_bytes()))
    info(f"{folder / CALIBRATION}: {calibration.describe()}")
    return calibration


def evaluate(
    trained: LoadedRun,
    model: Qwen2ForCausalLM,
    examples: Examples,
    *,
    calibration: Calibration | None = None,
    title: str = "evaluate",
    ranks: Ranks,
) -> Evaluation:
    """Scores the reviews; the ranks divide them."""
    started = time.perf_counter()
    loss, raw = trained.score(model, examples, title, ranks)
    speed = {"reviews_per_s": round(len(raw) / (time.perf_counter() - started), 2)}
    temperature, config = None if calibration is None else calibration.temperature, trained.config.prompt
    metrics, probabilities = final_metrics(
        np.array(examples.labels), raw, temperature, label_names=trained.prompt.labels, positive=config.positive
    )
    return Evaluation({**metrics, "loss": loss, **speed}, probabilities, None if temperature is None else raw)


@dataclass(frozen=True)
class Scored:
    """A file and its labelled reviews."""

    path: Path
    examples: Examples


def show(
    arguments: Namespace, trained: LoadedRun, calibration: Calibration | None, reviews: Scored, found: Evaluation
) -> None:
    """Prints the results, and writes the files of --output_dir."""
    results, data, examples = found.results, reviews.path, reviews.examples
    remarks = only_answer(str(data), results)
    if calibration is not None and calibration.is_fitted_on(data_files(data)):
        remarks.append(f"{data}: the temperature was fitted on this file, so figures of calibration here flatter it")
    for text in remarks:
        warn(f"warning: {text}")
    results["warnings"] = [*lacking_classes({str(data): examples}, trained.prompt.labels), *remarks]
    results["model_path"], results["data"] = str(arguments.model_path), str(data)
    print_table(results, trained.kind, examples.describe())
    print(json.dumps(results, ensure_ascii=False))
    if arguments.output_dir is not None:
        scored = ScoredExamples(
            examples.records,
            np.array(examples.labels),
            found.probabilities,
            trained.prompt.labels,
            positive=trained.config.prompt.positive,
            uncalibrated=found.uncalibrated,
            calibration="" if calibration is None else calibration.describe(),
        )
        report = render_report(report_of(trained, results, examples, scored))
        lines = prediction_lines(examples, found.probabilities, trained.prompt.labels)
        write_results(arguments.output_dir, results, lines, report)


def report_of(
    trained: LoadedRun, results: dict[str, Any], examples: Examples, scored_examples: ScoredExamples
) -> Report:
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
        examples=scored_examples,
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


def prediction_lines(examples: Examples, probabilities: np.ndarray, labels: Sequence[str]) -> Iterator[bytes]:
    """predictions.jsonl: one line per review, in the file's order."""
    for index, (record, label, scores) in enumerate(zip(examples.records, examples.labels, probabilities, strict=True)):
        line = {
            "index": index,
            "text": record.text,
            "label": labels[label],
            "prediction": labels[int(scores.argmax())],
            "probabilities": dict(zip(labels, map(float, scores), strict=True)),
        }
        yield f"{json.dumps(line, ensure_ascii=False)}\n".encode()


def write_results(directory: Path, results: dict[str, Any], lines: Iterable[bytes], report: str) -> None:
    """Writes predictions.jsonl, evaluation.json and report.html; UserError if they cannot be written."""
    evaluation = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    contents = {"predictions.jsonl": lines, "evaluation.json": [evaluation.encode()], "report.html": [report.encode()]}
    try:
        with contextlib.ExitStack() as stack:
            for name, pieces in contents.items():
                temporary = stack.enter_context(replacing(directory / name))
                with contextlib.closing(GrowingFile(temporary)) as file:
                    for piece in pieces:
                        file.append(piece)
                    file.sync()
    except StorageError as error:
        raise UserError(
            f"{directory}: the results cannot be written ({error}); the figures are above; for the files choose "
            "another --output_dir"
        ) from None


if __name__ == "__main__":
    with tuned_process():
        run_script(with_ranks(main))

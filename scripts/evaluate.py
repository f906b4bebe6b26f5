"""Scores an adapter on labelled reviews: label probabilities from the logits, then the metrics.

Ends with one line of JSON: accuracy, precision, recall, f1 and more; with --compare-base the same under "base".
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.adapter import damage_of_adapter, load_adapter, read_adapter_config
from minilora.build import (
    Examples,
    build_examples,
    build_model,
    build_prompt,
    choose_device,
    choose_dtype,
    read_split,
)
from minilora.config import Config, config_from_dict
from minilora.errors import UserError
from minilora.evaluate import score
from minilora.files import WRITING, StorageError, make_folder, read_json, sha256, write_file
from minilora.hub import fetch_model
from minilora.lora import adapter_disabled
from minilora.manifest import MANIFEST
from minilora.metrics import classification_metrics, mcnemar_test
from minilora.model import Qwen2ForCausalLM
from minilora.origin import model_digests, read_saved_config
from minilora.prompt import ChatTokenizer, ClassificationPrompt
from minilora.rows import ENCODINGS, read_rows
from minilora.script import run_script

# Beginnings of the keys that scoring reads: an adapter's shape stands in its own files, and nothing is trained.
KEYS_READ = (
    "model.",
    "prompt.",
    "data.dir",
    "data.max_length",
    "data.max_test_examples",
    "train.per_device_eval_batch_size",
)
EXAMPLES = """\
examples:
  python scripts/evaluate.py --model_path outputs/checkpoints/final
  python scripts/evaluate.py --model_path outputs/checkpoints/final --data reviews.tsv --compare-base
  python scripts/evaluate.py --model_path some/peft/adapter --base Qwen/Qwen2.5-0.5B-Instruct --data reviews.tsv \\
      model.quantization=none model.compute_dtype=float32
"""


def main() -> None:
    """Reads the command line, scores, writes the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--data", type=Path, help="TSV, CSV, JSONL or parquet (default: the test split of its run)")
    parser.add_argument("--encoding", choices=ENCODINGS, default="utf-8", help="of --data, where it is a text file")
    parser.add_argument("--allow-bin", action="store_true", help="read an adapter_model.bin, a pickle, if you trust it")
    parser.add_argument("--base", help="base model, where it is not the one that the adapter names")
    parser.add_argument("--output_dir", type=Path, help="folder for predictions.jsonl and evaluation.json")
    parser.add_argument("--compare-base", action="store_true", help="score the model without the adapter as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys as in train.py")
    arguments = parser.parse_intermixed_args()

    config = read_run_config(arguments.model_path, arguments.base, arguments.data is not None, arguments.overrides)
    if arguments.output_dir is not None:
        make_folder(arguments.output_dir, "--output_dir")
    model_folder = fetch_model(config.model.name_or_path, config.model.revision)
    refuse_another_base(arguments.model_path, model_folder, arguments.base is not None)
    prompt = build_prompt(config, ChatTokenizer(model_folder))
    if arguments.data is None:
        data = Path(config.data.dir) / "test.jsonl"
        examples = read_split(config, prompt, "test")
        warn_of_another_test_set(arguments.model_path, data)
    else:
        data = arguments.data
        examples = build_examples(read_rows(data, encoding=arguments.encoding)[: config.data.max_test_examples], prompt)
    if not examples.examples or not examples.labelled:
        raise UserError(f"{data}: holds no labelled review or unlabelled ones; give a file with a text and a label")
    device = choose_device(config)
    model = build_model(config, model_folder, device, choose_dtype(config, device))
    load_adapter(model, arguments.model_path, arguments.allow_bin)

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


def read_run_config(model_path: Path, base: str | None, other_data: bool, overrides: list[str]) -> Config:
    """The configuration of the adapter's own run where it left one, else the defaults, on the adapter's base.

    Args:
        model_path: a final adapter, a checkpoint, or another program's adapter.
        base: base model to take in place of the adapter's own.
        other_data: what is scored is not the run's test split, so the run's limit on that does not apply.
        overrides: `section.key=value` from the command line.
    """
    if not model_path.is_dir():
        raise UserError(f"{model_path}: is not a folder; give the one that training wrote, as checkpoints/final")
    problem = damage_of_adapter(model_path) if (model_path / MANIFEST).is_file() else None
    if problem is not None:
        raise UserError(f"{model_path}: is damaged ({problem}); take another copy of it")
    named = read_adapter_config(model_path)
    files = [path for name in ("training_args.json", "state.json") if (path := model_path / name).is_file()]
    content = read_saved_config(files[0]) if files else {}
    where = str(files[0] if files else model_path / "adapter_config.json")
    model, data = content.get("model", {}), content.get("data", {})
    if base:
        model = {**model, "name_or_path": base, "revision": None}
    elif model.get("name_or_path") is None:
        model = {**model, "name_or_path": named.base_model_name_or_path, "revision": named.revision}
    if model["name_or_path"] is None:
        raise UserError(f"{model_path}: adapter_config.json names no base model; give it with --base")
    if other_data:
        data = {**data, "max_test_examples": None}
    config = config_from_dict({**content, "model": model, "data": data}, overrides, where)
    for override in overrides:
        if not override.startswith(KEYS_READ):
            name = override.partition("=")[0]
            print(f"note: {name} changes nothing here: the adapter is as its files say", file=sys.stderr)
    return config


def run_digests(model_path: Path, what: str) -> dict[str, str] | None:
    """SHA-256 by file name of the "data" or "model" that the adapter's run was made from, None where it is unknown."""
    known = [path for name in ("metrics.json", "state.json") if (path := model_path / name).is_file()]
    content = read_json(known[0]) if known else None
    digests = content.get(f"{what}_sha256") if isinstance(content, dict) else None
    return digests if isinstance(digests, dict) else None


def refuse_another_base(model_path: Path, model_folder: Path, is_asked_for: bool) -> None:
    """Says that a base model is not the one that the adapter was trained on, where its run is known.

    Raises:
        UserError: it is not, and nobody asked for it with --base.
    """
    before = run_digests(model_path, "model")
    now = model_digests(model_folder) if before is not None else {}
    changed = sorted(name for name in {*(before or {}), *now} if (before or {}).get(name) != now.get(name))
    if not changed:
        return
    problem = f"{model_path}: was trained on another base model than {model_folder} (SHA-256 of {', '.join(changed)})"
    if not is_asked_for:
        raise UserError(f"{problem}; name its own with --base, or this one to have it scored all the same")
    print(f"warning: {problem}", file=sys.stderr)


def warn_of_another_test_set(model_path: Path, data: Path) -> None:
    """Says on standard error that `data` is not the file that the adapter's run kept aside, where the run is known."""
    digests = run_digests(model_path, "data")
    if digests is not None and digests.get(data.name) != sha256(data):
        print(
            f"warning: {data}: is not the file of the adapter's run, its SHA-256 is another; reviews that the adapter "
            "was trained on may be in it",
            file=sys.stderr,
        )


def evaluate(
    config: Config, model: Qwen2ForCausalLM, prompt: ClassificationPrompt, examples: Examples, title: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Metrics and (N, labels) probabilities, behind a progress bar."""
    started = time.perf_counter()
    with tqdm(total=len(examples.examples), desc=title, unit="review", file=sys.stderr) as bar:
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

"""How a run ends: scored on the test set, its adapter in a folder of its own, read back before anybody relies on it.

checkpoints/final/
    adapter_config.json, adapter_model.safetensors    as peft reads them
    training_args.json                                the resolved configuration
    metrics.json                                      test set before and after, best validation, what it was made from
    README.md, manifest.json                          a model card; size and SHA-256 of each file
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapter import adapter_files, damage_of_adapter, load_adapter, load_adapter_weights
from minilora.attach import DEFAULT, iter_lora_weights, remove_adapter, set_adapter
from minilora.batch import pack
from minilora.build import Examples, adapter_config
from minilora.checkpoint import checkpoint_path
from minilora.config import LENGTHS, Config
from minilora.console import progress, say, warn
from minilora.errors import UserError
from minilora.evaluate import Scores, score
from minilora.files import json_bytes
from minilora.manifest import write_folder
from minilora.metrics import classification_metrics
from minilora.modelcard import render_model_card
from minilora.origin import current_origin, read_origin, refuse_another_run
from minilora.run import Run, check_best, share_adapter
from minilora.runlog import plot_metrics

CHECKED_EXAMPLES = 8  # whose hidden states the adapter that was written has to give
# Keys that change nothing in the course of a run, and yet what is in its final folder.
FINAL_KEYS = ("do_predict", "load_best_model_at_end", "save_format", "save_dtype", "portable")


def check_finished(final: Path, config: Config, model_folder: Path, ranks: int = 1) -> None:
    """Raises UserError where a finished run is not the one that is asked for, or not as it was written."""
    problem = damage_of_adapter(final)
    if problem is not None:
        raise UserError(
            f"{final}: is damaged ({problem}); move that folder away to have it written again from the checkpoints"
        )
    before, now = read_origin(final), current_origin(config, model_folder, ranks)
    refuse_another_run(before, now, config, final.parent.parent)
    for name in (*FINAL_KEYS, *LENGTHS):
        old, new = before.config["train"].get(name), now.config["train"][name]
        if old != new:
            raise UserError(
                f"train.{name}: {new!r} comes too late, {final} was written with {old!r}; move that folder away to "
                "have it written again from the checkpoints, or put the key back"
            )


def finish(run: Run, final: Path) -> Path:
    """Writes the final folder, from the best checkpoint if so configured, and the plot."""
    train = run.config.train
    step = run.state.step
    if train.load_best_model_at_end and run.state.best_step != step:
        step = run.state.best_step
        run.ranks.once(lambda: _load_best(run))
        share_adapter(run.model, run.ranks)
    after = score_test_set(run, "test after training") if train.do_predict else None
    run.ranks.once(lambda: _write_final(run, final, step, after))
    return final


def _load_best(run: Run) -> None:
    check_best(run.config, run.checkpoints, run.state)
    load_adapter_weights(run.model, checkpoint_path(run.checkpoints, run.state.best_step))


def _write_final(run: Run, final: Path, step: int, after: dict[str, Any] | None) -> None:
    """The final folder, and the plot.

    Args:
        run: at its end.
        final: the folder.
        step: whose adapter the model has.
        after: metrics of the test set with it.
    """
    train = run.config.train
    base = run.prompt.tokenizer.folder
    results = {
        "step": step,
        "skipped_steps": run.state.skipped_steps,
        "validation": {run.best_by: run.state.best_metric, "step": run.state.best_step},
        "test_before": run.state.test_before,
        "test": after,
        "data_sha256": run.state.data_sha256,
        "model_sha256": run.state.model_sha256,
        "model_bytes": {name: (base / name).stat().st_size for name in run.state.model_sha256},
        "ranks": run.ranks.size,
        "model_revision": base.name if base.parent.name == "snapshots" else None,  # the commit, in the hub's cache
    }
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[train.save_dtype]

    def files() -> Iterator[tuple[str, bytes]]:
        yield from adapter_files(run.model, adapter_config(run.config), train.save_format, dtype, train.portable)
        yield "training_args.json", json_bytes(run.config.to_dict())
        yield "metrics.json", json_bytes(results)
        yield "README.md", render_model_card(run.config.to_dict(), results, run.splits["train"].labelled).encode()

    write_folder(final, files(), {"step": step}, lambda folder: _check_saved(run, folder, dtype))
    try:
        plot = plot_metrics(run.directory)
    except OSError as error:  # the run is done, and the numbers are in metrics.jsonl
        plot = None
        warn(f"note: {run.directory / 'loss.png'} cannot be written ({error.strerror})")
    if after is not None:
        say(f"test after training:  {in_words(after)}")
    say(f"final adapter (step {step}): {final}" + (f"; plot: {plot}" if plot else ""))


def _check_saved(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Reads the written adapter as a second one over the base: it has to give the hidden states of the trained one.

    Nobody looks at the file before it is used elsewhere, where a damaged one is only a model that does worse. The
    trained values are rounded to `dtype` first, as in the file; then both agree to the bit, but for a portable
    adapter, whose B has the scale in it.
    """
    for _, w in iter_lora_weights(run.model):
        for tensor in (*w.parameters(), *w.buffers()):
            tensor.data.copy_(tensor.to(dtype))
    expected, what = _hidden_states(run), "its values differ"
    tolerance = 0.02 * expected.abs().max() if run.config.train.portable else 0.0
    try:
        load_adapter(run.model, folder, allow_bin=True, name="read back")  # just written by this process
        found = _hidden_states(run)
        if not torch.isfinite(found).all():
            what = "its hidden states are no numbers"
        is_equal = bool(((found - expected).abs() <= tolerance).all())
    except UserError as error:
        is_equal, what = False, str(error)
    finally:
        remove_adapter(run.model, "read back")
        set_adapter(run.model, DEFAULT)
    if not is_equal:
        raise UserError(
            f"{folder}: read back, the adapter is not the one that was trained; check the disk, and run the same "
            f"command again, which writes it from the last checkpoint\n  {what}"
        )


@torch.inference_mode()
def _hidden_states(run: Run) -> torch.Tensor:
    """(S, C) of the answers to a few validation examples; they decide the logits."""
    batch = pack(run.splits["validation"].examples[:CHECKED_EXAMPLES]).to(run.device)
    hidden: torch.Tensor = run.model.eval()(batch)
    return hidden.float()


def score_split(
    run: Run,
    name: str,
    on_progress: Callable[[int], object] | None = None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Loss of a split, and its metrics where it is labelled; the ranks share the work."""
    split = run.splits[name]
    prompt = run.prompt if split.labelled else None
    size = run.config.train.per_device_eval_batch_size
    scores = score(run.model, split.examples, prompt, size, on_progress, run.ranks, interruptible)
    check_finite(run, f"{name} loss", scores.loss)
    return run.ranks.once(lambda: _metrics(run, split, scores))  # what decides which checkpoint is best is one number


def _metrics(run: Run, split: Examples, scores: Scores) -> dict[str, Any]:
    metrics: dict[str, Any] = {"loss": scores.loss, "num_examples": len(split.examples)}
    if scores.probabilities is not None:
        labels = np.array(split.labels)
        metrics |= classification_metrics(labels, scores.probabilities, run.prompt.labels, run.config.prompt.positive)
    return metrics


def score_test_set(run: Run, title: str) -> dict[str, Any]:
    """Loss and metrics of the test set, behind a progress bar of its own."""
    with progress(title, len(run.splits["test"].examples), "review") as bar:
        return score_split(run, "test", bar.update)


def check_finite(run: Run, what: str, value: float) -> None:
    """Raises UserError for a loss that is no number; here it is not one row's fault, the adapter is ruined."""
    if math.isfinite(value):
        return
    train, model = run.config.train, run.config.model
    raise UserError(
        f"step {run.state.step}: the {what} is {value}, expected a number; begin anew with --restart and a lower "
        f"train.learning_rate (it is {train.learning_rate:g}) or with another model.compute_dtype (it is "
        f"{model.compute_dtype}). The newest checkpoint that stays: {run.newest_checkpoint}"
    )


def in_words(metrics: dict[str, Any]) -> str:
    """The few numbers that a line on the screen has room for."""
    names = ("loss", "accuracy", "f1")
    shown = ((name, metrics.get(name, metrics.get(f"eval_{name}"))) for name in names)
    return "  ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)

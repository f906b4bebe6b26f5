"""The loop: resumable at every step and within a validation, non-finite steps skipped, saves made up, ranks agreed."""

import dataclasses
import json
import math
import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minilora.errors import UserError
from minilora.qlora import optim
from minilora.qlora.step import StepResult
from minilora.runs import folder as folder_module
from minilora.runs import scoring, train
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import RunLog, read_metrics
from minilora.runs.run import Run
from minilora.runs.trackers import Tracker
from minilora.runs.train import fit
from minilora.system.distributed import Ranks
from minilora.system.files import StorageError, json_bytes
from minilora.system.signals import Interrupted
from tests.conftest import make_reviews
from tests.runs.conftest import (
    CONSTANT,
    STEPS,
    Fit,
    change_steps,
    contents,
    lasting,
    make_config,
    raise_at,
    read,
    remove_folders,
    rewrite,
    saved_steps,
    spoil_steps,
)


def test_the_test_before_training_is_the_base_models_whenever_it_is_asked_for(final: Path, run: Fit) -> None:
    expected = read(final / "metrics.json")
    assert expected["test_before"] != expected["test"]
    remove_folders(final, 1, 2, 3, 4)
    run(**{"train.do_predict": False})
    remove_folders(final)
    run()  # the adapter is trained by now
    assert read(final / "metrics.json") == expected


def test_ranks_that_no_longer_agree_save_nothing(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    class Two(Ranks):
        """Rank 0 of two, of which the other has the same facts except its adapter."""

        def all_gather(self, value: Any) -> list[Any]:
            host, facts = value if isinstance(value, list) and len(value) == 2 else (None, None)
            return [value, [host, {**facts, "adapter": "another"}] if facts and "adapter" in facts else value]

    with pytest.raises(UserError, match=r"rank 1 on .+ another adapter than rank 0; step 1 is not saved"):
        fit(make_config(data, tmp_path / "run", **{"train.do_predict": False}), tiny_checkpoint(), ranks=Two(0, 2))
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_step_with_a_non_finite_loss_is_skipped_logged_and_counted(
    run: Fit, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_steps(monkeypatch, 3)
    final = run()
    assert read(final / "metrics.json")["skipped_steps"] == 1
    entries = read_metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries if "skipped" in entry] == [3]
    assert (entries[2]["train_loss"], entries[2]["grad_norm"], entries[2]["skipped"]) == (None, None, True)
    found = [re.fullmatch(rf"{re.escape(str(data))}/train\.jsonl:(\d+)", where) for where in entries[2]["rows"]]
    assert len({match[1] for match in found if match}) == 4
    assert "step 3: loss nan, gradient norm nan: skipped" in capsys.readouterr().out
    assert [path.name[-1] for path in list_checkpoints(final.parent)] == ["1", "2", "4"]
    state = read(final.with_name("step-000004") / "state.json")
    assert (state["skipped_steps"], state["skipped_in_a_row"], state["samples_seen"]) == (1, 0, 16)


def test_a_run_that_skipped_a_step_resumes_to_the_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, 3)
    final = run()
    expected, log = contents(final), lasting(tmp_path / "run")
    for steps in ((4,), (4, 2)):
        remove_folders(final, *steps)
        assert contents(run()) == expected
        assert lasting(tmp_path / "run") == log


@pytest.mark.parametrize(
    ("spoiled", "saved"), [((), [2, 4, 6, 7]), ((4,), [2, 5, 6, 7]), ((4, 5), [2, 6, 7]), ((7,), [2, 4, 6, 7])]
)
def test_a_save_that_a_skipped_step_prevents_is_made_up_at_the_next_good_step_and_the_end_is_always_saved(
    run: Fit, monkeypatch: pytest.MonkeyPatch, spoiled: tuple[int, ...], saved: list[int]
) -> None:
    spoil_steps(monkeypatch, *spoiled)
    final = run(**{"train.max_steps": 7, "train.save_steps": 2, "train.eval_steps": 100})
    assert saved_steps(final) == saved


def test_a_skipped_step_is_logged_however_rarely_others_are(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, 1, 3)
    final = run(**{"train.logging_steps": 100, "train.eval_steps": 100})
    entries = read_metrics(final.parent.parent)
    assert [(entry["step"], "skipped" in entry) for entry in entries] == [(1, True), (3, True), (4, False)]


def test_steps_that_were_skipped_before_a_resumption_count_against_a_limit_that_became_lower(
    run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil_steps(patch, 2, 3)
        raise_at(patch, 4, Interrupted(signal.SIGTERM))
        with pytest.raises(Interrupted, match="saved step 3"):
            run(**{"train.eval_steps": 100})
    with monkeypatch.context() as patch:
        spoil_steps(patch, 4)
        with pytest.raises(UserError, match=r"step 4: .+ 3 steps in a row"):
            run(**{"train.eval_steps": 100, "train.max_skipped_steps": 2})
    assert read(run(**{"train.eval_steps": 100, "train.max_skipped_steps": 2}) / "metrics.json")["skipped_steps"] == 2


@pytest.mark.parametrize(("loss", "is_search"), [(0.5, True), (math.nan, False)])
def test_an_overflow_that_finds_the_loss_scale_is_no_skipped_step_in_a_row(
    run: Fit, monkeypatch: pytest.MonkeyPatch, loss: float, is_search: bool
) -> None:
    plain = folder_module.open_run

    def scaled(*arguments: Any) -> Run:
        return dataclasses.replace(plain(*arguments), scaler=torch.amp.GradScaler("cpu"))

    monkeypatch.setattr(folder_module, "open_run", scaled)
    change_steps(monkeypatch, lambda *_: StepResult(loss, math.inf, False))
    keys = {"train.max_skipped_steps": 2, "train.eval_steps": 100}
    if is_search:
        assert read(run(**keys) / "metrics.json")["skipped_steps"] == STEPS
    else:
        with pytest.raises(UserError, match=r"step 2: .+ 2 steps in a row"):
            run(**keys)


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_the_run(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, 1, 3, 5)
    final = run(**{"train.max_steps": 6, "train.max_skipped_steps": 2})
    assert read(final / "metrics.json")["skipped_steps"] == 3


def score_as(monkeypatch: pytest.MonkeyPatch, *scores: dict[str, Any]) -> None:
    """What the validations of a run find, one after another."""
    found = iter(scores)
    monkeypatch.setattr(train, "score_split", lambda *_, **__: ({"num_examples": 12, **next(found)}, None))


def test_of_equal_f1_the_lower_loss_is_better(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [{"f1": f1, "loss": loss} for f1, loss in ((0.5, 1.0), (0.5, 0.8), (0.4, 0.1), (0.5, 0.9))]
    score_as(monkeypatch, *scores)
    keys = {"train.eval_steps": 1, "train.do_predict": False}
    final = run(**keys)
    assert read(final / "metrics.json")["validation"] == {"eval_f1": 0.5, "step": 2}
    assert [read(final.with_name(f"step-00000{n}") / "state.json")["best_step"] for n in (1, 2, 3, 4)] == [1, 2, 2, 2]
    # A checkpoint of a version that did not know the loss: what is no better by F1 does not take its place.
    remove_folders(final, 3, 4)
    state = read(final.with_name("step-000002") / "state.json")
    assert state.pop("best_loss") == 0.8
    rewrite(final.with_name("step-000002"), "state.json", json_bytes(state))
    score_as(monkeypatch, {"f1": 0.5, "loss": 0.1}, {"f1": 0.6, "loss": 9.0})
    assert read(run(**keys) / "metrics.json")["validation"] == {"eval_f1": 0.6, "step": 4}


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "accuracy", "loss"])
def test_whatever_decides_an_equal_score_does_not_keep_the_first_checkpoint_best(
    run: Fit, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """0 throughout is the F1 of a class of which validation has no example."""
    scores = [(0.0, 1.0), (0.0, 0.8), (0.0, 0.9), (0.0, 0.7)]
    score_as(monkeypatch, *({"f1": at, "macro_f1": at, "accuracy": at, "loss": loss} for at, loss in scores))
    keys = {"train.metric_for_best_model": f"eval_{metric}", "train.eval_steps": 1, "train.do_predict": False}
    final = run(**keys, **{"train.early_stopping_patience": 2})
    assert read(final / "metrics.json")["validation"] == {f"eval_{metric}": 0.7 if metric == "loss" else 0.0, "step": 4}
    assert [read(final.with_name(f"step-00000{n}") / "state.json")["best_step"] for n in (1, 2, 3, 4)] == [1, 2, 2, 4]


@pytest.mark.parametrize("metric", ["f1", "macro_f1", "accuracy"])
def test_the_higher_score_is_better_whatever_the_others_are(
    run: Fit, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    others = {"f1": 0.5, "macro_f1": 0.5, "accuracy": 0.5}
    score_as(monkeypatch, *({**others, metric: at, "loss": at} for at in (0.6, 0.8, 0.7, 0.8)))
    keys = {"train.metric_for_best_model": f"eval_{metric}", "train.eval_steps": 1, "train.do_predict": False}
    assert read(run(**keys) / "metrics.json")["validation"] == {f"eval_{metric}": 0.8, "step": 2}


def keep_label(path: Path, label: int) -> None:
    """Leaves the records of one label in a split."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if f'"label": {label}' in line), "utf-8")


def test_a_validation_set_that_lacks_a_class_is_warned_of_and_compared_by_loss(
    run: Fit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_label(data / "validation.jsonl", 1)
    final = run()
    printed = capsys.readouterr()
    missing = "none of 6 examples is 负面: nothing is learned or measured of it there"
    assert f"warning: {data}/validation.jsonl: {missing}\n" in printed.err
    assert "train.jsonl: none" not in printed.err
    assert "eval_loss decides which checkpoint is best" in printed.out
    assert printed.out.count("labels 0, 1 are read as indices: 0 = 负面, 1 = 正面\n") == 1
    losses = {entry["step"]: entry["eval_loss"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert read(final / "metrics.json")["validation"] == {"eval_loss": losses[best], "step": best}
    assert f"<mark>validation.jsonl: {missing}</mark>" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_an_f1_that_is_asked_for_and_always_0_is_said_and_compared_by_loss(
    run: Fit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_label(data / "validation.jsonl", 0)
    final = run(**{"train.metric_for_best_model": "eval_f1", "train.eval_steps": 1})
    assert "eval_loss decides which checkpoint is best" in capsys.readouterr().out
    losses = {entry["step"]: entry["eval_loss"] for entry in read_metrics(tmp_path / "run")}
    best = min(losses, key=lambda step: losses[step])
    assert best > 1
    assert read(final / "metrics.json")["validation"] == {"eval_f1": 0.0, "step": best}


def test_a_best_f1_of_an_earlier_version_is_not_compared_with_a_loss(run: Fit, data: Path) -> None:
    keep_label(data / "validation.jsonl", 1)
    final = run()
    remove_folders(final, 3, 4)
    state = read(final.with_name("step-000002") / "state.json")
    del state["best_loss"]
    before = {**state, "best_metric": 1.0, "best_step": 2}  # F1 of one class, which no loss of this model is below
    rewrite(final.with_name("step-000002"), "state.json", json_bytes(before))
    run()
    assert read(final.with_name("step-000004") / "state.json")["best_step"] == 4


def test_one_answer_to_all_reviews_is_said(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = scoring.score

    def one_sided(*arguments: Any) -> Any:
        scores = plain(*arguments)
        return dataclasses.replace(scores, probabilities=np.tile([0.25, 0.75], (len(scores.probabilities), 1)))

    monkeypatch.setattr(scoring, "score", one_sided)
    run()
    printed = capsys.readouterr()
    assert "step 2: validation: all 12 predictions are 正面\n" in printed.out
    assert "warning: test after training: all 12 predictions are 正面\n" in printed.err
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<mark>test.jsonl: all 12 predictions are 正面</mark>" in report


def test_a_limited_run_of_an_earlier_version_continues_with_the_first_records_when_told_so(run: Fit) -> None:
    limit = {"data.max_train_examples": 10, "data.max_test_examples": 4}
    first = {**limit, "data.sample": "first"}
    final = run(**first)
    expected = contents(final)
    remove_folders(final, 3, 4)
    checkpoint = final.with_name("step-000002")
    state = read(checkpoint / "state.json")
    del state["config"]["data"]["sample"]
    rewrite(checkpoint, "state.json", json_bytes(state))
    with pytest.raises(UserError, match=r'data\.sample: "first" -> "stratified" .*data\.sample=first'):
        run(**limit)
    assert contents(run(**first)) == expected


def test_an_infinite_gradient_is_skipped_as_well(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    change_steps(monkeypatch, lambda *_: StepResult(0.5, math.inf, False))
    final = run()
    assert read(final / "metrics.json")["step"] == 2
    entries = read_metrics(final.parent.parent)
    assert [(e["train_loss"], e["grad_norm"], e["skipped"]) for e in entries] == [(0.5, None, True)] * STEPS
    assert saved_steps(final) == [2, 4]  # the first validation, the end


needs_signals = pytest.mark.skipif(os.name == "nt", reason="a process of Windows cannot send itself a signal")


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["first step", "step", "validation", "last validation"])
def test_a_signal_ends_the_run_where_it_can_resume_to_the_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    expected = run(**{"train.output_dir": tmp_path / "whole", "train.eval_steps": 3})
    calls: Iterator[int] = iter(range(100))
    when = {"first step": 0, "step": 2, "validation": 1, "last validation": 2}[moment]  # a test comes before all
    done = {"first step": 0, "step": 2, "validation": 3, "last validation": 4}[moment]
    module, name = (scoring, "score") if "validation" in moment else (train, "train_step")
    plain = getattr(module, name)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), number)
        return plain(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(Interrupted) as caught:
            run(**{"train.eval_steps": 3, "train.save_steps": 100})
    assert caught.value.signum == number
    assert (f"saved step {done}" if done else "nothing done") in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1:] == (
        [f"step-{done:06d}"] if done else []
    )
    final = run(**{"train.eval_steps": 3, "train.save_steps": 100})
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (final / name).read_bytes() == (expected / name).read_bytes()
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


@needs_signals
def test_a_validation_that_is_repeated_is_logged_once(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"train.do_predict": False, "train.save_steps": 100}
    run(**keys, **{"train.output_dir": tmp_path / "whole"})
    plain = scoring.score

    def interrupted(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **more)

    def killed(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", interrupted)
        with pytest.raises(Interrupted, match="saved step 2"):
            run(**keys)
    with monkeypatch.context() as patch:  # the line is written, the checkpoint behind it is not
        patch.setattr(train, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(**keys)
    run(**keys)
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


@needs_signals
def test_a_run_that_was_stopped_in_its_last_validation_may_become_longer(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**CONSTANT, "train.max_steps": 3, "train.do_predict": False}
    plain = scoring.score

    def interrupted(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)  # without do_predict the first score is the last validation's
        return plain(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", interrupted)
        with pytest.raises(Interrupted, match="saved step 3"):
            run(**{**keys, "train.eval_steps": 5})
    steps: list[int] = []
    change_steps(monkeypatch, lambda _, settings: steps.append(settings.step))
    final = run(**{**keys, "train.eval_steps": 5, "train.max_steps": 6})
    assert steps == [4, 5, 6]
    assert read(final.with_name("step-000006") / "state.json")["step"] == 6


def test_a_tracker_has_every_entry_of_the_log_and_hears_of_an_interruption(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Tracker):
        def write(self, entry: dict[str, Any]) -> None:
            heard.append(dict(entry))

        def close(self, is_done: bool) -> None:
            ends.append(is_done)

    heard: list[dict[str, Any]] = []
    ends: list[bool] = []
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(folder_module, "open_tracker", lambda *arguments: opened.append(arguments) or Notes())
    with monkeypatch.context() as patch:
        raise_at(patch, 3, Interrupted(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run()
    run()
    assert [step for _, _, step, _ in opened] == [0, 2]
    assert ends == [False, True]
    assert heard == read_metrics(tmp_path / "run")


def weights(final: Path) -> tuple[bytes, bytes]:
    return (final / "adapter_model.safetensors").read_bytes(), (final / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        KeyboardInterrupt(),
        UserError("what a library found"),
        BrokenPipeError(),
        AssertionError(),
    ],
    ids=repr,
)
def test_whatever_ends_the_loop_the_steps_done_are_saved_and_the_run_resumes_to_the_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    keys = {"train.save_steps": 100, "train.eval_steps": 100}
    expected = run(**{"train.output_dir": tmp_path / "whole"}, **keys)
    raised = UserError if isinstance(error, MemoryError | torch.OutOfMemoryError) else type(error)
    with monkeypatch.context() as patch:
        raise_at(patch, 4, error)
        with pytest.raises(raised) as caught:
            run(**keys)
    assert error in (caught.value, caught.value.__cause__)
    assert saved_steps(expected.parents[2] / "run" / "checkpoints" / "final") == [3]
    assert weights(run(**keys)) == weights(expected)
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def test_an_error_of_the_save_that_follows_another_error_is_only_noted(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise StorageError("No space left")

    monkeypatch.setattr(train, "save_checkpoint", fail)
    raise_at(monkeypatch, 3, ZeroDivisionError("the first"))
    with pytest.raises(ZeroDivisionError, match="the first"):
        run(**{"train.save_steps": 100, "train.eval_steps": 100})
    assert "note: step 2 cannot be saved: No space left" in capsys.readouterr().err


def test_a_save_that_failed_is_not_tried_again(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(*_: Any, state: Any, **__: Any) -> Path:
        tried.append(state.step)
        raise ZeroDivisionError

    monkeypatch.setattr(train, "save_checkpoint", fail)
    with pytest.raises(ZeroDivisionError):
        run()
    assert tried == [1]


def test_an_update_that_was_cut_short_is_never_saved(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(**{"train.output_dir": tmp_path / "whole"})
    plain, calls = optim.adamw, iter(range(100))

    def cut(*arguments: Any, **more: Any) -> None:
        plain(*arguments, **more)
        if next(calls) == 2:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(optim, "adamw", cut)
        with pytest.raises(ZeroDivisionError):
            run(**{"train.save_steps": 100, "train.eval_steps": 100})
    assert "step 2 cannot be saved: its update was cut short" in capsys.readouterr().err
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    assert weights(run()) == weights(expected)


def test_a_step_that_could_not_be_logged_is_logged_by_the_run_that_resumes(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"train.save_steps": 100}
    expected = run(**{"train.output_dir": tmp_path / "whole"}, **keys)
    plain = RunLog.write

    def write(log: RunLog, entry: dict[str, Any]) -> None:
        if entry["step"] == 2:
            raise StorageError("metrics.jsonl: No space left")
        plain(log, entry)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left"):
            run(**keys)
    assert weights(run(**keys)) == weights(expected)
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def test_what_a_step_held_when_memory_ran_out_is_free_for_the_save(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    plain = train.save_checkpoint

    def fill(*_: Any) -> None:
        activations = torch.ones(8)
        held.append(weakref.ref(activations))
        if len(held) == 2:
            raise MemoryError

    def save(*arguments: Any, **more: Any) -> Path:
        assert [reference() for reference in held] == [None, None]
        return plain(*arguments, **more)

    monkeypatch.setattr(train, "save_checkpoint", save)
    change_steps(monkeypatch, fill)
    with pytest.raises(UserError, match="after step 1: memory ran out"):
        run(**{"train.save_steps": 100})


def write_reviews(path: Path, counts: tuple[int, int], seed: int) -> None:
    """Makes a split of so many reviews of each label."""
    reviews = make_reviews(2 * max(counts), seed)
    chosen = [[text for text, label in reviews if label == wanted][:count] for wanted, count in enumerate(counts)]
    records = ({"text": text, "label": label} for label, texts in enumerate(chosen) for text in texts)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def test_balanced_weights_raise_the_recall_of_a_rare_class(run: Fit, data: Path, tmp_path: Path) -> None:
    write_reviews(data / "train.jsonl", (72, 12), seed=5)
    write_reviews(data / "test.jsonl", (30, 30), seed=7)
    keys = {**CONSTANT, "train.max_steps": 30, "lora.r": 8, "lora.dropout": 0, "train.load_best_model_at_end": False}
    keys |= {"train.per_device_train_batch_size": 84, "train.eval_steps": 100, "train.save_steps": 100}
    results = {
        weights: read(run(**keys, **{"train.class_weights": weights, "train.output_dir": tmp_path / weights}) / name)
        for name in ("metrics.json",)
        for weights in ("none", "balanced")
    }
    rare = {weights: found["test"]["per_class"]["正面"]["recall"] for weights, found in results.items()}
    assert rare["none"] + 0.3 < rare["balanced"]  # seen 0.03 and 0.6
    assert "class_weights" not in results["none"]
    assert results["balanced"]["class_weights"] == {"负面": 84 / 144, "正面": 84 / 24}


BALANCED = {"train.class_weights": "balanced", "data.max_train_examples": 13, "lora.dropout": 0.2}


def test_a_weighted_run_resumes_to_the_bit_says_its_weights_and_keeps_them(
    run: Fit, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_reviews(data / "train.jsonl", (40, 8), seed=5)
    final = run(**BALANCED)
    said = "负面 0.5909, 正面 3.25"  # 13 / (2 x 11) and 13 / (2 x 2), of the 13 that are trained on
    assert f"\ntrain.class_weights: {said}\n" in capsys.readouterr().out
    assert f"weights of the classes in the loss: {said}." in (final / "README.md").read_text("utf-8")
    assert read(final / "training_args.json")["train"]["class_weights"] == "balanced"
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "class weights in the loss" in report
    assert "3.25" in report
    expected, log = contents(final), lasting(tmp_path / "run")
    for steps in ((4,), (4, 3, 2)):
        remove_folders(final, *steps)
        assert contents(run(**BALANCED)) == expected
        assert lasting(tmp_path / "run") == log
    remove_folders(final, 4)
    for weights in ("none", "{正面: 3.25, 负面: 0.5909}"):
        with pytest.raises(UserError, match=r'train\.class_weights: "balanced" -> ("none"|\{)'):
            run(**{**BALANCED, "train.class_weights": weights})


@pytest.mark.parametrize("cut", [{"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 4}, {}])
def test_a_weighted_run_is_the_same_however_its_steps_are_cut(
    run: Fit, data: Path, tmp_path: Path, cut: dict[str, Any]
) -> None:
    write_reviews(data / "train.jsonl", (40, 8), seed=5)
    keys = {**BALANCED, "lora.dropout": 0, "train.class_weights": "{正面: 9, 负面: 0.5}"}
    run(**keys)
    run(**keys, **(cut or {"train.max_tokens_per_micro_batch": 64}), **{"train.output_dir": tmp_path / "cut"})
    whole, parts = lasting(tmp_path / "run"), lasting(tmp_path / "cut")
    for name in ("train_loss", "eval_loss", "grad_norm"):
        found, wanted = ([entry[name] for entry in log if name in entry] for log in (parts, whole))
        assert found == pytest.approx(wanted, rel=1e-4)  # sums of float32 in another order, four updates of AdamW
    run(**{**keys, "train.class_weights": "none"}, **{"train.output_dir": tmp_path / "none"})
    plain = lasting(tmp_path / "none")
    assert plain[-1]["train_loss"] != pytest.approx(whole[-1]["train_loss"], rel=1e-2)


def test_a_validation_has_no_weights(run: Fit, tmp_path: Path) -> None:
    keys = {"train.learning_rate": 1e-9, "lora.dropout": 0}
    run(**keys)
    run(**keys, **{"train.class_weights": "{正面: 9, 负面: 0.5}", "train.output_dir": tmp_path / "weighted"})
    plain, weighted = lasting(tmp_path / "run")[1], lasting(tmp_path / "weighted")[1]
    assert weighted["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert weighted["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-3)

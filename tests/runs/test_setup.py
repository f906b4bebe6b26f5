"""What a run goes on from, what it refuses, and that it says so before anything is computed."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from minilora.adapters.peft_files import adapter_files
from minilora.build import Examples
from minilora.config import Config, load_config
from minilora.data.prepare import SPLITS
from minilora.errors import UserError
from minilora.qlora import step as step_module
from minilora.qlora.step import StepResult
from minilora.runs import finish as final_module
from minilora.runs import setup as run_module
from minilora.runs import train
from minilora.runs.checkpoint import list_checkpoints
from minilora.runs.metrics_log import MEASURED_KEYS, read_metrics
from minilora.runs.provenance import read_provenance, read_saved_config
from minilora.runs.setup import set_run_aside
from minilora.runs.trackers import Tracker
from minilora.runs.train import fit
from minilora.system import console
from minilora.system.distributed import Ranks
from minilora.system.files import StorageError, json_bytes, lock_folder, sha256
from minilora.system.manifest import read_manifest, verify_folder, write_folder
from minilora.system.signals import Interrupted

Fit = Callable[..., Path]
STEPS = 4


def make_config(data: Path, output: Path, **more: Any) -> Config:
    keys = {
        "data.dir": data,
        "lora.r": 2,
        "model.compute_dtype": "float32",
        "train.output_dir": output,
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-2,
        "train.eval_steps": 2,
        "train.save_steps": 1,
        "train.save_total_limit": 9,
        **more,
    }
    return load_config(None, [f"{name}={value}" for name, value in keys.items()])


@pytest.fixture
def data(processed_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(processed_data, tmp_path / "data"))


@pytest.fixture
def run(tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path) -> Fit:
    """`fit` in tmp_path/"run", with keys that differ from `make_config`'s: run(**{"lora.r": 4})."""
    return lambda **more: fit(make_config(data, tmp_path / "run", **more), tiny_checkpoint())


@pytest.fixture
def final(run: Fit) -> Path:
    """The final folder of a finished run."""
    return run()


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Changes a file of a folder together with its manifest, as if it had been written so."""
    files = {path: (folder / path).read_bytes() for path in read_manifest(folder)["files"]}
    write_folder(folder, {**files, name: content}.items(), read_manifest(folder)["facts"])


def change_best_step(checkpoint: Path, step: int) -> None:
    rewrite(checkpoint, "state.json", json_bytes({**read(checkpoint / "state.json"), "best_step": step}))


def lasting(directory: Path) -> list[dict[str, Any]]:
    """The log without what is measured."""
    return [{k: v for k, v in row.items() if k not in MEASURED_KEYS} for row in read_metrics(directory)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil_steps(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Makes the losses of these optimizer steps NaN."""
    plain, plain_step = step_module.next_token_nll, step_module.train_step

    def spoiled(*arguments: Any) -> tuple[torch.Tensor, int]:
        nll, count = plain(*arguments)
        return nll * math.nan, count

    def take(*arguments: Any) -> StepResult:
        with monkeypatch.context() as patch:
            if arguments[7] in steps:
                patch.setattr(step_module, "next_token_nll", spoiled)
            return plain_step(*arguments)

    monkeypatch.setattr(train, "train_step", take)


def test_the_test_before_training_is_the_base_models_whenever_it_is_asked_for(final: Path, run: Fit) -> None:
    expected = read(final / "metrics.json")
    assert expected["test_before"] != expected["test"]
    shutil.rmtree(final.parent)
    run(**{"train.do_predict": False})
    shutil.rmtree(final)
    run()  # the adapter is trained by now
    assert read(final / "metrics.json") == expected


@pytest.mark.parametrize(
    ("report", "is_noted"),
    [(None, False), ("[]", False), ('{"sha256_out": 3}', False), ("right", False), ("wrong", True)],
)
def test_a_split_that_is_not_as_it_was_prepared_is_noted(
    run: Fit, data: Path, capsys: pytest.CaptureFixture[str], report: str | None, is_noted: bool
) -> None:
    digests = {f"{split}.jsonl": sha256(data / f"{split}.jsonl") for split in SPLITS}
    if report == "wrong":
        digests["validation.jsonl"] = "0" * 64
    if report is not None:
        text = json.dumps({"sha256_out": digests}) if report in ("right", "wrong") else report
        (data / "data_report.json").write_text(text, "utf-8")
    run()
    note = f"note: {data}: validation.jsonl: edited or damaged since they were prepared\n"
    assert (note in capsys.readouterr().err) == is_noted


def test_quiet_leaves_the_result(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_is_quiet", True)
    final = run()
    step = read(final / "metrics.json")["step"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("test after training:  loss ")
    assert second == f"final adapter (step {step}): {final}"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_on_other_data_is_refused_whether_it_is_finished_or_not(
    final: Path, run: Fit, data: Path, finished: bool
) -> None:
    if not finished:
        shutil.rmtree(final)
    lines = (data / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(reversed(lines)), "utf-8")
    with pytest.raises(UserError, match=r"was made with another data in .+ \(SHA-256 of train\.jsonl\); put the files"):
        run()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("save_format", "bin"),
        ("save_dtype", "bfloat16"),
        ("do_predict", False),
        ("load_best_model_at_end", False),
    ],
)
def test_what_only_the_final_folder_shows_is_not_ignored_on_a_finished_run(
    final: Path, run: Fit, key: str, value: object
) -> None:
    with pytest.raises(UserError, match=rf"train\.{key}: {value!r} comes too late, .+ move that folder away to have"):
        run(**{f"train.{key}": value})
    final.rename(final.with_name("moved"))
    run(**{f"train.{key}": value})
    assert read(final / "training_args.json")["train"][key] == value


def test_a_best_checkpoint_that_is_gone_is_named_at_once_and_the_last_one_can_be_taken(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(final)
    change_best_step(final.with_name(f"step-{STEPS:06d}"), 2)
    shutil.rmtree(final.with_name("step-000002"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_model", lambda *_: pytest.fail("too late"))
        with pytest.raises(
            UserError, match=r"step-000002: the best checkpoint so far cannot be read \(.+\); put it back, or"
        ):
            run()
    assert not final.exists()
    run(**{"train.load_best_model_at_end": False})
    assert read(final / "metrics.json")["step"] == STEPS


def test_a_best_checkpoint_that_is_lost_on_the_way_is_named_too(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(final)
    change_best_step(final.with_name(f"step-{STEPS:06d}"), 2)
    flip_bit(final.with_name("step-000002") / "adapter_model.safetensors")
    monkeypatch.setattr(run_module, "check_best", lambda *_: None)  # at the beginning; the end looks again
    with pytest.raises(
        UserError,
        match=r"step-000002: the best checkpoint so far cannot be read \(adapter_model\.\w+ has SHA-256 .+\); put",
    ):
        run()
    assert not final.exists()


def flip_bit(path: Path) -> None:
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.json", "adapter_model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped bit", "missing", "cut off"])
def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before_it(
    final: Path, run: Fit, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    expected = contents(final)
    log = lasting(final.parent.parent)
    shutil.rmtree(final)
    newest = final.with_name(f"step-{STEPS:06d}")
    before = final.with_name(f"step-{STEPS - 1:06d}")
    if how == "missing":
        (newest / name).unlink()
    elif how == "cut off":
        (newest / name).write_bytes((newest / name).read_bytes()[:-1])
    else:
        flip_bit(newest / name)
    capsys.readouterr()
    assert contents(run()) == expected
    printed = capsys.readouterr()
    assert f"{newest}: is damaged (" in printed.err
    assert f"); set aside as damaged-{newest.name}-1\n" in printed.err
    assert name in printed.err.partition(f"{newest}: is damaged (")[2]
    assert f"going on from {before}\n" in printed.out
    assert newest.with_name(f"damaged-{newest.name}-1").is_dir()
    assert verify_folder(newest) is None
    assert lasting(final.parent.parent) == log


def test_where_no_checkpoint_is_sound_the_run_does_not_begin_anew_by_itself(final: Path, run: Fit) -> None:
    shutil.rmtree(final)
    steps = list_checkpoints(final.parent)
    for checkpoint in steps:
        flip_bit(checkpoint / "state.json")
    names = ", ".join(f"damaged-{checkpoint.name}-1" for checkpoint in steps)
    for _ in range(2):  # the second time they have been set aside already
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value) == (
            f"{final.parent}: holds no sound checkpoint, only {names}; put a sound copy of one back under its own "
            "name, or begin anew with --restart"
        )
    assert read_metrics(final.parent.parent)


@pytest.mark.parametrize("name", ["adapter_config.json", "training_args.json", "metrics.json", "manifest.json"])
def test_a_damaged_final_folder_is_refused_and_written_again_once_it_is_away(final: Path, run: Fit, name: str) -> None:
    expected = contents(final)
    flip_bit(final / name)
    with pytest.raises(UserError, match=r"final: is damaged \(.+\); move that folder away to have it written again"):
        run()
    shutil.rmtree(final)
    assert contents(run()) == expected


def test_a_model_card_may_be_changed_by_hand(final: Path, run: Fit) -> None:
    (final / "README.md").write_text("mine", "utf-8")
    assert run() == final
    assert (final / "README.md").read_text("utf-8") == "mine"


CONSTANT = {"train.lr_scheduler_type": "constant", "train.warmup_ratio": 0}


def test_a_run_with_a_constant_rate_may_become_longer(run: Fit, tmp_path: Path) -> None:
    run(**CONSTANT, **{"train.output_dir": tmp_path / "whole", "train.max_steps": 6})
    final = run(**CONSTANT)
    with pytest.raises(UserError, match=r"train\.max_steps: 6 comes too late, .+ was written with 4; move that folder"):
        run(**CONSTANT, **{"train.max_steps": 6})
    shutil.rmtree(final)
    final = run(**CONSTANT, **{"train.max_steps": 6})
    assert read(final / "training_args.json")["train"]["max_steps"] == 6
    whole = tmp_path / "whole" / "checkpoints" / "final"
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (final / name).read_bytes() == (whole / name).read_bytes()
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


def test_a_run_is_not_shorter_than_what_is_done(run: Fit) -> None:
    final = run(**CONSTANT)
    shutil.rmtree(final)
    with pytest.raises(
        UserError,
        match=r"step-000004: has 4 steps behind it, the configuration asks for 3; raise train\.num_train_epoc",
    ):
        run(**CONSTANT, **{"train.max_steps": 3})


@pytest.mark.parametrize("eval_steps", [3, 100])
def test_a_run_becomes_as_short_as_what_is_done_only_where_that_was_validated(
    run: Fit, monkeypatch: pytest.MonkeyPatch, eval_steps: int
) -> None:
    def fail(*arguments: Any) -> StepResult:
        if arguments[7] == 4:
            raise ZeroDivisionError
        return step_module.train_step(*arguments)

    keys = {**CONSTANT, "train.eval_steps": eval_steps}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", fail)
        with pytest.raises(ZeroDivisionError):
            run(**keys, **{"train.max_steps": 6})
    if eval_steps == 3:
        assert read(run(**keys, **{"train.max_steps": 3}) / "metrics.json")["step"] == 3
    else:
        with pytest.raises(UserError, match="step-000003: has 3 steps behind it, the configuration asks for 3; raise"):
            run(**keys, **{"train.max_steps": 3})
        assert read(run(**keys, **{"train.max_steps": 4}) / "metrics.json")["step"] == 4


def on_another_machine(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    plain = run_module.describe_machine
    monkeypatch.setattr(run_module, "describe_machine", lambda *arguments: {**plain(*arguments), **changes})


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({"device": "cuda"}, "device: cpu -> cuda"), ({"dtype": "float16"}, "dtype: float32 -> float16")],
)
def test_a_run_does_not_go_on_with_another_device_or_dtype(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], shown: str
) -> None:
    expected = contents(final)
    shutil.rmtree(final)
    with monkeypatch.context() as patch:
        on_another_machine(patch, threads=99, **changes)
        patch.setattr(run_module, "build_model", lambda *_: pytest.fail("too late"))
        with pytest.raises(UserError, match=rf"run: its run was computed otherwise \({shown}\); set model"):
            run()
    assert contents(run()) == expected


def test_a_run_that_goes_on_with_other_versions_or_threads_says_so_once(
    final: Path, run: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    for name in ("final", "step-000004"):
        shutil.rmtree(final.with_name(name))
    on_another_machine(monkeypatch, threads=99, torch="9.9")
    capsys.readouterr()
    run()
    printed = capsys.readouterr().err
    assert f"note: threads: {threads} -> 99, torch: {torch.__version__} -> 9.9; the rest may differ in the " in printed
    shutil.rmtree(final)
    run()  # from step 4, which was computed there
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_records_without_a_token_to_learn_are_named_before_the_model_is_loaded(
    run: Fit, data: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    plain = run_module.read_split

    def muted(*arguments: Any) -> Examples:
        found = plain(*arguments)
        if arguments[2] != split:
            return found
        silent = [dataclasses.replace(example, supervised=[False] * 9) for example in found.examples[:10]]
        return dataclasses.replace(found, examples=[*silent, *found.examples[10:]])

    monkeypatch.setattr(run_module, "read_split", muted)
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        run()
    named = ", ".join(f"{data / split}.jsonl:{line}" for line in range(1, 9))
    assert str(caught.value) == f"{named}: 10 records without one token to learn; remove them"


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_a_run_may_go_on_with_its_steps_cut_otherwise(
    final: Path, run: Fit, capsys: pytest.CaptureFixture[str], size: int, accumulation: int
) -> None:
    expected = read(final / "metrics.json")
    cut = {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": accumulation}
    assert run(**cut) == final  # finished is finished
    assert "note: " not in capsys.readouterr().err
    for name in ("final", "step-000004", "step-000003"):
        shutil.rmtree(final.with_name(name))
    run(**cut, **{"lora.dropout": 0.05})
    sizes = f"train.per_device_train_batch_size: 4 -> {size}, train.gradient_accumulation_steps: 1 -> {accumulation}"
    assert (
        f"note: {sizes}; the rest may differ in the last bits and has other dropout masks\n" in capsys.readouterr().err
    )
    found = read(final / "metrics.json")
    assert found["test_before"] == expected["test_before"]
    assert found["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=0.2)  # two of four steps' masks differ
    run(**cut)


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_does_not_go_on_with_larger_steps(final: Path, run: Fit, is_finished: bool) -> None:
    if not is_finished:
        shutil.rmtree(final)
    with pytest.raises(
        UserError, match=r"another configuration; .+\n  train\.gradient_accumulation_steps: 1 -> 2\n.* 4 ex.+_size=2$"
    ):
        run(**{"train.gradient_accumulation_steps": 2})


def test_a_checkpoint_from_before_there_were_ranks_had_one(final: Path, run: Fit) -> None:
    shutil.rmtree(final)
    newest = final.with_name(f"step-{STEPS:06d}")
    state = read(newest / "state.json")
    assert state["machine"].pop("ranks") == 1
    rewrite(newest, "state.json", json_bytes(state))
    assert read_provenance(newest).ranks == 1
    assert read(run() / "metrics.json")["machine"]["ranks"] == 1


def test_ranks_that_no_longer_agree_save_nothing(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    class Two(Ranks):
        """The first of two, of which the other says the same but for its adapter."""

        def all_gather(self, value: Any) -> list[Any]:
            host, facts = value if isinstance(value, list) and len(value) == 2 else (None, None)
            return [value, [host, {**facts, "adapter": "another"}] if facts and "adapter" in facts else value]

    with pytest.raises(UserError) as caught:
        fit(make_config(data, tmp_path / "run", **{"train.do_predict": False}), tiny_checkpoint(), ranks=Two(0, 2))
    assert re.fullmatch(
        r"rank 1 on .+: has another adapter than rank 0; step 1 is not saved; run the same command on machines that "
        r"are alike, it goes on from none",
        str(caught.value),
    )
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_run_with_another_schedule_may_not_change_its_length(final: Path, run: Fit) -> None:
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"train\.max_steps: 4 -> 6  \(free with lr_scheduler_type=constant, warmup_"
        ):
            run(**{"train.max_steps": 6})
        shutil.rmtree(final, ignore_errors=True)


def test_a_second_run_in_the_same_folder_is_refused(run: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with lock_folder(tmp_path / "run", "train.output_dir"):
        with pytest.raises(
            UserError, match=rf"run: another run is writing there \(process {os.getpid()} on .+ another t"
        ):
            run()
        assert read_metrics(tmp_path / "run") == []
    assert run().is_dir()


def test_restart_sets_everything_aside_and_begins_anew(
    final: Path, tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    expected, log = contents(final), lasting(tmp_path / "run")
    assert fit(make_config(data, tmp_path / "run"), tiny_checkpoint(), restart=True) == final
    assert [path.name for path in (tmp_path / "run").glob("previous-*")] == ["previous-1"]
    previous = tmp_path / "run" / "previous-1"
    assert contents(final) == contents(previous / "checkpoints" / "final") == expected
    assert lasting(tmp_path / "run") == lasting(previous) == log


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("moment", range(1, 8))
def test_a_restart_that_was_killed_anywhere_is_ended_by_the_next_run_whatever_it_asks_for(
    final: Path, run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, is_finished: bool
) -> None:
    directory = tmp_path / "run"
    for name in ("tensorboard", "wandb"):
        (directory / name).mkdir()
    (directory / "loss.png").write_bytes(b"a plot")
    if not is_finished:
        shutil.rmtree(final)
    names = sorted(name for name in run_module.RUN_FILES if (directory / name).exists())
    assert len(names) == 6  # and the folder that they are in: seven renamings
    log, saved = lasting(directory), saved_steps(final)
    calls = itertools.count(1)
    plain = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            set_run_aside(directory)
    run()
    previous = directory / "previous-1"
    assert sorted(path.name for path in previous.iterdir()) == names
    assert (lasting(previous), saved_steps(previous / "checkpoints" / "final")) == (log, saved)
    assert lasting(directory) == log
    assert not (directory / run_module.RESTARTING).exists()
    assert [path.name for path in directory.glob("previous-*")] == ["previous-1"]


def test_restart_where_there_is_nothing_sets_nothing_aside(
    tiny_checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    fit(make_config(data, tmp_path / "run"), tiny_checkpoint(), restart=True)
    assert not list((tmp_path / "run").glob("previous-*"))


def test_a_step_whose_loss_is_no_number_is_skipped_logged_and_counted(
    run: Fit, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_steps(monkeypatch, 3)
    final = run()
    assert read(final / "metrics.json")["skipped_steps"] == 1
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "skipped" in row] == [3]
    assert (rows[2]["train_loss"], rows[2]["grad_norm"], rows[2]["skipped"]) == (None, None, True)
    places = [re.fullmatch(rf"{re.escape(str(data))}/train\.jsonl:(\d+)", where) for where in rows[2]["rows"]]
    assert all(places)
    assert len({place[1] for place in places if place}) == 4
    assert "step 3: loss nan, gradient norm nan: skipped, it changed nothing (1 skipped so far)" in (
        capsys.readouterr().out
    )
    assert [path.name[-1] for path in list_checkpoints(final.parent)] == ["1", "2", "4"]
    state = read(final.with_name("step-000004") / "state.json")
    assert (state["skipped_steps"], state["skipped_in_a_row"], state["samples_seen"]) == (1, 0, 16)


def test_a_run_that_skipped_a_step_goes_on_to_the_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, 3)
    final = run()
    expected, log = contents(final), lasting(tmp_path / "run")
    for names in (["step-000004"], ["step-000004", "step-000002"]):
        for name in ("final", *names):
            shutil.rmtree(final.with_name(name))
        assert contents(run()) == expected
        assert lasting(tmp_path / "run") == log


@pytest.mark.parametrize("save_steps", [1, 100])
def test_too_many_steps_in_a_row_that_are_no_number_stop_the_run(run: Fit, tmp_path: Path, save_steps: int) -> None:
    keys = {"train.learning_rate": 1e30, "train.warmup_ratio": 0, "train.eval_steps": 100, "train.max_skipped_steps": 3}
    with pytest.raises(UserError) as caught:
        run(**keys, **{"train.max_steps": 9, "train.save_steps": save_steps})
    message = str(caught.value)
    skipped = [row.get("skipped", False) for row in read_metrics(tmp_path / "run")]
    last_sound = len(skipped) - 3
    assert last_sound >= 1
    assert skipped == [False] * last_sound + [True] * 3
    assert message.startswith(f"step {last_sound + 3}: the loss or its gradient is no number, 3 steps in a row")
    assert f"(the last one's rows: {tmp_path / 'data' / 'train.jsonl'}:" in message
    assert (
        "; begin anew with --restart and a lower train.learning_rate (it is 1e+30) or another model.compute" in message
    )
    left = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in left][-1:] == ([f"step-{last_sound:06d}"] if save_steps == 1 else [])
    assert message.endswith(f"The newest checkpoint, from before: {left[-1] if left else 'none'}")


def saved_steps(final: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(final.parent)]


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
    rows = read_metrics(final.parent.parent)
    assert [(row["step"], "skipped" in row) for row in rows] == [(1, True), (3, True), (4, False)]


def test_steps_that_were_skipped_before_a_resumption_count_against_a_limit_that_became_lower(
    run: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, 2, 3)
    plain = train.train_step

    def interrupted(*arguments: Any) -> StepResult:
        if arguments[7] == 4:
            raise Interrupted(signal.SIGTERM)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(Interrupted, match="saved step 3"):
            run(**{"train.eval_steps": 100})
    with monkeypatch.context() as patch:
        spoil_steps(patch, 4)
        with pytest.raises(UserError, match="step 4: the loss or its gradient is no number, 3 steps in a row"):
            run(**{"train.eval_steps": 100, "train.max_skipped_steps": 2})
    assert read(run(**{"train.eval_steps": 100, "train.max_skipped_steps": 2}) / "metrics.json")["skipped_steps"] == 2


@pytest.mark.parametrize(("loss", "is_search"), [(0.5, True), (math.nan, False)])
def test_an_overflow_with_which_the_loss_scale_is_searched_for_is_no_step_in_a_row(
    run: Fit, monkeypatch: pytest.MonkeyPatch, loss: float, is_search: bool
) -> None:
    plain = train.open_run

    def scaled(*arguments: Any) -> run_module.Run:
        return dataclasses.replace(plain(*arguments), scaler=torch.amp.GradScaler("cpu"))

    monkeypatch.setattr(train, "open_run", scaled)
    monkeypatch.setattr(train, "train_step", lambda *_: StepResult(loss, math.inf, False))
    keys = {"train.max_skipped_steps": 2, "train.eval_steps": 100}
    if is_search:
        assert read(run(**keys) / "metrics.json")["skipped_steps"] == STEPS
    else:
        with pytest.raises(UserError, match="step 2: the loss or its gradient is no number, 2 steps in a row"):
            run(**keys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_whose_weights_are_no_numbers_is_not_saved(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def spoil(*arguments: Any) -> StepResult:
        result = step_module.train_step(*arguments)
        if arguments[7] == 3:
            arguments[2].param_groups[0]["params"][0].data.view(-1)[0] = value
        return result

    monkeypatch.setattr(train, "train_step", spoil)
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError) as caught:
        run()
    assert str(caught.value) == (
        "step 3: the adapter's weights are no longer numbers, so they are not saved; begin anew with --restart and a "
        f"lower train.learning_rate (it is 0.01). The newest checkpoint: {checkpoints / 'step-000002'}"
    )
    assert saved_steps(checkpoints / "final") == [1, 2]


@pytest.mark.parametrize(("place", "newest"), [("score_test_set", "none"), ("finish", "step-000004")])
def test_a_signal_outside_the_steps_names_the_newest_checkpoint_and_the_run_goes_on_to_the_same_end(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, newest: str
) -> None:
    expected = contents(run(**{"train.output_dir": tmp_path / "whole"}))

    def interrupted(*_: object) -> Path:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, place, interrupted)
        with pytest.raises(Interrupted) as caught:
            run()
    path = tmp_path / "run" / "checkpoints" / newest
    where = "nothing done" if newest == "none" else f"the same command goes on from {path}"
    assert caught.value.is_explained
    assert str(caught.value) == f"stopped by SIGTERM: {where}"
    final = contents(run())
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert final[name] == expected[name]


def test_of_many_rows_the_first_few_are_named(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, 1, 2, 3)
    with pytest.raises(UserError, match=r"train\.jsonl:\d+ and 4 more\); begin anew"):
        run(**{"train.gradient_accumulation_steps": 3, "train.max_skipped_steps": 2})


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_the_run(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, 1, 3, 5)
    final = run(**{"train.max_steps": 6, "train.max_skipped_steps": 2})
    assert read(final / "metrics.json")["skipped_steps"] == 3


def test_a_validation_that_is_no_number_stops_the_run(run: Fit) -> None:
    with pytest.raises(UserError, match=r"step \d: the validation loss is nan, expected a number"):
        run(**{"train.learning_rate": 1e30, "train.eval_steps": 1})


def test_an_infinite_gradient_is_skipped_as_well(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_step", lambda *_: StepResult(0.5, math.inf, False))
    final = run()
    assert read(final / "metrics.json")["step"] == 2
    rows = read_metrics(final.parent.parent)
    assert [(row["train_loss"], row["grad_norm"], row["skipped"]) for row in rows] == [(0.5, None, True)] * STEPS
    assert [path.name for path in list_checkpoints(final.parent)] == [
        "step-000002",  # the first validation
        "step-000004",  # the end
    ]


LACKING = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"
)


@pytest.mark.parametrize(
    ("keys", "shown", "hidden"),
    [
        (
            {},
            "set train.gradient_checkpointing=true and run it again (newest checkpoint: {newest}); or begin anew with "
            "--restart and, what helps most first, train.max_tokens_per_micro_batch=320, data.max_length=256\n",
            "model.quantization=nf4",
        ),
        ({"train.gradient_checkpointing": True}, "bytes.); begin anew with --restart", "run it again"),
        ({"model.cache_dequantized": True}, "=true, model.cache_dequantized=false and run it again", "=nf4"),
        (
            {"model.quantization": "none", "lora.r": 32, "train.max_tokens_per_micro_batch": 100},
            "train.max_tokens_per_micro_batch=50, data.max_length=256, model.quantization=nf4, train.optim=adamw_bnb",
            "cache_dequantized",
        ),
    ],
)
@pytest.mark.parametrize("error", [LACKING, MemoryError()], ids=["PyTorch", "Python"])
def test_a_lack_of_memory_says_what_it_takes_and_what_helps(
    run: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    keys: dict[str, Any],
    shown: str,
    hidden: str,
) -> None:
    def take(*arguments: Any) -> StepResult:
        if arguments[7] == 2:
            raise error
        return step_module.train_step(*arguments)

    monkeypatch.setattr(train, "train_step", take)
    with pytest.raises(UserError) as caught:
        run(**keys)
    message = str(caught.value).replace("MemoryError)", "bytes.)")
    assert message.startswith("after step 1: memory ran out (")
    assert "more" not in message.partition(")")[0]
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    assert shown.format(newest=newest) in message
    assert hidden not in message
    assert re.search(
        r"what this configuration takes, by the largest micro-batch of an epoch:\n  projections \(", message
    )
    assert re.search(r"\n  total +\d+\.\d MB$", message)
    assert list_checkpoints(newest.parent) == [newest]


def test_another_error_of_pytorch_is_not_taken_for_a_lack_of_memory(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> StepResult:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()


def test_a_full_disk_says_that_what_is_saved_is_intact(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train.save_checkpoint

    def fill(*arguments: Any) -> Path:
        if arguments[4].step == 2:
            raise StorageError("step-000002: cannot be written (No space left on device); make room")
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", fill)
        with pytest.raises(StorageError) as caught:
            run()
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    assert str(caught.value) == (
        "step-000002: cannot be written (No space left on device); make room\n"
        f"  what is saved is intact; the newest checkpoint: {newest}"
    )
    expected = contents(run(**{"train.output_dir": tmp_path / "whole"}))
    resumed = contents(run())
    assert resumed["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert resumed["metrics.json"] == expected["metrics.json"]


needs_signals = pytest.mark.skipif(os.name == "nt", reason="a process of Windows cannot send itself a signal")


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["first step", "step", "validation", "last validation"])
def test_a_signal_ends_the_run_where_it_can_go_on_to_the_bit(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    expected = run(**{"train.output_dir": tmp_path / "whole", "train.eval_steps": 3})
    calls: Iterator[int] = iter(range(100))
    when = {"first step": 0, "step": 2, "validation": 1, "last validation": 2}[moment]  # a test comes before all
    done = {"first step": 0, "step": 2, "validation": 3, "last validation": 4}[moment]
    module, name = (final_module, "score") if "validation" in moment else (train, "train_step")
    plain = getattr(module, name)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), number)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(Interrupted) as caught:
            run(**{"train.eval_steps": 3, "train.save_steps": 100})
    assert caught.value.signum == number
    where = f"saved step {done}; the same command goes on from there" if done else "nothing done"
    assert str(caught.value) == f"stopped by {number.name}: {where}"
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1:] == (
        [f"step-{done:06d}"] if done else []
    )
    final = run(**{"train.eval_steps": 3, "train.save_steps": 100})
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (final / name).read_bytes() == (expected / name).read_bytes()
    assert lasting(tmp_path / "run") == lasting(tmp_path / "whole")


@needs_signals
def test_a_validation_that_is_done_again_is_logged_once(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"train.do_predict": False, "train.save_steps": 100}
    run(**keys, **{"train.output_dir": tmp_path / "whole"})
    plain = final_module.score

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    def killed(*_: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(final_module, "score", interrupted)
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
    plain = final_module.score

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)  # without do_predict the first score is the last validation's
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(final_module, "score", interrupted)
        with pytest.raises(Interrupted, match="saved step 3"):
            run(**{**keys, "train.eval_steps": 5})
    steps: list[int] = []
    plain_advance = train._advance

    def counted(run: Any, *more: Any) -> bool:
        steps.append(run.state.step)
        assert len(steps) < 10, "the same step again and again"
        return plain_advance(run, *more)

    monkeypatch.setattr(train, "_advance", counted)
    final = run(**{**keys, "train.eval_steps": 5, "train.max_steps": 6})
    assert read(final.with_name("step-000006") / "state.json")["step"] == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training_args.json", "[]", "holds no run's configuration, expected model, lora, data, prompt, train; put"),
        ("training_args.json", '{"model": {}}', "holds no run's configuration"),
        ("metrics.json", "null", "holds no SHA-256 of data and model; put the file back"),
        ("metrics.json", '{"data_sha256": {}}', "holds no SHA-256 of data and model"),
    ],
)
def test_a_damaged_final_folder_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "training_args.json").write_text(json.dumps(load_config().to_dict()), "utf-8")
    (folder / "metrics.json").write_text('{"data_sha256": {}, "model_sha256": {}}', "utf-8")
    read_provenance(folder)
    (folder / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read_provenance(folder)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def _perturb(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[-1] *= 1.01


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[-1] = math.nan


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "lora_A.weight: missing from the file"),
        (_perturb, "its values differ"),
        (_spoil, "lora_A.weight: holds NaN or infinite values"),
    ],
)
def test_a_final_adapter_that_cannot_be_read_back_as_it_was_is_not_put_in_place(
    run: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_dtype: str,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    def files_damaged(*arguments: Any) -> Iterator[tuple[str, bytes]]:
        for name, content in adapter_files(*arguments):
            if name == "adapter_model.safetensors":
                tensors = load(content)
                damage(tensors)
                content = save(tensors)
            yield name, content

    monkeypatch.setattr(final_module, "adapter_files", files_damaged)
    checkpoints = tmp_path / "run" / "checkpoints"
    with pytest.raises(
        UserError, match=r"\.writing-final: read back, the adapter is not the one that was tra"
    ) as caught:
        run(**{"train.save_dtype": save_dtype})
    assert message in str(caught.value)
    assert not (checkpoints / "final").exists()
    monkeypatch.undo()
    assert (run(**{"train.save_dtype": save_dtype}) / "adapter_model.safetensors").is_file()  # as the message says
    assert not (checkpoints / ".writing-final").exists()


@pytest.mark.parametrize("content", ["null", '{"config": 3}', '{"config": {"train": {}}}'])
def test_a_checkpoint_without_a_configuration_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"state\.json: holds no run's configuration"):
        read_saved_config(path)


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "."])
def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(train, "open_run", lambda *_: pytest.fail("too late"))
    path = tmp_path / place if place != "." else tmp_path / "file"
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file", "utf-8")
    more = {"train.output_dir": path / "below"} if place == "." else {}
    with pytest.raises(UserError, match=r"cannot be written to \(.+\); choose another train\.output_dir"):
        run(**more)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_refused(run: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\)"):
        run()


def test_a_log_that_is_none_is_refused_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "open_run", lambda *_: pytest.fail("too late"))
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(.+\); move it away"):
        run()


def test_tensorboard_is_looked_for_before_anything_is_computed(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(train, "open_run", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"train\.report_to: tensorboard is not installed; pip install tensorboard, or"):
        run(**{"train.report_to": "tensorboard"})
    assert read_metrics(tmp_path / "run") == []


KINDS: dict[str, dict[str, Any]] = {
    "dora and biases": {"lora.use_dora": True, "lora.bias": "all", "train.loraplus_lr_ratio": 8},
    "patterns": {
        "lora.rank_pattern": "{q_proj: 1, 'layers.1.mlp.*': 3}",
        "lora.alpha_pattern": "{down_proj: 5}",
        "lora.layers_to_transform": "[1]",
        "train.portable": True,
    },
    "pissa": {"lora.init_lora_weights": "pissa", "lora.dropout": 0, "train.save_dtype": "bfloat16"},
    "loftq, 8-bit moments": {"lora.init_lora_weights": "loftq", "train.optim": "adamw_bnb_8bit"},
    "gaussian, portable": {"lora.init_lora_weights": "gaussian", "lora.use_rslora": True, "train.portable": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_is_trained_saved_and_goes_on_to_the_bit(run: Fit, tmp_path: Path, kind: str) -> None:
    """`finish` has read the adapter back as a second one by then, and compared what it says."""
    final = run(**KINDS[kind])
    losses = [row["train_loss"] for row in lasting(tmp_path / "run")]
    assert len(set(losses)) == STEPS
    whole, log = contents(final), lasting(tmp_path / "run")
    for name in ("final", "step-000003", "step-000004"):
        shutil.rmtree(final.parent / name)
    assert contents(run(**KINDS[kind])) == whole
    assert lasting(tmp_path / "run") == log


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank_pattern", "{q_proj: 1}"), ("use_dora", True), ("bias", "all"), ("layers_to_transform", 0)],
)
def test_a_run_does_not_go_on_with_another_kind_of_adapter(final: Path, run: Fit, name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"another configuration; .*\n  lora\.{name}: "):
        run(**{f"lora.{name}": value})


def test_a_scale_that_was_lost_on_the_way_to_the_file_is_noticed(run: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor arrives as it was; with half of alpha in adapter_config.json they are another adapter."""

    def files_rescaled(*arguments: Any) -> Iterator[tuple[str, bytes]]:
        for name, content in adapter_files(*arguments):
            yield name, content.replace(b'"lora_alpha": 16', b'"lora_alpha": 8')

    monkeypatch.setattr(final_module, "adapter_files", files_rescaled)
    with pytest.raises(UserError, match="read back, the adapter is not the one that was trained"):
        run()


def report_of(final: Path) -> str:
    return (final.parent.parent / "report.html").read_text("utf-8")


def test_the_report_shows_the_run_and_is_written_again_with_the_final_folder(final: Path, run: Fit) -> None:
    metrics, page = read(final / "metrics.json"), report_of(final)
    for name in ("test_before", "test"):
        low, high = metrics[name]["confidence_intervals_95"]["f1"]
        assert f"<td>{metrics[name]['f1']:.4f}<small>{low:.3f} to {high:.3f}</small></td>" in page
    confusion = metrics["test"]["confusion_matrix"]
    assert f"{confusion[0][1] + confusion[1][0]} of 12 reviews are answered wrong" in page
    for digest in (*metrics["data_sha256"].values(), *metrics["model_sha256"].values()):
        assert digest in page
    assert "<mark>lora.<wbr>r</mark>" in page
    assert "Predicted " in page
    shutil.rmtree(final)
    (final.parent.parent / "report.html").unlink()
    run()
    around = re.compile("<section.aria-labelledby=.(?:memory|skipped-steps).>")  # the memory is measured anew
    assert around.split(report_of(final))[::2] == around.split(page)[::2]


def test_without_a_test_set_the_report_says_so_whatever_was_scored_before(final: Path, run: Fit) -> None:
    shutil.rmtree(final)
    run(**{"train.do_predict": False})
    page = report_of(final)
    assert "The test set was not scored (train.do_predict=false)" in page
    assert "Worst mistakes" not in page
    assert "Loss of training and validation" in page


@pytest.mark.parametrize("name", ["report.html", "loss.png"])
def test_a_report_or_a_plot_that_cannot_be_written_does_not_cost_the_run(
    run: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "run" / name
    path.mkdir(parents=True)
    final = run()
    assert f"note: {path} cannot be written (" in capsys.readouterr().err
    assert verify_folder(final) is None
    other = path.with_name({"report.html": "loss.png", "loss.png": "report.html"}[name])
    assert other.stat().st_size > 10_000
    assert not list(path.parent.glob(".writing-*"))


def test_without_matplotlib_a_run_says_what_it_leaves_out(
    run: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run()
    assert (
        "loss.png and the report's curves are left out, because matplotlib is not installed" in capsys.readouterr().out
    )
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_tracker_has_every_line_of_the_log_and_hears_of_an_interruption(
    run: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Tracker):
        def write(self, row: dict[str, Any]) -> None:
            heard.append(dict(row))

        def close(self, is_done: bool) -> None:
            ends.append(is_done)

    def interrupted(*arguments: Any) -> StepResult:
        if arguments[7] == 3:
            raise Interrupted(signal.SIGTERM)
        return step_module.train_step(*arguments)

    heard: list[dict[str, Any]] = []
    ends: list[bool] = []
    opened: list[tuple[Any, ...]] = []
    monkeypatch.setattr(train, "open_tracker", lambda *arguments: opened.append(arguments) or Notes())
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(Interrupted):
            run()
    run()
    assert [step for _, _, step, _ in opened] == [0, 2]
    assert ends == [False, True]
    assert heard == read_metrics(tmp_path / "run")

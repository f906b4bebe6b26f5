"""What a run goes on from, what it refuses, and that it says so before anything is computed."""

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora import train
from minilora.adapter import save_adapter
from minilora.config import Config, load_config
from minilora.errors import UserError
from minilora.run import read_origin, read_saved_config
from minilora.runlog import read_metrics
from minilora.step import StepResult
from minilora.train import fit

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


def change_best_step(checkpoint: Path, step: int) -> None:
    content = read(checkpoint / "state.json")
    (checkpoint / "state.json").write_text(json.dumps({**content, "best_step": step}), "utf-8")


def test_the_test_before_training_is_the_base_models_whenever_it_is_asked_for(final: Path, run: Fit) -> None:
    expected = read(final / "metrics.json")
    assert expected["test_before"] != expected["test"]
    shutil.rmtree(final.parent)
    run(**{"train.do_predict": False})
    shutil.rmtree(final)
    run()  # the adapter is trained by now
    assert read(final / "metrics.json") == expected


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


def test_a_best_checkpoint_that_is_gone_is_named_and_the_last_one_can_be_taken(final: Path, run: Fit) -> None:
    shutil.rmtree(final)
    change_best_step(final.with_name(f"step-{STEPS:06d}"), 2)
    shutil.rmtree(final.with_name("step-000002"))
    with pytest.raises(UserError, match=r"step-000002: the best checkpoint cannot be read \(.+\); put it back, or"):
        run()
    assert not final.exists()
    run(**{"train.load_best_model_at_end": False})
    assert read(final / "metrics.json")["step"] == STEPS


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_loss_that_is_no_number_stops_the_run(run: Fit, tmp_path: Path, save_steps: int) -> None:
    with pytest.raises(UserError) as caught:
        run(**{"train.learning_rate": 1e30, "train.save_steps": save_steps, "train.eval_steps": 100})
    message = str(caught.value)
    assert "the training loss is nan, expected a number; begin anew with --restart and a lower" in message
    assert "train.learning_rate (it is 1e+30)" in message
    left = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert bool(left) == (save_steps == 1)
    assert f"The newest checkpoint that stays: {left[-1] if left else 'none'}" in message


def test_a_validation_that_is_no_number_stops_the_run(run: Fit) -> None:
    with pytest.raises(UserError, match=r"step \d: the validation loss is nan, expected a number"):
        run(**{"train.learning_rate": 1e30, "train.eval_steps": 1})


@pytest.mark.parametrize("updated", [True, False])
def test_an_infinite_gradient_stops_the_run_unless_float16_left_it_out(
    run: Fit, monkeypatch: pytest.MonkeyPatch, updated: bool
) -> None:
    monkeypatch.setattr(train, "train_step", lambda *_: StepResult(0.5, math.inf, 10, updated))
    if updated:
        with pytest.raises(UserError, match="step 1: the gradient norm is inf, expected a number"):
            run()
    else:
        final = run()
        assert read(final / "metrics.json")["step"] == 2
        rows = read_metrics(final.parent.parent)
        assert [(row["grad_norm"], row["skipped"]) for row in rows] == [(None, True)] * STEPS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b'{"step": 1'),
        ("state.json", b"[]"),
        ("adapter_model.safetensors", b"\0" * 40),
        ("optimizer.safetensors", None),
    ],
    ids=["state cut off", "no state", "adapter of zeros", "moments gone"],
)
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(
    final: Path, run: Fit, name: str, content: bytes | None
) -> None:
    expected = (final / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(final)
    newest = final.with_name(f"step-{STEPS:06d}")
    if content is None:
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"{newest}: is damaged ({newest / name}: ")
    assert message.endswith(
        "); remove this folder to go on from the checkpoint before it, or begin anew with --restart"
    )
    shutil.rmtree(newest)
    assert (run() / "adapter_model.safetensors").read_bytes() == expected


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
    read_origin(folder)
    (folder / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read_origin(folder)


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
    def save_damaged(model: Any, folder: Path, *more: Any) -> None:
        save_adapter(model, folder, *more)
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        damage(tensors)
        save_file(tensors, path)

    monkeypatch.setattr(train, "save_adapter", save_damaged)
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

"""A checkpoint holds all that a run needs to resume, and is verified before it is trusted.

That writing is atomic is shown in tests/system/.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora import __version__
from minilora.adapters.attach import attach, lora_parameters, parameter_groups
from minilora.adapters.optimizers import build_optimizer
from minilora.adapters.peft_config import BaseModel
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.batch import pack
from minilora.qlora.lora import DropoutSeed
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import Example
from minilora.qlora.step import StepSettings, TrainState, train_step
from minilora.runs import checkpoint
from minilora.runs.checkpoint import (
    RunState,
    check_format,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    state_digests,
    step_of,
)
from minilora.system.files import StorageError, json_bytes
from minilora.system.manifest import read_manifest, verify_folder, write_folder

ADAPTER = LoraConfig(r=4, alpha=8, dropout=0.1)
LoadModel = Callable[..., Qwen2ForCausalLM]


def state_at(step: int) -> RunState:
    return RunState(
        step=step,
        samples_seen=step * 8,
        pending_entry={"step": step, "train_loss": None, "rows": ["数据.jsonl:3"]},
        validated_step=step - 1,
        best_step=1,
        best_metric=0.1 + 0.2,  # no short decimal: it has to come back to the bit
        evals_without_improvement=2,
        skipped_steps=3,
        skipped_in_a_row=1,
        test_before={"loss": 0.7, "accuracy": 0.5},
        data_sha256={"train.jsonl": "ab"},
        model_sha256={"model.safetensors": "cd"},
        scaler={"scale": 65536.0},
        machine={"device": "cpu", "dtype": "float32", "threads": 3},
        config={"prompt": {"labels": ["负面", "正面"]}},
    )


class Trainee:
    """A tiny model with its adapter and optimizer, trained on two examples."""

    def __init__(self, tiny_model: LoadModel):
        self.model = tiny_model().train()
        self.seed: DropoutSeed = attach(self.model, ADAPTER, seed=1)
        self.optimizer = build_optimizer(parameter_groups(self.model))

    def step(self, number: int) -> float:
        examples = [Example([5, 6, 7, 8 + n, number % 50, 9], [False] * 4 + [True] * 2) for n in range(2)]
        batches = [pack([example]) for example in examples]
        return train_step(
            TrainState(self.model, self.optimizer, self.seed), batches, StepSettings(number, 0.01, 1.0, 3)
        ).loss

    def save(self, directory: Path, step: int) -> Path:
        adapter = (ADAPTER, BaseModel("tiny"))
        return save_checkpoint(directory, self.model, adapter, optimizer=self.optimizer, state=state_at(step))


def test_weights_moments_and_state_come_back_to_the_bit(tiny_model: LoadModel, tmp_path: Path) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    for number in (1, 2, 3):
        first.step(number)
    checkpoint = first.save(tmp_path, 3)
    assert find_checkpoint(tmp_path) == checkpoint
    assert read_state(checkpoint) == state_at(3)
    load_checkpoint(checkpoint, second.model, second.optimizer)
    pairs = zip(lora_parameters(first.model), lora_parameters(second.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moments, restored = first.optimizer.tensors(), second.optimizer.tensors()
    assert moments.keys() == restored.keys()
    assert len(moments) == 3 * len(lora_parameters(first.model))
    for name, value in moments.items():
        assert value.dtype == restored[name].dtype
        assert torch.equal(value, restored[name])


def test_a_restored_run_continues_as_if_it_had_not_stopped(tiny_model: LoadModel, tmp_path: Path) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    for number in (1, 2):
        first.step(number)
    folder = first.save(tmp_path, 2)
    expected = [first.step(number) for number in (3, 4)]
    torch.manual_seed(999)  # a generator that something drew from must not matter
    load_checkpoint(folder, second.model, second.optimizer)
    assert [second.step(number) for number in (3, 4)] == expected


def test_the_digests_of_a_state_tell_one_bit(tiny_model: LoadModel) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    assert state_digests(first.model, first.optimizer) == state_digests(second.model, second.optimizer)
    for trainee in (first, second):
        trainee.step(1)
    expected = state_digests(first.model, first.optimizer)
    assert state_digests(second.model, second.optimizer) == expected
    flipped = lora_parameters(second.model)[-1].data.view(torch.int32)
    flipped.view(-1)[-1] ^= 1
    found = state_digests(second.model, second.optimizer)
    assert found["adapter"] != expected["adapter"]
    assert found["optimizer state"] == expected["optimizer state"]
    flipped.view(-1)[-1] ^= 1
    second.optimizer.tensors()["0.exp_avg_sq"].view(torch.int32).view(-1)[0].bitwise_xor_(1)
    found = state_digests(second.model, second.optimizer)
    assert found["adapter"] == expected["adapter"]
    assert found["optimizer state"] != expected["optimizer state"]


def test_dropout_needs_no_generator_state(tiny_model: LoadModel) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    losses = [first.step(number) for number in (1, 2, 3)]
    torch.manual_seed(4)
    repeated = []
    for number in (1, 2, 3):
        torch.rand(number)
        repeated.append(second.step(number))
    assert losses == repeated


def test_equal_runs_write_equal_bytes(tiny_model: LoadModel, tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        trainee = Trainee(tiny_model)
        trainee.step(1)
        folders.append(trainee.save(tmp_path / name, 1))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_folder_that_is_being_written_is_not_listed(tmp_path: Path) -> None:
    for name in ("step-000100", "step-000020", "step-1000000", ".writing-step-000120", "step-12", "final", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000200").write_text("a file", "utf-8")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-000100", "step-1000000"]
    assert list_checkpoints(tmp_path / "absent") == []
    (tmp_path / "step-999999").mkdir()  # its name comes last, its step does not
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [20, 100, 999_999, 1_000_000]


@pytest.mark.parametrize("best_step", ["x", [], None, 1.5])
def test_a_state_of_another_content_does_not_stop_the_pruning(tmp_path: Path, best_step: object) -> None:
    make_checkpoints(tmp_path, {1: 1, 2: 2, 3: 3})
    state = {**dataclasses.asdict(state_at(3)), "best_step": best_step}
    write_folder(tmp_path / "step-000003", [("state.json", json_bytes(state))], {"step": 3})
    prune_checkpoints(tmp_path, 1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3]


def test_the_manifest_says_which_step_and_configuration_it_is_of(tiny_model: LoadModel, tmp_path: Path) -> None:
    folder = Trainee(tiny_model).save(tmp_path, 7)
    assert read_manifest(folder)["facts"] == {
        "format": checkpoint.FORMAT,
        "step": 7,
        "config_sha256": hashlib.sha256(json_bytes(state_at(7).config)).hexdigest(),
        "minilora_version": __version__,
    }


@pytest.mark.parametrize(
    ("facts", "note"),
    [
        ({"format": checkpoint.FORMAT, "minilora_version": __version__}, ""),
        ({"minilora_version": __version__}, ""),  # before there were numbers
        ({"minilora_version": "0.0.9"}, f": minilora 0.0.9 -> {__version__}; "),
        ({}, f": minilora unknown -> {__version__}; "),
    ],
)
def test_a_checkpoint_of_another_version_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], note: str
) -> None:
    write_folder(tmp_path / "step-000001", [], facts)
    check_format(tmp_path / "step-000001")
    printed = capsys.readouterr().err
    assert (note in printed) if note else not printed


def test_a_checkpoint_of_a_later_format_is_refused_and_stays(
    tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    monkeypatch.setattr(checkpoint, "__version__", "9.0")
    folder = Trainee(tiny_model).save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"step-000001: has format 2 \(minilora 9\.0\), .+ up to 1; .+--restart"):
        check_format(folder)
    assert find_checkpoint(tmp_path) == folder


def test_a_base_model_whose_name_was_corrected_by_hand_is_no_damage(tiny_model: LoadModel, tmp_path: Path) -> None:
    trainee = Trainee(tiny_model)
    model = {"name_or_path": "tiny", "revision": None}
    state = dataclasses.replace(state_at(1), config={"model": model})
    adapter = (ADAPTER, BaseModel("tiny"))
    folder = save_checkpoint(tmp_path, trainee.model, adapter, optimizer=trainee.optimizer, state=state)
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "base_model_name_or_path": "D:/models/qwen", "revision": "main"}), "utf-8")
    assert find_checkpoint(tmp_path) == folder
    path.write_text(json.dumps({**content, "base_model_name_or_path": "D:/models/qwen", "lora_alpha": 9}), "utf-8")
    with pytest.raises(UserError, match="damaged-step-000001"):
        find_checkpoint(tmp_path)


def test_an_interrupted_write_leaves_the_older_checkpoint_as_it_was(
    tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = Trainee(tiny_model)
    trainee.step(1)
    trainee.save(tmp_path, 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("adapter_files", "save", "json_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, function, stop)
            with pytest.raises(KeyboardInterrupt):
                trainee.save(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    trainee.save(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tiny_model: LoadModel, tmp_path: Path) -> None:
    trainee = Trainee(tiny_model)
    folder = trainee.save(tmp_path, 1)
    (folder / "stray").write_text("of the earlier one", "utf-8")
    before = (folder / "adapter_model.safetensors").read_bytes()
    trainee.step(1)
    assert trainee.save(tmp_path, 1) == folder
    assert not (folder / "stray").exists()
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]


def make_checkpoints(directory: Path, best_steps: dict[int, int]) -> None:
    """Checkpoints that hold a state and nothing else: step -> its best step."""
    for step, best_step in best_steps.items():
        state = dataclasses.asdict(dataclasses.replace(state_at(step), best_step=best_step))
        write_folder(directory / f"step-{step:06d}", [("state.json", json_bytes(state))], {"step": step})


@pytest.mark.parametrize(
    ("keep", "best_steps", "left"),
    [
        (1, {1: 1, 2: 2, 3: 3, 4: 4}, [4]),
        (2, {1: 1, 2: 2, 3: 3, 4: 4}, [3, 4]),
        (2, {1: 1, 2: 1, 3: 1, 4: 1}, [1, 3, 4]),
        (1, {1: 1, 2: 2, 3: 2, 4: 2}, [2, 4]),
        (2, {1: 1, 2: 1, 3: 1, 4: 4}, [1, 3, 4]),  # should 4 turn out to be damaged, 3 still has its best
        (9, {1: 0, 2: 0, 3: 0, 4: 0}, [1, 2, 3, 4]),
        (2, {1: 0, 2: 0, 3: 0, 4: 0}, [3, 4]),
    ],
)
def test_the_newest_and_their_best_are_kept(
    tmp_path: Path, keep: int, best_steps: dict[int, int], left: list[int]
) -> None:
    make_checkpoints(tmp_path, best_steps)
    prune_checkpoints(tmp_path, keep)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == left


def test_a_damaged_state_does_not_keep_others_from_being_pruned(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, {1: 1, 2: 1, 3: 1, 4: 1})
    (tmp_path / "step-000003" / "state.json").write_text('{"step": 3', "utf-8")
    prune_checkpoints(tmp_path, 2)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [1, 3, 4]


def test_pruning_removes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, {1: 0, 2: 0})
    others = ["damaged-step-000001-1", "final", "notes"]
    for name in others:
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*others, "step-000002"]


def test_a_half_removed_checkpoint_no_longer_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoint.remove

    def stop(path: Path) -> None:
        if (path / "state.json").exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt
        plain(path)

    make_checkpoints(tmp_path, {1: 0, 2: 0})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    make_checkpoints(tmp_path, {1: 0})
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_checkpoint_that_cannot_be_removed_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    make_checkpoints(tmp_path, {1: 0, 2: 0})
    monkeypatch.setattr(checkpoint, "remove", refuse)
    with pytest.raises(StorageError, match=r"step-000001: cannot be written \(Read-only file system\)"):
        prune_checkpoints(tmp_path, 1)


@pytest.mark.parametrize("change", ["missing key", "unknown key", "a list"])
def test_a_state_of_another_version_is_refused(tmp_path: Path, change: str) -> None:
    content: object = dataclasses.asdict(state_at(1))
    assert isinstance(content, dict)
    if change == "missing key":
        del content["config"]
    elif change == "unknown key":
        content["generators"] = {}
    else:
        content = [1]
    (tmp_path / "state.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"state\.json: .+--restart"):
        read_state(tmp_path)


def test_a_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Before 2026-11-29 a step whose validation was interrupted was called unfinished_row."""
    entry = {"step": 1, "train_loss": 0.5}
    content = dataclasses.asdict(dataclasses.replace(state_at(1), pending_entry=entry))
    content["unfinished_row"] = content.pop("pending_entry")
    (tmp_path / "state.json").write_text(json.dumps(content), "utf-8")
    assert read_state(tmp_path) == dataclasses.replace(state_at(1), pending_entry=entry)


def test_a_cut_off_or_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state\.json: cannot be read \(.+\); check the path"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text('{"step": 1', "utf-8")
    with pytest.raises(UserError, match=r"state\.json: is not JSON"):
        read_state(tmp_path)


FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut off", "flipped bit", "missing"])
def test_a_damaged_file_is_named_and_its_checkpoint_is_not_found(
    tiny_model: LoadModel, tmp_path: Path, name: str, damage: str
) -> None:
    trainee = Trainee(tiny_model)
    trainee.step(1)
    folder = trainee.save(tmp_path, 1)
    content = bytearray((folder / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "cut off":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        content[-3] ^= 1
        (folder / name).write_bytes(content)
    problem = verify_folder(folder)
    assert problem is not None
    assert name in problem
    with pytest.raises(UserError, match=r"damaged-step-000001-1.+--restart"):  # set aside
        find_checkpoint(tmp_path)
    assert not folder.exists()


def test_moments_of_another_adapter_are_refused_and_nothing_is_loaded(tiny_model: LoadModel, tmp_path: Path) -> None:
    narrow = Trainee(tiny_model)
    narrow.model = tiny_model().train()
    narrow.seed = attach(narrow.model, dataclasses.replace(ADAPTER, target_modules=["q_proj"]), seed=1)
    narrow.optimizer = build_optimizer(parameter_groups(narrow.model))
    narrow.step(1)
    folder = narrow.save(tmp_path, 1)
    trainee = Trainee(tiny_model)
    before = [parameter.detach().clone() for parameter in lora_parameters(trainee.model)]
    with pytest.raises(UserError, match=r"optimizer\.safetensors: its moments .+--restart"):
        load_checkpoint(folder, trainee.model, trainee.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(trainee.model), strict=True))

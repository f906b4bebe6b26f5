"""A checkpoint is there as a whole or not at all, and holds all that a run needs to go on."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora import checkpoint
from minilora.adapter import AdapterConfig, attach_adapter
from minilora.batch import pack
from minilora.checkpoint import (
    RunState,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    replace_folder,
    save_checkpoint,
    write_json,
)
from minilora.errors import UserError
from minilora.lora import DropoutSeed, lora_parameters
from minilora.model import Qwen2ForCausalLM
from minilora.optim import build_optimizer
from minilora.prompt import Example
from minilora.step import train_step

ADAPTER = AdapterConfig(4, 8, 0.1, "all-linear", False, "tiny")
LoadModel = Callable[..., Qwen2ForCausalLM]


def state_at(step: int) -> RunState:
    return RunState(
        step=step,
        samples_seen=step * 8,
        best_step=1,
        best_metric=0.1 + 0.2,  # no short decimal: it has to come back to the bit
        evals_without_improvement=2,
        test_before={"loss": 0.7, "accuracy": 0.5},
        data_sha256={"train.jsonl": "ab"},
        model_sha256={"model.safetensors": "cd"},
        scaler={"scale": 65536.0},
        config={"prompt": {"labels": ["负面", "正面"]}},
    )


class Trainee:
    """A tiny model with its adapter and optimizer, trained on two examples."""

    def __init__(self, tiny_model: LoadModel):
        self.model = tiny_model().train()
        self.seed: DropoutSeed = attach_adapter(self.model, ADAPTER, seed=1)
        self.optimizer = build_optimizer(lora_parameters(self.model))

    def step(self, number: int) -> float:
        examples = [Example([5, 6, 7, 8 + n, number % 50, 9], [False] * 4 + [True] * 2) for n in range(2)]
        batches = [pack([example]) for example in examples]
        return train_step(self.model, batches, self.optimizer, 1e-2, 1.0, self.seed, 3, number).loss

    def save(self, directory: Path, step: int) -> Path:
        return save_checkpoint(directory, self.model, ADAPTER, self.optimizer, state_at(step))


def test_weights_moments_and_state_come_back_to_the_bit(tiny_model: LoadModel, tmp_path: Path) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    for number in (1, 2, 3):
        first.step(number)
    state = load_checkpoint(first.save(tmp_path, 3), second.model, second.optimizer)
    assert state == state_at(3)
    pairs = zip(lora_parameters(first.model), lora_parameters(second.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moments, restored = first.optimizer.tensors(), second.optimizer.tensors()
    assert moments.keys() == restored.keys()
    assert len(moments) == 3 * len(lora_parameters(first.model))
    for name, value in moments.items():
        assert value.dtype == restored[name].dtype
        assert torch.equal(value, restored[name])


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(tiny_model: LoadModel, tmp_path: Path) -> None:
    first, second = Trainee(tiny_model), Trainee(tiny_model)
    for number in (1, 2):
        first.step(number)
    folder = first.save(tmp_path, 2)
    expected = [first.step(number) for number in (3, 4)]
    torch.manual_seed(999)  # a generator that something drew from must not matter
    load_checkpoint(folder, second.model, second.optimizer)
    assert [second.step(number) for number in (3, 4)] == expected


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
    assert names == ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_folder_that_is_being_written_is_not_listed(tmp_path: Path) -> None:
    for name in ("step-000100", "step-000020", "step-1000000", ".writing-step-000120", "step-12", "final", "step-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000200").write_text("a file", "utf-8")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-000100", "step-1000000"]
    assert list_checkpoints(tmp_path / "absent") == []


def test_an_interrupted_write_leaves_the_older_checkpoint_alone(
    tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee = Trainee(tiny_model)
    trainee.step(1)
    trainee.save(tmp_path, 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("save_file", "write_json", "replace_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, function, stop)
            with pytest.raises(KeyboardInterrupt):
                trainee.save(tmp_path, 2)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
    trainee.save(tmp_path, 2)  # over the leftover
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]
    assert not list(tmp_path.glob(".writing-*"))


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


def test_every_file_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, target = tmp_path / ".writing-x", tmp_path / "x"
    (temporary / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (temporary / name).write_text(name, "utf-8")
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: synced.append((path.name, target.exists())))
    replace_folder(temporary, target)
    assert {name for name, renamed in synced if not renamed} == {"a", "b", "inner", ".writing-x"}
    assert [name for name, renamed in synced if renamed] == [tmp_path.name]
    assert (target / "inner" / "b").read_text("utf-8") == "inner/b"


def make_checkpoints(directory: Path, *steps: int) -> None:
    for step in steps:
        (directory / f"step-{step:06d}").mkdir(parents=True)
        (directory / f"step-{step:06d}" / "state.json").write_text("{}", "utf-8")


@pytest.mark.parametrize(
    ("keep", "best_step", "left"),
    [(1, 4, [4]), (2, 4, [3, 4]), (2, 1, [1, 3, 4]), (1, 2, [2, 4]), (9, 0, [1, 2, 3, 4]), (2, 0, [3, 4])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best_step: int, left: list[int]) -> None:
    make_checkpoints(tmp_path, 1, 2, 3, 4)
    prune_checkpoints(tmp_path, keep, best_step)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == left


def test_pruning_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 1)
    for name in (".writing-step-000002", ".writing-old-step-000001", "final"):
        (tmp_path / name).mkdir()
    (tmp_path / ".writing-notes").write_text("a file", "utf-8")
    prune_checkpoints(tmp_path, 1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step-000001"]


def test_files_in_the_way_of_a_checkpoint_are_replaced(tiny_model: LoadModel, tmp_path: Path) -> None:
    for name in (".writing-step-000001", ".writing-old-step-000001", "step-000001"):
        (tmp_path / name).write_text("a file", "utf-8")
    trainee = Trainee(tiny_model)
    trainee.step(1)
    trainee.save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == list_checkpoints(tmp_path) == [tmp_path / "step-000001"]


def test_json_is_the_same_bytes_for_the_same_content(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "好"})
    write_json(tmp_path / "b", {"a": "好", "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "好" in (tmp_path / "a").read_text("utf-8")
    assert b"\r" not in (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("change", ["missing key", "unknown key", "a list"])
def test_a_state_of_another_version_is_refused(tmp_path: Path, change: str) -> None:
    content: object = dataclasses.asdict(state_at(1))
    assert isinstance(content, dict)
    if change == "missing key":
        del content["step"]
    elif change == "unknown key":
        content["generators"] = {}
    else:
        content = [1]
    (tmp_path / "state.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"state\.json: is not a run's state \(.+\); start anew with --restart"):
        read_state(tmp_path)


def test_a_cut_off_or_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state\.json: cannot be read \(.+\); check the path"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text('{"step": 1', "utf-8")
    with pytest.raises(UserError, match=r"state\.json: is not JSON"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_cut_off_file_is_named_not_loaded(tiny_model: LoadModel, tmp_path: Path, name: str) -> None:
    trainee = Trainee(tiny_model)
    trainee.step(1)
    folder = trainee.save(tmp_path, 1)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_checkpoint(folder, trainee.model, trainee.optimizer)


def test_moments_of_another_adapter_are_refused(tiny_model: LoadModel, tmp_path: Path) -> None:
    trainee = Trainee(tiny_model)
    trainee.step(1)
    folder = trainee.save(tmp_path, 1)
    other = tmp_path / "other"
    narrow = Trainee(tiny_model)
    narrow.model = tiny_model().train()
    narrow.seed = attach_adapter(narrow.model, dataclasses.replace(ADAPTER, target_modules=("q_proj",)), seed=1)
    narrow.optimizer = build_optimizer(lora_parameters(narrow.model))
    narrow.step(1)
    moments = narrow.save(other, 1) / "optimizer.safetensors"
    shutil.copy(moments, folder / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        load_checkpoint(folder, trainee.model, trainee.optimizer)

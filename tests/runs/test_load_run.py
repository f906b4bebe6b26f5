"""A trained adapter is opened once, verified once, with the configuration of its run, wherever it and its base are."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.data import hub
from minilora.errors import UserError
from minilora.runs.load_run import KEYS_READ, columns_of, load_run, load_run_or_base
from minilora.system import manifest
from tests.runs.conftest import flip_bit


def test_an_adapter_is_hashed_once_from_its_folder_to_the_model(
    final: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: Counter[str] = Counter()
    plain = manifest.hash_file

    def count(path: Path) -> str:
        hashed[path.name] += 1
        return plain(path)

    monkeypatch.setattr(manifest, "hash_file", count)
    load_run(final, str(tiny_checkpoint()), []).load()
    assert hashed["adapter_model.safetensors"] == hashed["training_args.json"] == 1
    assert hashed["adapter_config.json"] <= 1  # none where its content alone proves it


def test_a_damaged_adapter_is_named_before_its_base_model_is_looked_for(final: Path) -> None:
    flip_bit(final / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"final: is damaged \(adapter_model\.safetensors .+take another copy"):
        load_run(final, "/nowhere", [])


def test_the_configuration_is_that_of_the_run(final: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    config = load_run(final, str(tiny_checkpoint()), ["train.per_device_eval_batch_size=3"]).config
    assert (config.lora.r, config.train.per_device_eval_batch_size) == (2, 3)


def foreign(final: Path, folder: Path, **changes: Any) -> Path:
    """The adapter as peft would have saved it in `folder`: its two files."""
    folder.mkdir(parents=True)
    shutil.copyfile(final / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    content = {**json.loads((final / "adapter_config.json").read_text("utf-8")), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(content), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["/root/models/Qwen2.5-0.5B", "models/Qwen2.5-0.5B", "D:\\models\\qwen"])
def test_a_base_that_is_not_here_is_named_with_the_file_that_names_it(final: Path, tmp_path: Path, name: str) -> None:
    folder = foreign(final, tmp_path / "adapter", base_model_name_or_path=name)
    with pytest.raises(UserError) as raised:
        load_run(folder, None, [])
    assert str(raised.value).startswith(f"{name}: ")
    assert f"{folder / 'adapter_config.json'} names this base model; say with --base" in str(raised.value)
    for base, overrides in (("/nowhere", []), (None, ["model.name_or_path=/nowhere"])):
        with pytest.raises(UserError) as raised:
            load_run(folder, base, overrides)
        assert "names this base" not in str(raised.value)


def test_the_base_of_a_run_is_that_of_adapter_config_and_else_of_the_runs_own_file(final: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(final, tmp_path / "moved"))
    (folder / "manifest.json").unlink()
    adapter, run = folder / "adapter_config.json", folder / "training_args.json"
    content, named = json.loads(run.read_text("utf-8")), json.loads(adapter.read_text("utf-8"))
    content["model"]["name_or_path"] = "/gone"
    run.write_text(json.dumps(content), "utf-8")
    for name, path, file in (("/corrected", "/corrected", "adapter_config"), (None, "/gone", "training_args")):
        adapter.write_text(json.dumps({**named, "base_model_name_or_path": name}), "utf-8")
        with pytest.raises(UserError, match=rf"{path}: .+\n  .+{file}\.json names this base model; say with --base"):
            load_run(folder, None, [])


def test_another_base_is_not_asked_for_the_revision_of_the_runs_own(
    final: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = Path(shutil.copytree(final, tmp_path / "moved")), tiny_checkpoint()
    (folder / "manifest.json").unlink()
    content = json.loads((folder / "training_args.json").read_text("utf-8"))
    content["model"]["revision"] = "v1"
    (folder / "training_args.json").write_text(json.dumps(content), "utf-8")
    asked = []

    def download(kind: str, name: str, revision: str | None, **patterns: list[str]) -> Path:
        asked.append((name, revision))
        return base

    monkeypatch.setattr(hub, "download_snapshot", download)
    load_run(folder, "other/base", [])
    assert asked == [("other/base", None)]


def test_an_adapter_by_its_name_on_the_hub_is_one_and_a_base_model_is_none(
    final: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint()
    adapter = foreign(final, tmp_path / "snapshots" / "adapter", base_model_name_or_path="some/base", revision="v1")
    asked = []

    def download(kind: str, name: str, revision: str | None, **patterns: list[str]) -> Path:
        asked.append((name, revision, patterns["allow_patterns"]))
        return {"some/adapter": adapter, "some/base": base}[name]

    monkeypatch.setattr(hub, "download_snapshot", download)
    monkeypatch.chdir(tmp_path)
    by_name = load_run_or_base(Path("some/adapter"), None, [], KEYS_READ)
    assert (by_name.path, by_name.model_folder, by_name.kind) == (adapter, base, "adapter")
    assert asked == [("some/adapter", None, hub.ADAPTER_FILES), ("some/base", "v1", hub.MODEL_FILES)]
    (adapter / "metrics.json").write_text('{"data_columns": {"text": "review"}}', "utf-8")
    assert columns_of(Path("some/adapter")) == {"text": "review"}
    plain = load_run_or_base(Path("some/base"), None, [], KEYS_READ)
    assert (plain.path, plain.model_folder, plain.kind) == (None, base, "base model")
    with pytest.raises(UserError, match=r"is a base model, without adapter_config\.json; give an"):
        load_run(Path("some/base"), None, [])


def test_of_several_runs_the_final_adapters_are_named_first_and_of_a_file_its_folder(
    final: Path, tmp_path: Path
) -> None:
    for name in ("a/checkpoints/step-000500", "b/checkpoints/final"):
        foreign(final, tmp_path / "outputs" / name)
    with pytest.raises(UserError, match=r"; b/checkpoints/final, a/checkpoints/step-000500 in it do: give one of them"):
        load_run(tmp_path / "outputs", None, [])
    with pytest.raises(UserError, match=rf"is a file; give its folder, {final}"):
        load_run(final / "adapter_model.safetensors", None, [])
    (tmp_path / "a.csv").write_text("text", "utf-8")
    with pytest.raises(UserError, match="is a file; give the folder of an adapter"):
        load_run(tmp_path / "a.csv", None, [])


@pytest.mark.parametrize("empty", [None, ""])
def test_an_adapter_that_names_no_base_model_asks_for_it(final: Path, tmp_path: Path, empty: str | None) -> None:
    folder = foreign(final, tmp_path / "nameless", base_model_name_or_path=empty)
    with pytest.raises(UserError, match="names no base model; give it with --base"):
        load_run(folder, None, [])


@pytest.mark.parametrize(
    "inner", [["checkpoint-500", "checkpoint-1000"], ["checkpoints/final"], ["quickstart/checkpoints/final"]]
)
def test_a_folder_above_the_adapters_names_them(final: Path, tmp_path: Path, inner: list[str]) -> None:
    for name in inner:
        foreign(final, tmp_path / "outputs" / name)
    with pytest.raises(UserError) as raised:
        load_run(tmp_path / "outputs", None, [])
    assert "holds no adapter_config.json; " in str(raised.value)
    assert all(name in str(raised.value) for name in inner)


def test_weights_in_another_layout_are_said_too(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "base"))
    (base / "consolidated.safetensors").write_bytes(b"")
    hub.fetch_model(str(base))
    assert "model.safetensors is read, consolidated.safetensors and its like" in capsys.readouterr().err


def test_weights_that_are_not_read_are_said(
    final: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(final, tmp_path / "adapter")
    foreign(final, folder / "checkpoint-500")
    (folder / "adapter_model.bin").write_bytes(b"")
    base = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "base"))
    (base / "model-00001-of-00002.safetensors").write_bytes(b"")
    capsys.readouterr()
    load_run(folder, str(base), [])
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("its own adapter_model.safetensors is read, not adapter_model.bin, checkpoint-500 in it")
    assert second.startswith(f"note: {base}: model.safetensors is read, model-00001-of-00002.safetensors and its like")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "but an adapter; give the base model that its adapter_config.json names"),
        ("model-q4_k_m.gguf", "but a GGUF file, which is not read; give the checkpoint in safetensors"),
        ("checkpoint-500/config.json", "checkpoint-500 in it do: give one of them"),
        ("snapshots/0123abcd/config.json", "snapshots/0123abcd in it do: give one of them"),
    ],
)
def test_a_base_folder_without_a_checkpoint_is_named_as_what_it_is(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}", "utf-8")
    with pytest.raises(UserError, match=rf"holds no config\.json.+{message}"):
        hub.fetch_model(str(tmp_path))
    if name.endswith(".gguf"):
        with pytest.raises(UserError, match=message):
            load_run_or_base(tmp_path, None, [], KEYS_READ)

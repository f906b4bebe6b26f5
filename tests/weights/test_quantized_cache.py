"""The cache of 4-bit copies: used when it is intact, made anew when it is not or when the original has changed."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.locks import lock_folder
from minilora.system.manifest import read_manifest, verify_folder
from minilora.weights import quantized_cache as cache_module
from minilora.weights import safetensors_io
from minilora.weights.bnb_checkpoint import write_quantized
from minilora.weights.load import LoadSettings, load_model
from minilora.weights.quantized_cache import load_through_cache

NF4 = LoadSettings(torch.bfloat16)


@pytest.fixture
def source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that models were loaded from."""
    seen: list[Path] = []

    def load(folder: Path, *how: Any, **settings: Any) -> Qwen2ForCausalLM:
        seen.append(folder)
        return load_model(folder, *how, **settings)

    monkeypatch.setattr(cache_module, "load_model", load)
    return seen


def copies(cache: Path) -> list[Path]:
    """What is in the cache, except its lock."""
    return sorted(path for path in cache.iterdir() if path.name != ".lock")


def test_the_second_load_comes_from_the_copy_and_is_the_same_model(
    source: Path, tmp_path: Path, loads: list[Path]
) -> None:
    first, second = (load_through_cache(source, tmp_path / "cache", NF4).state_dict() for _ in range(2))
    (copy,) = copies(tmp_path / "cache")
    assert loads == [source, copy]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_way_of_quantising_has_a_copy_of_its_own(source: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"double_quantization": False},
        {"quantization": "fp4"},
        {"compute_dtype": torch.float32},
    ]
    for change in changes:
        load_through_cache(source, tmp_path / "cache", replace(NF4, **change))
    assert len(copies(tmp_path / "cache")) == len(changes)


@pytest.mark.parametrize("change", ["content", "time", "size"])
def test_a_changed_original_is_quantised_anew(source: Path, tmp_path: Path, loads: list[Path], change: str) -> None:
    load_through_cache(source, tmp_path / "cache", NF4)
    weights = source / "model.safetensors"
    content, status = bytearray(weights.read_bytes()), weights.stat()
    if change == "content":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif change == "time":
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    else:
        save_file(load_file(weights), weights, metadata={"format": "pt", "note": "longer"})
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    load_through_cache(source, tmp_path / "cache", NF4)
    assert loads == [source, source]
    assert len(copies(tmp_path / "cache")) == 2


def test_the_original_is_identified_without_reading_its_tensors(
    source: Path, tmp_path: Path, loads: list[Path]
) -> None:
    load_through_cache(source, tmp_path / "cache", NF4)
    weights = source / "model.safetensors"
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-64:] = bytes(64)
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    load_through_cache(source, tmp_path / "cache", NF4)
    assert loads == [source, *copies(tmp_path / "cache")], "size and time are what is trusted"


def test_in_the_hubs_cache_the_blobs_name_identifies_a_file(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, loads: list[Path]
) -> None:
    """Another snapshot that links to the same blobs is the same model; one with another blob is not."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in names:
        shutil.copyfile(tiny_checkpoint() / name, blobs / f"hash of {name}")
    shutil.copyfile(tiny_checkpoint(seed=1) / "model.safetensors", blobs / "another hash")
    for snapshot in ("first", "second", "third"):
        (tmp_path / snapshot).mkdir()
        for name in names:
            changed = snapshot == "third" and name == "model.safetensors"
            (tmp_path / snapshot / name).symlink_to(blobs / ("another hash" if changed else f"hash of {name}"))
    for name in names:
        os.utime(blobs / f"hash of {name}", (0, 0))
    load_through_cache(tmp_path / "first", tmp_path / "cache", NF4)
    os.utime(blobs / "hash of model.safetensors")
    load_through_cache(tmp_path / "second", tmp_path / "cache", NF4)
    assert loads == [tmp_path / "first", *copies(tmp_path / "cache")]
    load_through_cache(tmp_path / "third", tmp_path / "cache", NF4)
    assert loads[2:] == [tmp_path / "third"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped bit", "missing", "cut"])
def test_a_damaged_copy_is_made_anew(
    source: Path, tmp_path: Path, loads: list[Path], capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    load_through_cache(source, tmp_path / "cache", NF4)
    (copy,) = copies(tmp_path / "cache")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    content = bytearray(before[name])
    if damage == "missing":
        (copy / name).unlink()
    elif damage == "cut":
        (copy / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    load_through_cache(source, tmp_path / "cache", NF4)
    assert loads == [source, source]
    assert "is damaged" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_what_is_not_quantised_here_is_not_copied(source: Path, tmp_path: Path, loads: list[Path]) -> None:
    load_through_cache(source, tmp_path / "cache", LoadSettings(torch.float32, "none"))
    ready = tmp_path / "ready"
    write_quantized(load_model(source, torch.bfloat16), source, ready, {})
    load_through_cache(ready, tmp_path / "cache", NF4)
    assert loads == [source, ready]
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_copy_is_not_taken_for_one(
    source: Path, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_io, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_through_cache(source, tmp_path / "cache", NF4)
    load_through_cache(source, tmp_path / "cache", NF4)
    assert loads == [source, source]
    assert [path.name[0] != "." for path in copies(tmp_path / "cache")] == [True]


def test_a_cache_that_cannot_be_used_is_named_and_the_model_is_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert load_through_cache(source, tmp_path / "file", NF4).model.layers
    assert "model.quantized_cache" in capsys.readouterr().err

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_io, "save_file", full)
    assert load_through_cache(source, tmp_path / "cache", NF4).model.layers
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.endswith("continues without it\n")
    assert copies(tmp_path / "cache") == []


def test_while_another_process_writes_a_copy_it_continues_without(
    source: Path, tmp_path: Path, loads: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with lock_folder(cache, "model.quantized_cache"):
        assert load_through_cache(source, cache, NF4).model.layers
    assert loads == [source]
    assert copies(cache) == []
    said = capsys.readouterr().err
    assert said.startswith(f"model.quantized_cache: {cache} cannot be used")
    assert f"process {os.getpid()} " in said


def test_a_copy_that_another_process_made_in_the_meantime_is_used(
    source: Path, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"

    def late(folder: Path, key: str) -> AbstractContextManager[None]:
        monkeypatch.setattr(cache_module, "lock_folder", lock_folder)
        load_through_cache(source, cache, NF4)  # by the other one, which had the lock first
        return lock_folder(folder, key)

    monkeypatch.setattr(cache_module, "lock_folder", late)
    load_through_cache(source, cache, NF4)
    assert loads == [source, *copies(cache)]
    assert capsys.readouterr().err == ""


def test_a_copy_that_is_there_is_used_while_another_one_is_written(
    source: Path, tmp_path: Path, loads: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    load_through_cache(source, cache, NF4)
    with lock_folder(cache, "model.quantized_cache"):
        load_through_cache(source, cache, NF4)
    assert loads == [source, *copies(cache)]
    assert capsys.readouterr().err == ""


def test_a_sound_copy_under_the_key_of_another_model_is_not_used(
    source: Path, tmp_path: Path, loads: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    load_through_cache(source, cache, NF4)
    (copy,) = copies(cache)
    (source / "tokenizer_config.json").write_text("{}")
    load_through_cache(source, cache, NF4)
    (other,) = set(copies(cache)) - {copy}
    shutil.rmtree(other)
    shutil.copytree(copy, other)
    load_through_cache(source, cache, NF4)
    assert loads == [source] * 3
    assert f"{other}: the 4-bit copy is damaged (its manifest is another one's)" in capsys.readouterr().err
    load_through_cache(source, cache, NF4)
    assert loads[-1] == other


def test_a_file_of_the_models_folder_that_is_named_manifest_does_no_harm(
    source: Path, tmp_path: Path, loads: list[Path]
) -> None:
    (source / "manifest.json").write_text("{}")
    for _ in range(2):
        load_through_cache(source, tmp_path / "cache", NF4)
    assert loads[0] == source != loads[1]


def test_a_corrected_tokenizer_gets_a_copy_of_its_own(source: Path, tmp_path: Path, loads: list[Path]) -> None:
    load_through_cache(source, tmp_path / "cache", NF4)
    (source / "tokenizer_config.json").write_text("{}")
    load_through_cache(source, tmp_path / "cache", NF4)
    assert loads == [source, source]


def test_the_manifest_says_what_the_copy_was_made_from(source: Path, tmp_path: Path) -> None:
    load_through_cache(source, tmp_path / "cache", NF4)
    (copy,) = copies(tmp_path / "cache")
    manifest = read_manifest(copy)
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(manifest["facts"]) == ["key", "made_from"]
    assert sorted(manifest["facts"]["made_from"]["files"]) == sorted(manifest["files"]) == names
    assert copy.name == manifest["facts"]["key"][:16]
    assert verify_folder(copy) is None

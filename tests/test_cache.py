"""The cache of 4-bit copies: used when it is whole, made again when it is not, never out of date."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora import cache as cache_module
from minilora.cache import load_through_cache
from minilora.load import load_model
from minilora.quantized import save_quantized

How = tuple[torch.dtype, str, bool]
NF4: How = (torch.bfloat16, "nf4", True)


@pytest.fixture
def source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that models were loaded from."""
    seen: list[Path] = []
    monkeypatch.setattr(cache_module, "load_model", lambda folder, *a: seen.append(folder) or load_model(folder, *a))
    return seen


def test_the_second_load_comes_from_the_copy_and_is_the_same_model(
    source: Path, tmp_path: Path, loads: list[Path]
) -> None:
    first, second = (load_through_cache(source, tmp_path / "cache", *NF4).state_dict() for _ in range(2))
    (copy,) = (tmp_path / "cache").iterdir()
    assert loads == [source, copy]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_way_of_quantising_has_a_copy_of_its_own(source: Path, tmp_path: Path) -> None:
    ways: list[How] = [NF4, (torch.bfloat16, "nf4", False), (torch.bfloat16, "fp4", True), (torch.float32, "nf4", True)]
    for how in ways:
        load_through_cache(source, tmp_path / "cache", *how)
    assert len(list((tmp_path / "cache").iterdir())) == len(ways)


def test_a_changed_model_is_quantised_anew(source: Path, tmp_path: Path, loads: list[Path]) -> None:
    load_through_cache(source, tmp_path / "cache", *NF4)
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    load_through_cache(source, tmp_path / "cache", *NF4)
    assert loads == [source, source]
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped bit", "missing", "cut"])
def test_a_damaged_copy_is_made_again(
    source: Path, tmp_path: Path, loads: list[Path], capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    load_through_cache(source, tmp_path / "cache", *NF4)
    (copy,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    content = bytearray(before[name])
    if damage == "missing":
        (copy / name).unlink()
    elif damage == "cut":
        (copy / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
    load_through_cache(source, tmp_path / "cache", *NF4)
    assert loads == [source, source]
    assert "is damaged" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_what_is_not_quantised_here_is_not_copied(source: Path, tmp_path: Path, loads: list[Path]) -> None:
    load_through_cache(source, tmp_path / "cache", torch.float32, "none", True)
    ready = tmp_path / "ready"
    save_quantized(load_model(source, torch.bfloat16), source, ready)
    load_through_cache(ready, tmp_path / "cache", *NF4)
    assert loads == [source, ready]
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_copy_is_not_taken_for_one(
    source: Path, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "save_quantized", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_through_cache(source, tmp_path / "cache", *NF4)
    load_through_cache(source, tmp_path / "cache", *NF4)
    assert loads == [source, source]
    assert [path.name[0] != "." for path in (tmp_path / "cache").iterdir()] == [True]


def test_a_cache_that_cannot_be_used_is_named_and_the_model_is_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert load_through_cache(source, tmp_path / "file", *NF4).model.layers
    assert "model.quantized_cache" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_quantized", full)
    assert load_through_cache(source, tmp_path / "cache", *NF4).model.layers
    assert "cannot be used (No space left on device); goes on without" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_copy_that_another_process_wrote_meanwhile_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: object) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(cache_module, "save_quantized", save_quantized)
            load_through_cache(source, tmp_path / "cache", *NF4)
        save_quantized(*arguments)

    monkeypatch.setattr(cache_module, "save_quantized", slowly)
    load_through_cache(source, tmp_path / "cache", *NF4)
    (copy,) = (tmp_path / "cache").iterdir()
    assert cache_module._problem_of(copy, json.loads((copy / "manifest.json").read_text())["key"]) is None


def test_a_file_of_the_models_folder_that_is_named_manifest_does_no_harm(
    source: Path, tmp_path: Path, loads: list[Path]
) -> None:
    (source / "manifest.json").write_text("{}")
    for _ in range(2):
        load_through_cache(source, tmp_path / "cache", *NF4)
    assert loads[0] == source != loads[1]


def test_a_corrected_tokenizer_gets_a_copy_of_its_own(source: Path, tmp_path: Path, loads: list[Path]) -> None:
    load_through_cache(source, tmp_path / "cache", *NF4)
    (source / "tokenizer_config.json").write_text("{}")
    load_through_cache(source, tmp_path / "cache", *NF4)
    assert loads == [source, source]


def test_the_manifest_says_what_the_copy_was_made_from(source: Path, tmp_path: Path) -> None:
    load_through_cache(source, tmp_path / "cache", *NF4)
    (copy,) = (tmp_path / "cache").iterdir()
    manifest = json.loads((copy / "manifest.json").read_text())
    assert sorted(manifest["made_from"]["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(manifest["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert copy.name == manifest["key"][:16]

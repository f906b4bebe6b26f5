"""Flipped bits, files cut off, pickles: noticed, never loaded, never run."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora.adapters.peft_files import load_adapter
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.manifest import read_manifest, verify_folder, write_folder
from minilora.weights.safetensors_io import read_header
from tests.faults.conftest import Count, HowMany, outcome
from tests.faults.runner import Runs


@pytest.fixture(scope="module")
def output(runs: Runs, keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    assert runs.run(keys, folder) == 0
    return folder


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("name", ["step-000006", "final"])
def test_every_flipped_bit_is_noticed(output: Path, name: str, count: Count, how_many: HowMany) -> None:
    folder = output / "checkpoints" / name
    bits = [(path, bit) for path in sorted(folder.iterdir()) for bit in range(8 * path.stat().st_size)]
    chosen = random.Random(5).sample(bits, how_many(50, 1000, len(bits) if name.startswith("step-") else 1000))
    silent = []
    for path, bit in chosen:
        flip(path, bit)
        if verify_folder(folder) is None:
            silent.append((path.name, bit))
        flip(path, bit)
    assert verify_folder(folder) is None
    count(f"bits flipped in {name}: {len(chosen)} of {len(bits)}, silent: {len(silent)}")
    assert silent == []


def test_no_file_is_accepted_that_is_cut_off(output: Path, tmp_path: Path, count: Count, how_many: HowMany) -> None:
    folder = Path(shutil.copytree(output / "checkpoints" / "step-000006", tmp_path / "step-000006"))
    accepted, tried = [], 0
    stride, hashed = how_many(97, 1, 1), how_many(1, 16, 1)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for length in range(len(content) - 1, -1, -stride):
            os.truncate(path, length)
            tried += 1
            if path.suffix == ".safetensors":  # by the format only, as for a file without a manifest
                with pytest.raises(UserError):
                    read_header(path)
            if (length % hashed == 0 or path.suffix == ".json") and verify_folder(folder) is None:
                accepted.append((path.name, length))
        path.write_bytes(content)
    count(f"files of a checkpoint cut off at {tried} lengths, accepted: {len(accepted)}")
    assert accepted == []
    assert verify_folder(folder) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_run_resumes_from_the_checkpoint_before_the_damaged_one(
    output: Path, runs: Runs, keys: list[str], undisturbed: dict[str, Any], tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "run"))
    checkpoints = copy / "checkpoints"
    shutil.rmtree(checkpoints / "final")
    flip(checkpoints / "step-000006" / name, 100)
    damaged = (checkpoints / "step-000006" / name).read_bytes()
    assert runs.run(keys, copy) == 0
    assert outcome(copy) == undisturbed["outcome"]
    assert (checkpoints / "damaged-step-000006-1" / name).read_bytes() == damaged
    errors = Path(f"{copy}.err").read_text("utf-8")
    assert "step-000006: is damaged (" in errors
    assert f"{name} has SHA-256" in errors if name != "manifest.json" else "manifest.json: is damaged" in errors
    assert "set aside as damaged-step-000006-1" in errors


@pytest.mark.slow
def test_damage_everywhere_is_refused_and_stays_refused(
    output: Path, runs: Runs, keys: list[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "final")
    for folder in (copy / "checkpoints").glob("step-*"):
        flip(folder / "state.json", 300)
    for _ in range(2):
        assert runs.run(keys, copy) == 2
        assert "holds no sound checkpoint, only damaged-step-" in Path(f"{copy}.err").read_text("utf-8")
    assert runs.run([*keys, "--restart"], copy) == 0


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("has_its_hash", [True, False], ids=["with its hash", "without"])
def test_a_pickle_in_the_place_of_a_file_is_never_run(
    output: Path, runs: Runs, keys: list[str], tmp_path: Path, name: str, has_its_hash: bool
) -> None:
    """Whoever can write a file can write its hash into the manifest: the parsers have to refuse it too."""
    copy = Path(shutil.copytree(output, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints" / "final")
    hostile = pickle.dumps(Canary(tmp_path / "canary"))
    for folder in (copy / "checkpoints").glob("step-*"):
        facts = read_manifest(folder)["facts"]
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        files |= {name: hostile, "pytorch_model.bin": hostile, "optimizer.pt": hostile}
        if has_its_hash:
            write_folder(folder, files.items(), facts)
            assert verify_folder(folder) is None
        else:
            (folder / name).write_bytes(hostile)
    assert runs.run(keys, copy) == 2
    errors = Path(f"{copy}.err").read_text("utf-8")
    assert "Traceback" not in errors
    assert name in errors
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("allow_bin", [False, True])
def test_a_hostile_adapter_file_is_never_run(
    output: Path, tmp_path: Path, tiny_model: Callable[..., Qwen2ForCausalLM], allow_bin: bool
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(output / "checkpoints" / "final" / "adapter_config.json", folder)
    torch.save({"a": Canary(tmp_path / "canary")}, folder / "adapter_model.bin")
    expected = "refused, it is not a file of plain tensors" if allow_bin else "is a pickle, which can run code"
    with pytest.raises(UserError, match=expected):
        load_adapter(tiny_model(layers=1), folder, allow_bin)
    assert not (tmp_path / "canary").exists()

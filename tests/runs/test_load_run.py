"""A trained adapter is opened once, verified once, with the configuration of its run."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.runs.load_run import load_run
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
    assert hashed["adapter_model.safetensors"] == hashed["adapter_config.json"] == 1


def test_a_damaged_adapter_is_named_before_its_base_model_is_looked_for(final: Path) -> None:
    flip_bit(final / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"final: is damaged \(adapter_model\.safetensors .+take another copy"):
        load_run(final, "/nowhere", [])


def test_the_configuration_is_that_of_the_run(final: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    config = load_run(final, str(tiny_checkpoint()), ["train.per_device_eval_batch_size=3"]).config
    assert (config.lora.r, config.train.per_device_eval_batch_size) == (2, 3)

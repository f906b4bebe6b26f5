"""An adapter folder is applied as it says or refused, with the key and what to do.

Agreement with peft stands in tests/parity/test_adapter.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.adapters.attach import attach, lora_parameters, set_adapter
from minilora.adapters.peft_config import BaseModel, read_adapter_config
from minilora.adapters.peft_files import (
    adapter_files,
    damage_of_adapter,
    load_adapter,
    load_adapter_weights,
)
from minilora.config import LoraConfig
from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.system.manifest import write_folder
from tests.conftest import save_adapter

ADAPTER = LoraConfig(r=4, alpha=8, dropout=0.1)
LoadModel = Callable[..., Qwen2ForCausalLM]


@pytest.fixture
def folder(tiny_model: LoadModel, tmp_path: Path) -> Path:
    """An adapter as training writes it."""
    model = tiny_model()
    attach(model, ADAPTER)
    save_adapter(model, tmp_path, ADAPTER, BaseModel("tiny"))
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def test_a_written_configuration_reads_back_with_names_for_all_linear(folder: Path) -> None:
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    expected = LoraConfig(r=4, alpha=8, dropout=0.1, target_modules=names)
    assert read_adapter_config(folder) == (expected, BaseModel("tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0, expected 1 or more; without it the adapter would be applied wrongly"),
        ({"r": -1}, "r is -1, expected 1 or more"),
        ({"r": "16"}, "r is '16', expected a whole number"),
        ({"r": True}, "r is True, expected a whole number"),
        ({"r": 10**12}, "r is 1000000000000, expected 65536 or less"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected more than 0"),
        ({"lora_alpha": -8}, "lora_alpha is -8, expected more than 0"),
        ({"lora_alpha": 1e7}, "lora_alpha is 10000000.0, expected 1000000.0 or less"),
        ({"lora_alpha": "32"}, "lora_alpha is '32', expected a number"),
        ({"lora_alpha": [1]}, r"lora_alpha is \[1\], expected a number"),
        ({"lora_alpha": float("nan")}, r"is not JSON \(NaN is not JSON\)"),
        ({"lora_alpha": float("inf")}, r"is not JSON \(Infinity is not JSON\)"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', expected a number"),
        ({"target_modules": 5}, "target_modules is 5, expected text"),
        ({"target_modules": [5]}, r"target_modules is \[5\], expected text"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, expected text"),
        ({"r": 0, "lora_alpha": "8"}, "r is 0, expected 1 or more, lora_alpha is '8', expected a number"),
        ({"r": None, "target_modules": None}, "has no r, target_modules; without it the adapter would be applied"),
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', which is more than plain LoRA"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_is_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    change_config(folder, **changes)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}"):
        read_adapter_config(folder)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_configuration_that_is_no_object_is_refused(content: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json: holds a \w+, expected an object; write the adapter"):
        read_adapter_config(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_lora_weights", value) for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("velora_config", {"rank": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"beta": 1}),
        ("target_parameters", ["experts"]),
        ("lora_bias", True),
        ("a_key_of_a_later_release", 1),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(name: str, value: object, folder: Path) -> None:
    change_config(folder, **{name: value})
    with pytest.raises(UserError) as caught:
        read_adapter_config(folder)
    assert f"adapter_config.json: {name} is {value!r}, which is more than plain LoRA" in str(caught.value)
    assert str(caught.value).endswith("; train without it, or merge the adapter with peft and use the merged model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("init_lora_weights", value) for value in (True, False, None, "gaussian", "orthogonal", "eva", "mica")),
        ("task_type", "SEQ_CLS"),
        ("peft_version", "0.21.2"),
        ("auto_mapping", {"base_model_class": "Qwen2ForCausalLM"}),
        ("lora_dropout", None),
        ("use_rslora", None),
        ("a_key_of_a_later_release", None),
    ],
)
def test_a_key_that_leaves_the_forward_pass_alone_is_accepted(name: str, value: object, folder: Path) -> None:
    before, _ = read_adapter_config(folder)
    change_config(folder, **{name: value})
    after, _ = read_adapter_config(folder)
    assert (after.r, after.alpha, after.use_rslora) == (before.r, before.alpha, before.use_rslora)


def test_whole_number_tensors_are_refused(folder: Path, tiny_model: LoadModel) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.int32)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{name}: file has torch\.int32, expected a floating-point type"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"refused, it is not a file of plain tensors \(\w+.*\); use safetensors"),
        ([1], "refused, it is not a table of named dense tensors; use safetensors"),
        ({1: torch.zeros(1)}, "refused, it is not a table of named dense tensors"),
        ({"a": 1}, "refused, it is not a table of named dense tensors; use safetensors"),
        ({"a": torch.eye(2).to_sparse()}, "refused, it is not a table of named dense tensors"),
    ],
    ids=["empty", "list", "whole number as a name", "no tensor", "sparse"],
)
def test_a_bin_file_of_anything_but_dense_named_tensors_is_refused(
    content: Any, message: str, folder: Path, tiny_model: LoadModel
) -> None:
    (folder / "adapter_model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "adapter_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=rf"adapter_model\.bin: {message}"):
        load_adapter(tiny_model(), folder, allow_bin=True)


def adapted(tiny_model: LoadModel) -> Qwen2ForCausalLM:
    model = tiny_model()
    attach(model, ADAPTER)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter)
    return model


def is_equal(model: Qwen2ForCausalLM, other: Qwen2ForCausalLM) -> bool:
    pairs = zip(lora_parameters(model), lora_parameters(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("load", [load_adapter, load_adapter_weights])
def test_a_bin_file_is_not_read_unasked(tiny_model: LoadModel, tmp_path: Path, load: Callable[..., object]) -> None:
    trained, model = adapted(tiny_model), tiny_model()
    write_folder(tmp_path / "bin", adapter_files(trained, ADAPTER, BaseModel("tiny"), "bin"), {})
    if load is load_adapter_weights:
        attach(model, ADAPTER)
    with pytest.raises(
        UserError, match=r"adapter_model\.bin: is a pickle, which can run code, and is not read unasked; convert it to"
    ):
        load(model, tmp_path / "bin")
    fresh = tiny_model()
    load_adapter(fresh, tmp_path / "bin", allow_bin=True)
    assert is_equal(fresh, trained)


def test_where_both_are_there_the_bin_file_is_not_touched(folder: Path, tiny_model: LoadModel) -> None:
    (folder / "adapter_model.bin").write_bytes(b"no pickle")
    model = tiny_model()
    load_adapter(model, folder, allow_bin=True)
    assert len(lora_parameters(model)) == 2 * 7 * 2


def test_a_folder_without_weights_says_what_is_looked_for(folder: Path, tiny_model: LoadModel) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors; give the folder that training wrote"):
        load_adapter(tiny_model(), folder, allow_bin=True)


@pytest.mark.parametrize("save_format", ["safetensors", "bin"])
@pytest.mark.parametrize("weights_are_damaged", [True, False])
def test_where_there_is_a_manifest_the_files_are_verified_first(
    tiny_model: LoadModel, tmp_path: Path, save_format: str, weights_are_damaged: bool
) -> None:
    trained, folder = adapted(tiny_model), tmp_path / "final"
    notes = ("README.md", b"notes")
    write_folder(folder, [*adapter_files(trained, ADAPTER, BaseModel("tiny"), save_format), notes], {})
    (folder / "README.md").write_text("changed by hand", "utf-8")
    model = tiny_model()
    load_adapter(model, folder, allow_bin=True)
    assert is_equal(model, trained)
    name = f"adapter_model.{save_format}" if weights_are_damaged else "adapter_config.json"
    content = bytearray((folder / name).read_bytes())
    place = len(content) - 1 if weights_are_damaged else content.index(b'"lora_alpha": 8') + len(b'"lora_alpha": ')
    content[place] ^= 1  # another number, in a file that reads as well as before
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"final: is damaged \({name} has SHA-256 .+\); take another copy of it"):
        load_adapter(tiny_model(), folder, allow_bin=True)


def test_an_adapter_whose_file_cannot_be_read_leaves_the_model_as_it_was(folder: Path, tiny_model: LoadModel) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_adapter(model, folder)
    assert [name for name, _ in model.named_modules()] == names


def test_the_damage_of_a_folder_is_told_by_its_manifest_but_for_the_model_card(
    tiny_model: LoadModel, tmp_path: Path
) -> None:
    folder = tmp_path / "final"
    others = {"README.md": b"notes", "metrics.json": b"{}"}
    write_folder(
        folder, [*adapter_files(adapted(tiny_model), ADAPTER, BaseModel("tiny"), "safetensors"), *others.items()], {}
    )
    (folder / "README.md").unlink()
    assert damage_of_adapter(folder) is None
    (folder / "metrics.json").write_bytes(b"[]")
    assert str(damage_of_adapter(folder)).startswith("metrics.json has SHA-256 ")
    (folder / "metrics.json").unlink()
    assert damage_of_adapter(folder) == "metrics.json is missing"
    (folder / "manifest.json").unlink()
    assert str(damage_of_adapter(folder)).startswith(f"{folder / 'manifest.json'}: is missing")


@pytest.mark.parametrize("save_dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_written_in_the_type_that_is_asked_for(
    tiny_model: LoadModel, tmp_path: Path, save_dtype: torch.dtype
) -> None:
    trained, model = adapted(tiny_model), tiny_model()
    write_folder(tmp_path / "final", adapter_files(trained, ADAPTER, BaseModel("tiny"), "safetensors", save_dtype), {})
    tensors = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {save_dtype}
    load_adapter(model, tmp_path / "final")
    assert is_equal(model, trained) == (save_dtype == torch.float32)
    for loaded, written in zip(lora_parameters(model), lora_parameters(trained), strict=True):
        assert torch.equal(loaded, written.to(save_dtype).float())


def test_modules_to_save_are_refused_with_the_reason(folder: Path) -> None:
    change_config(folder, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"modules_to_save is \['lm_head'\], .*; train without it, or merge"):
        read_adapter_config(folder)


def test_an_adapter_that_cannot_be_loaded_leaves_the_one_before_it_active(
    folder: Path, tiny_model: LoadModel, tmp_path: Path
) -> None:
    model = tiny_model()
    load_adapter(model, folder, name="first")
    before = [parameter.detach().clone() for parameter in lora_parameters(model)]
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="missing from the file"):
        load_adapter(model, folder, name="second")
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(model), strict=True))
    with pytest.raises(ValueError, match=r"expected one of \['first'\]"):
        set_adapter(model, "second")

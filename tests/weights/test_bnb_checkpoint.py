"""4-bit checkpoints: written, read, and refused in words where something is wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.nf4 import Linear4bit
from minilora.system.files import StorageError
from minilora.system.manifest import read_manifest, verify_folder
from minilora.weights import safetensors_io
from minilora.weights.bnb_checkpoint import is_quantized, write_quantized
from minilora.weights.hf_config import read_config
from minilora.weights.load import LoadSettings, load_model, open_weights

NAME = "model.layers.1.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture
def quantized(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    source, folder = tiny_checkpoint(), tmp_path / "quantized"
    write_quantized(load_model(source, torch.bfloat16), source, folder, {})
    return folder


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_a_written_checkpoint_is_read_as_it_was(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, quant_type: str, double: bool, tie: bool
) -> None:
    source = tiny_checkpoint(tie=tie, sharded=True)
    model = load_model(source, torch.bfloat16, quant_type, double)
    write_quantized(model, source, tmp_path / "q", {})
    found, expected = load_model(tmp_path / "q", torch.bfloat16, quant_type, double).state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == quant_type
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is double


def test_a_weight_in_4_bits_is_read_as_the_model_computes_with_it(quantized: Path) -> None:
    """As merging into the dequantised base reads it."""
    with torch.device("meta"):
        shapes = Qwen2ForCausalLM(read_config(quantized))
    read = open_weights(shapes, quantized, LoadSettings(torch.bfloat16)).read(NAME)
    layer = load_model(quantized, torch.bfloat16).get_submodule(NAME.removesuffix(".weight"))
    assert isinstance(layer, Linear4bit)
    assert torch.equal(read, layer.dense_weight(torch.bfloat16))


def test_a_projection_that_is_held_in_full_stays_in_full(quantized: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    tensors = load_file(quantized / "model.safetensors")
    dense = load_file(tiny_checkpoint() / "model.safetensors")[NAME].bfloat16()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(NAME)}
    save_file({**kept, NAME: dense}, quantized / "model.safetensors")
    layer = load_model(quantized, torch.bfloat16).get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, torch.nn.Linear)
    assert torch.equal(layer.weight, dense)


def test_a_projection_in_full_is_named_in_what_is_written(
    quantized: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would take its tensor for 4 bits otherwise."""
    model = load_model(tiny_checkpoint(), torch.bfloat16)
    dense = load_model(tiny_checkpoint(), torch.bfloat16, "none").model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = dense
    write_quantized(model, tiny_checkpoint(), tmp_path / "mixed", {})
    how = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "mixed", quantized)]
    assert [h["llm_int8_skip_modules"] for h in how] == [["lm_head", "model.layers.0.self_attn.q_proj"], None]


@pytest.mark.parametrize(("key", "other"), [("torch_dtype", "dtype"), ("dtype", "torch_dtype")])
def test_the_type_that_config_json_names_is_that_of_the_tensors(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, key: str, other: str
) -> None:
    source = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    del config["torch_dtype"]
    (source / "config.json").write_text(json.dumps({**config, key: "float32"}))
    write_quantized(load_model(source, torch.bfloat16), source, tmp_path / "q", {})
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written[key] == "bfloat16"
    assert other not in written


def test_an_embedding_in_4_bits_is_refused(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    of_weight = {
        name.replace(NAME, "model.embed_tokens.weight"): tensors.pop(name) for name in [*tensors] if NAME in name
    }
    save_file({**tensors, **of_weight}, quantized / "model.safetensors")
    with pytest.raises(UserError, match=r"embed_tokens.weight: is in 4 bits, which only projections and"):
        load_model(quantized, torch.bfloat16)


def test_a_checkpoint_says_whether_it_is_in_4_bits(quantized: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    assert is_quantized(quantized)
    assert not is_quantized(tiny_checkpoint())


def test_a_written_folder_is_whole_and_has_a_manifest(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, target = tiny_checkpoint(), tmp_path / "new" / "q"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".writing-q").mkdir()  # left by one that was killed
    write_quantized(load_model(source, torch.bfloat16), source, target, {"quant_type": "nf4"})
    assert verify_folder(target) is None
    assert read_manifest(target)["facts"] == {"quant_type": "nf4"}
    assert [path.name for path in target.parent.iterdir()] == ["q"]
    # safetensors writes for its owner only; the folder is to be shared like any other.
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_nothing_and_what_stood_there(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    source, target = tiny_checkpoint(), tmp_path / "q"
    target.mkdir()

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(safetensors_io, "save_file", full)
    with pytest.raises(StorageError, match=r"q.*: cannot be written .*No space left on device"):
        write_quantized(load_model(source, torch.bfloat16), source, target, {})
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("none", True), "model.quantization=nf4 model.double_quantization=true"),
        (("fp4", True), "is quantised already; set model.quantization=nf4 model.double_quantization=true"),
        (("nf4", False), "model.double_quantization=true"),
    ],
)
def test_another_quantisation_than_the_files_is_refused(quantized: Path, asked: tuple[str, bool], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(quantized, torch.bfloat16, *asked)


def changed_state(quantized: Path, **changes: object) -> None:
    tensors = load_file(quantized / "model.safetensors")
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, quantized / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocksize": 128}, "blocksize is 128, expected 64"),
        ({"nested_blocksize": 64}, "nested_blocksize is 64, expected 256"),
        ({"quant_type": "fp4"}, "quant_type is 'fp4', expected 'nf4'"),
        ({"nested_offset": "x"}, "nested_offset is 'x', expected a finite number"),
        ({"nested_offset": None}, "absmax is .* expected"),
        ({"nested_offset": float("nan")}, "NaN is not JSON"),
        ({"shape": [128, 32]}, "packed is .* expected"),
        ({"shape": [64, 128]}, r"file has \(64, 128\) in 4 bits, expected \(128, 64\)"),
        ({"shape": "128x64"}, r"shape is '128x64', expected \[out, in\]"),
        ({"shape": [128, -64]}, r"expected \[out, in\]"),
        ({"shape": [True, 64]}, r"expected \[out, in\]"),
    ],
)
def test_a_weight_that_cannot_be_used_is_named(quantized: Path, changes: dict[str, object], message: str) -> None:
    changed_state(quantized, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(quantized, torch.bfloat16)
    assert "up_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        (NAME, None, "packed is None, expected"),
        (f"{NAME}.absmax", None, "absmax is None, expected"),
        (f"{NAME}.nested_quant_map", torch.zeros(16), "nested_quant_map is .*16.* expected .*256"),
        (f"{NAME}.quant_map", torch.linspace(-1, 1, 16), "other levels than nf4"),
        (STATE, torch.tensor([1, 2, 3], dtype=torch.uint8), "cannot be used"),
        (STATE, torch.tensor(list(b"[]"), dtype=torch.uint8), "holds a list"),
        (STATE, torch.tensor(1.0), "cannot be used"),
        (f"{NAME}.extra", torch.zeros(1), "unknown to the model"),
    ],
)
def test_a_missing_or_wrong_part_is_named(
    quantized: Path, part: str, replacement: torch.Tensor | None, message: str
) -> None:
    tensors = load_file(quantized / "model.safetensors")
    tensors.pop(part, None)
    if replacement is not None:
        tensors[part] = replacement
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(quantized, torch.bfloat16)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, only bitsandbytes in 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"group_size": 64, "bits": 4}, "quantised by MLX"),
        ("awq", "quantised by awq"),
        ("bitsandbytes", "only bitsandbytes in 4 bits is read"),
    ],
)
def test_other_compressed_formats_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, found: object, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    with pytest.raises(UserError, match=message):
        load_model(folder, torch.float32)

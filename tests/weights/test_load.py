"""The loader is strict both ways, reads either layout, and quantises what it should."""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.qlora.nf4 import Linear4bit
from minilora.system.files import read_json
from minilora.weights import load as load_module
from minilora.weights import safetensors_io
from minilora.weights.bnb_checkpoint import QuantizedEntry
from minilora.weights.load import load_model, read_config
from minilora.weights.safetensors_io import read_checkpoint_entries, read_header, read_tensor

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def random_weights(tied: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (64,)
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, 64)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (64, 64)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (128, 64)
        shapes[f"{layer}mlp.down_proj.weight"] = (64, 128)
    if not tied:
        shapes["lm_head.weight"] = (40, 64)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def _write(weights: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}), "utf-8")
        save_file(random_weights() if weights is None else weights, tmp_path / "model.safetensors")
        return tmp_path

    return _write


def test_every_tensor_arrives_unchanged(write: Callable[..., Path]) -> None:
    folder = write()
    model = load_model(folder, torch.bfloat16, "none")
    loaded = dict(model.named_parameters())
    expected = load_file(folder / "model.safetensors")
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in loaded.values())


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_projections_and_nothing_else_are_quantised(write: Callable[..., Path], quantization: str) -> None:
    weights = random_weights(tied=False)
    model = load_model(write(weights, tie_word_embeddings=False), torch.bfloat16, quantization)
    quantised = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantised) == 14
    assert all(name.endswith("_proj") for name in quantised)
    dense = dict(model.named_parameters())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(dense)
    q_proj = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(q_proj.bias, weights["model.layers.0.self_attn.q_proj.bias"])


def test_shards_are_read_through_their_index(write: Callable[..., Path]) -> None:
    folder = write()
    whole = load_model(folder, torch.float32, "none")
    weights = random_weights()
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    sharded = load_model(folder, torch.float32, "none")
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    weight_map["model.extra.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(UserError, match=r"index\.json: disagrees with .+ model\.extra\.weight; the files are from"):
        read_checkpoint_entries(folder)
    weight_map["model.extra.weight"] = "../other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(UserError, match=r"names '\.\./other\.safetensors', which is not a file of this folder"):
        read_checkpoint_entries(folder)


def test_head_of_a_tied_model_may_be_there(write: Callable[..., Path]) -> None:
    weights = random_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load_model(write(weights), torch.float32, "none")
    assert model.head_weight is model.model.embed_tokens.weight


def test_all_mismatches_are_in_one_message(write: Callable[..., Path]) -> None:
    weights = random_weights()
    del weights["model.norm.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 128)
    with pytest.raises(UserError) as error:
        load_model(write(weights), torch.float32, "none")
    message = str(error.value)
    assert message.startswith(f"{write(weights)}: weights and config.json are from different models or incomplete; ")
    assert "model.norm.weight: missing from the file, config.json asks (64,)" in message
    assert "model.layers.2.mlp.up_proj.weight: in the file, unknown" in message
    assert "model.layers.1.mlp.up_proj.weight: file has (64, 128), config.json asks (128, 64)" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama', expected 'qwen2'"),
        ({"use_sliding_window": True}, r"use_sliding_window is True, only False is supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope scaling is 'yarn'"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types is .*'sliding_attention'\], only a list of",
        ),
        ({"layer_types": 5}, r"layer_types is 5, only a list of 'full_attention' is supported; use another model"),
        ({"rope_scaling": "x"}, r"rope scaling is 'x', expected an object; download it again"),
        ({"rope_theta": "1e6"}, r"rope_theta is '1e6', expected a number; download config\.json"),
        ({"rope_theta": 0}, r"rope_theta is 0, expected more than 0"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps is '1e-6', expected a number"),
        ({"hidden_size": "64"}, r"hidden_size is '64', expected a whole number"),
        ({"hidden_size": 1_000_001}, r"hidden_size is 1000001, expected 1000000 or less"),
        ({"vocab_size": 10**9}, r"vocab_size is 1000000000, expected 10000000 or less"),
        ({"intermediate_size": 10**9}, r"intermediate_size is 1000000000, expected 3000000 or less"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, expected 8000 or less"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0, expected 1 or more"),
        ({"num_key_value_heads": -1}, r"num_key_value_heads is -1, expected 1 or more"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads is 0, expected 1 or more"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True, expected a whole number"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', expected true or false"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"rms_norm_eps": None}, r"has no rms_norm_eps"),
        ({"num_key_value_heads": 3}, r"4 query heads cannot share 3 key/value heads"),
        ({"hidden_size": 66}, r"hidden_size 66 does not divide into 4 heads"),
    ],
)
def test_what_is_not_supported_is_said(write: Callable[..., Path], changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(write(**changes))


def test_a_whole_number_may_be_written_with_a_point(write: Callable[..., Path]) -> None:
    layers = read_config(write(num_hidden_layers=2.0)).num_hidden_layers
    assert (layers, type(layers)) == (2, int)


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType")])
def test_a_config_that_is_no_object_is_refused(content: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf"config\.json: holds a {kind}, expected an object; download it again"):
        read_config(tmp_path)


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000, "utf-8")
    with pytest.raises(UserError, match=r"config\.json: is not JSON \(.*recursion"):
        read_config(tmp_path)


def test_both_dialects_of_config_are_read(write: Callable[..., Path]) -> None:
    classic = read_config(write())
    folder = write(
        rope_theta=None,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        layer_types=["full_attention", "full_attention"],
        dtype="bfloat16",
    )
    content = json.loads((folder / "config.json").read_text("utf-8"))
    del content["rope_theta"]
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    assert read_config(folder) == classic


def test_own_reader_equals_the_library(write: Callable[..., Path]) -> None:
    path = write() / "model.safetensors"
    expected = load_file(path)
    entries = read_header(path)
    assert set(entries) == set(expected)
    assert all(torch.equal(read_tensor(entry), expected[name]) for name, entry in entries.items())


def test_a_file_that_is_cut_off_is_refused_at_every_length(write: Callable[..., Path]) -> None:
    path = write({"a": torch.arange(4.0), "b": torch.ones(2)}) / "model.safetensors"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: is not a complete safetensors file \(.+\); download"):
            read_header(path)


def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UserError, match="header of 4611686018427387904 bytes in a file of 10"):
        read_header(path)


@pytest.mark.parametrize(("size", "longest"), [(10, 2), (100, 92), (1100, 1000), (32_064, 1002), (99_999, 2000)])
def test_a_header_is_as_long_as_its_file_allows(
    size: int, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "SHORT_HEADER_BYTES", 1000)
    monkeypatch.setattr(safetensors_io, "MAX_HEADER_BYTES", 2000)
    path = tmp_path / "model.safetensors"
    found = []
    for length in (longest, longest + 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}".ljust(size - 8))
        try:
            read_header(path)
            found.append("read")
        except UserError as error:
            found.append("too long" if f"header of {length} bytes in a file of {size}" in str(error) else "read")
    assert found == ["read", "too long"]


def write_header(path: Path, header: bytes, data: bytes = b"data") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(**changes: object) -> dict[str, object]:
    """One float32 number that takes all of `write_header`'s data."""
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def test_a_header_may_have_spaces_around_it_metadata_and_empty_tensors(tmp_path: Path) -> None:
    content = {
        "__metadata__": {"format": "pt", "": ""},
        "b": entry(),
        "a": entry(shape=[2, 0], data_offsets=[0, 0]),
        "c": entry(shape=[0], data_offsets=[4, 4]),
    }
    path = write_header(tmp_path / "model.safetensors", b" \n" + json.dumps(content).encode() + b"   ")
    entries = read_header(path)
    assert {name: tuple(found.shape) for name, found in entries.items()} == {"a": (2, 0), "b": (1,), "c": (0,)}
    assert read_tensor(entries["b"]).numpy().tobytes() == b"data"
    assert read_tensor(entries["a"]).shape == (2, 0)
    path = write_header(tmp_path / "model.safetensors", json.dumps({"a": entry(shape=[])}).encode())
    assert read_tensor(read_header(path)["a"]).shape == ()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1, 2]", r"header: holds a list"),
        (b"[" * 100_000, r".*recursion"),
        (b"\xff\xfe", r".*utf-8"),
        (b'{"a"', r"Expecting ':'.*"),
        (b"{}", r"its tensors end at byte 10, the file at 14"),
        (b'{"__metadata__": 3}', r"header: __metadata__ is not a table of texts"),
        (b'{"__metadata__": {"a": 3}}', r"header: __metadata__ is not a table of texts"),
        (b'{"__metadata__": {"a": "\\ud83d"}}', r".*surrogates not allowed"),
        (b'{"\\ud83d": null}', r".*surrogates not allowed"),
        (b'{"a": 1, "a": 2}', r"'a' occurs twice"),
        (b'{"a": NaN}', r"NaN is no JSON"),
        (b'{"a": null}', r"tensor a is described by other things than dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32"}}', r"tensor a is described by other things than dtype, shape and data_offsets"),
        ({"a": entry(device="cpu")}, r"tensor a is described by other things than dtype, shape and data_offsets"),
        ({"": entry()}, r"tensor '' has no name to print"),
        ({"a\n": entry()}, r"tensor 'a\\n' has no name to print"),
        ({"a": entry(dtype="F8_E4M3")}, r"tensor a has dtype 'F8_E4M3', expected one of F64, F32, .*, BOOL"),
        ({"a": entry(dtype=["F32"])}, r"tensor a has dtype \['F32'\], expected one of"),
        ({"a": entry(shape=1)}, r"tensor a has no shape or no two offsets"),
        ({"a": entry(data_offsets=None)}, r"tensor a has no shape or no two offsets"),
        ({"a": entry(data_offsets=[0])}, r"tensor a has no shape or no two offsets"),
        ({"a": entry(data_offsets=["0", "4"])}, r"tensor a has a number that is no size: shape \[1\], data_offsets"),
        ({"a": entry(shape=[1e30])}, r"tensor a has a number that is no size: shape \[1e\+30\]"),
        ({"a": entry(shape=[1.0])}, r"tensor a has a number that is no size: shape \[1\.0\]"),
        ({"a": entry(shape=[True])}, r"tensor a has a number that is no size: shape \[True\]"),
        ({"a": entry(shape=[-1])}, r"tensor a has a number that is no size: shape \[-1\]"),
        ({"a": entry(shape=[10**30])}, r"tensor a has a number that is no size: shape \[1000"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}', r"tensor a has a number that is no size"),
        ({"a": entry(shape=[2**40, 2**40])}, r"tensor a has the shape \[.+\], which no file can hold"),
        ({"a": entry(shape=[2**40, 2**40, 0])}, r"tensor a has the shape \[.+\], which no file can hold"),
        ({"a": entry(shape=[2])}, r"tensor a stands at bytes 0 to 4, its shape \(2,\) takes 8"),
        ({"a": entry(data_offsets=[4, 0])}, r"tensor a stands at bytes 4 to 0, its shape \(1,\) takes 4"),
        ({"a": entry(data_offsets=[1, 5])}, r"tensor a begins at byte 1 of the data, the one before ends at 0"),
        ({"a": entry(), "b": entry()}, r"tensor [ab] begins at byte 0 of the data, the one before ends at 4"),
        ({"a": entry(), "b": entry(data_offsets=[4, 8])}, r"its tensors end at byte \d+, the file at \d+"),
    ],
)
def test_a_header_that_is_no_table_of_tensors_is_refused(
    header: bytes | dict[str, object], message: str, tmp_path: Path
) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_header(tmp_path / "model.safetensors", content)
    with pytest.raises(
        UserError, match=rf"model\.safetensors: is not a complete safetensors file \({message}.*\); download or copy it"
    ):
        read_header(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot be read \(.+\); check the path"):
        read_header(tmp_path / "absent")


def test_a_file_that_became_shorter_or_went_is_named(write: Callable[..., Path]) -> None:
    path = write({"a": torch.arange(4.0)}) / "model.safetensors"
    found = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: ends within a tensor; download or copy it again"):
        read_tensor(found)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(.+\); check the disk"):
        read_tensor(found)


@pytest.mark.parametrize("data", [b"\0\1\1\0", b"\0\1\2\0"])
def test_a_truth_value_is_0_or_1(data: bytes, tmp_path: Path) -> None:
    header = json.dumps({"a": entry(dtype="BOOL", shape=[4])}).encode()
    found = read_header(write_header(tmp_path / "model.safetensors", header, data))["a"]
    if max(data) == 1:
        assert read_tensor(found).tolist() == [False, True, True, False]
    else:
        with pytest.raises(UserError, match=r"holds a truth value that is neither 0 nor 1; download or copy it again"):
            read_tensor(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "'c' occurs twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ('{"a"', "Expecting .*"),
        (b"\xff", ".*utf-8.*"),
    ],
)
def test_json_is_read_without_pythons_liberties(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"config\.json: is not JSON \({message}.*\); write or download it again"):
        read_json(path)


def test_json_without_mistakes_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, -2, 1.5, "好", null], "b": {"a": true}}', "utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, -2, 1.5, "好", None], "b": {"a": True}}


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: names model-1\.safetensors, which is missing; download or copy"):
        read_checkpoint_entries(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(UserError, match=r"2\.safetensors: holds a, which another shard holds too; download them again"):
        read_checkpoint_entries(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_that_are_no_numbers_are_refused(
    write: Callable[..., Path], quantization: str, name: str, value: float
) -> None:
    weights = random_weights()
    weights[name].view(-1)[-1] = value
    with pytest.raises(
        UserError,
        match=rf"model\.safetensors: {name} holds NaN or infinite values; download it again or choose another",
    ):
        load_model(write(weights), torch.float32, quantization)


@pytest.mark.parametrize(
    "content",
    ["[]", *(f'{{"weight_map": {files}}}' for files in ('["a"]', '{"a": 5, "b": "c"}', '{"a": null}'))],
)
def test_an_index_without_a_file_for_each_tensor_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"index\.json: has no weight_map with a file for each tensor; download it"):
        read_checkpoint_entries(tmp_path)


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    advice = r"give a folder with a Hugging Face checkpoint \(\.bin files are not read: they can run code\)$"
    with pytest.raises(UserError, match=rf"neither model\.safetensors nor model\.safetensors\.index\.json.+ {advice}"):
        read_checkpoint_entries(tmp_path)


def test_the_constant_of_old_files_is_left_out_and_whole_numbers_are_no_weights(write: Callable[..., Path]) -> None:
    weights = random_weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    load_model(write(weights), torch.float32, "none")
    weights["model.norm.weight"] = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(UserError, match=r"model\.norm\.weight: file has torch\.int32, expected a floating-point type"):
        load_model(write(weights), torch.float32, "none")


def test_a_checkpoint_that_is_quantised_in_several_ways_is_refused(write: Callable[..., Path]) -> None:
    nf4 = QuantizedEntry("a", "nf4", torch.Size([64, 64]), None, {})
    entries = {"a": nf4, "b": dataclasses.replace(nf4, quant_type="fp4", offset=0.5)}
    with pytest.raises(UserError, match=r"quantised in several ways \(fp4 double, nf4\); use the original checkpoint"):
        load_module._check_quantization(entries, "nf4", True, write())


def test_a_system_without_glibcs_options_loads_all_the_same(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: None) -> None:
        raise OSError

    monkeypatch.setattr(load_module.ctypes, "CDLL", fail)
    assert load_model(write(), torch.float32, "none").config.vocab_size > 0


def test_progress_is_told_tensor_by_tensor(write: Callable[..., Path]) -> None:
    told: list[tuple[int, int]] = []
    model = load_model(write(), torch.float32, "none", on_progress=lambda done, total: told.append((done, total)))
    total = len(list(model.named_parameters()))
    assert told == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_everything_that_is_not_in_4_bits_has_the_compute_dtype(write: Callable[..., Path], quantization: str) -> None:
    model = load_model(write(), torch.float32, quantization)  # the file is in bfloat16
    held = [*model.parameters(), *(m.bias for m in model.modules() if isinstance(m, Linear4bit) and m.bias is not None)]
    assert len(held) > 6
    assert {tensor.dtype for tensor in held} == {torch.float32}


def test_every_tensor_goes_to_the_device(write: Callable[..., Path]) -> None:
    model = load_model(write(), torch.float32, "none", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_of_many_mismatches_the_first_ten_are_shown_and_the_others_counted(write: Callable[..., Path]) -> None:
    weights = random_weights()
    names = [f"spare.{number:02d}" for number in range(13)]
    expected = [f"{name}: in the file, unknown to a Qwen2.5 model of this config.json" for name in names]
    for count in (10, 11, 13):
        with pytest.raises(UserError) as caught:
            load_model(write(weights | {name: torch.zeros(1) for name in names[:count]}), torch.float32, "none")
        more = [f"and {count - 10} more"] if count > 10 else []
        assert str(caught.value).split("\n  ")[1:] == expected[:10] + more


def test_compiled_products_are_bounded_unless_the_user_says_otherwise(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    load_model(write(), torch.float32, "none")
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    load_model(write(), torch.float32, "none")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


@pytest.mark.parametrize(("offset", "how"), [(None, "without"), (0.5, "with")])
def test_a_checkpoint_in_4_bits_says_how_it_wants_to_be_loaded(offset: float | None, how: str, tmp_path: Path) -> None:
    entries = {"a": QuantizedEntry("a", "nf4", torch.Size([64, 64]), offset, {})}
    with pytest.raises(UserError) as caught:
        load_module._check_quantization(entries, "fp4", True, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: is quantised already, as nf4 {how} double quantisation; set model.quantization=nf4 "
        f"model.double_quantization={str(how == 'with').lower()}, or use the original checkpoint"
    )

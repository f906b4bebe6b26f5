"""A GGUF file, read back with llama.cpp's own reader, holds the model, its tokenizer and all that llama.cpp needs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.errors import UserError
from minilora.system.files import StorageError
from minilora.weights.gguf import KINDS, check_gguf, gguf_bytes, write_gguf, write_gguf_adapter

Checkpoint = Callable[..., Path]
LAYER_NAMES = {  # llama.cpp's src/llama-arch.cpp, LLM_ARCH_QWEN2
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{LAYER_NAMES[rest]}"


@pytest.fixture
def checkpoint(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """One that a test may change, with the special tokens that a Qwen2.5-Instruct names."""
    folder = Path(shutil.copytree(tiny_checkpoint(tie=False), tmp_path / "checkpoint"))
    tokens = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": "{{ messages }}"}), "utf-8")
    return folder


def read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def read_tensors(reader: gguf.GGUFReader) -> dict[str, tuple[str, np.ndarray]]:
    """Type and float32 values by name."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            # The reader gives shapes from the last axis to the first.
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape][::-1]),
        )
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_is_there_under_llama_cpps_name(
    tiny_checkpoint: Checkpoint, tmp_path: Path, tie: bool, kind: str, dtype: torch.dtype
) -> None:
    folder = tiny_checkpoint(tie=tie, dtype=dtype, sharded=True)
    write_gguf(folder, tmp_path / "model.gguf", kind, "tiny")
    found = read_tensors(read(tmp_path / "model.gguf"))
    expected = {
        gguf_name(name): tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert found.keys() == expected.keys()
    assert ("output.weight" in found) == (not tie)
    for name, (held_as, values) in found.items():
        wanted = expected[name].float().numpy()
        assert held_as == ("F32" if wanted.ndim == 1 else kind.upper()), name
        if held_as == "Q8_0":
            # Half a step of a block's largest number over 127, and 2^-11 of the number, for the scale is a float16.
            blocks = np.abs(wanted.reshape(-1, 32)).max(axis=1).repeat(32).reshape(wanted.shape)
            assert (np.abs(values - wanted) <= blocks / 254 * 1.001 + np.abs(wanted) / 2048).all(), name
        else:
            rounded = torch.from_numpy(wanted).to(
                {"F32": torch.float32, "F16": torch.float16}.get(held_as, torch.bfloat16)
            )
            assert np.array_equal(values, rounded.float().numpy()), name


def test_the_architecture_is_described_as_config_json_has_it(checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", "q8_0", "my model")
    reader = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "my model",
        "general.size_label": "148K",  # 111,168 parameters and a head of 576 x 64
        "general.file_type": 7,  # llama.cpp's MOSTLY_Q8_0
        "general.quantization_version": 2,
        "qwen2.block_count": 2,
        "qwen2.context_length": 2048,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 128,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1000000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 502,
        "tokenizer.ggml.eot_token_id": 502,
        "tokenizer.ggml.padding_token_id": 500,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "qwen2.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6, rel=1e-7)  # a float32
    lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}
    others = {"qwen2.attention.layer_norm_rms_epsilon", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert reader.fields.keys() == expected.keys() | lists | others


@pytest.mark.parametrize(("kind", "number"), [("f32", 0), ("f16", 1), ("bf16", 32)])
def test_the_file_type_is_llama_cpps_number(checkpoint: Path, tmp_path: Path, kind: str, number: int) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", kind, "tiny")
    assert value(read(tmp_path / "model.gguf"), "general.file_type") == number


def test_tokens_and_merges_are_those_of_tokenizer_json(checkpoint: Path, tmp_path: Path) -> None:
    write_gguf(checkpoint, tmp_path / "model.gguf", "f32", "tiny")
    reader = read(tmp_path / "model.gguf")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    expected = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    expected |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 576  # the rows of the embedding, of which 504 have a token
    assert {i: token for i, token in enumerate(tokens) if i in expected} == expected
    assert tokens[504:] == [f"[PAD{i}]" for i in range(504, 576)]
    kinds = gguf.TokenType
    special = [kinds.CONTROL, kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED]  # <tool_call> is text that is one token
    assert types == [kinds.NORMAL] * 500 + special + [kinds.UNUSED] * 72
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in tokenizer["model"]["merges"]]


def test_a_token_that_looks_like_a_control_token_is_one(checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 504, "content": "<|fim_prefix|>"})
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    write_gguf(checkpoint, tmp_path / "model.gguf", "f32", "tiny")
    reader = read(tmp_path / "model.gguf")
    assert value(reader, "tokenizer.ggml.tokens")[504] == "<|fim_prefix|>"
    assert value(reader, "tokenizer.ggml.token_type")[504] == gguf.TokenType.CONTROL


def test_a_template_in_a_file_of_its_own_is_found(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers 5 writes it."""
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), "utf-8")
    (checkpoint / "chat_template.jinja").write_text("{{ mine }}", "utf-8")
    write_gguf(checkpoint, tmp_path / "model.gguf", "f32", "tiny")
    assert value(read(tmp_path / "model.gguf"), "tokenizer.chat_template") == "{{ mine }}"


def test_without_a_tokenizer_configuration_the_ids_are_those_of_config_json(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    content = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**content, "bos_token_id": 500, "eos_token_id": 502}), "utf-8")
    write_gguf(checkpoint, tmp_path / "model.gguf", "f32", "tiny")
    reader = read(tmp_path / "model.gguf")
    assert value(reader, "tokenizer.ggml.bos_token_id") == 500
    assert value(reader, "tokenizer.ggml.eos_token_id") == 502
    assert "tokenizer.chat_template" not in reader.fields


def test_rows_without_whole_blocks_are_float16(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(intermediate=48)
    write_gguf(folder, tmp_path / "model.gguf", "q8_0", "tiny")
    found = read_tensors(read(tmp_path / "model.gguf"))
    assert {found[f"blk.0.ffn_{name}.weight"][0] for name in ("gate", "up")} == {"Q8_0"}
    held_as, values = found["blk.0.ffn_down.weight"]
    expected = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].half().float()
    assert held_as == "F16"
    assert np.array_equal(values, expected.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_tensors_is_known_before(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    shapes = {name: tensor.shape for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    write_gguf(checkpoint, tmp_path / "model.gguf", kind, "tiny")
    assert gguf_bytes(shapes, kind) == sum(int(tensor.n_bytes) for tensor in read(tmp_path / "model.gguf").tensors)


def test_large_tensors_are_converted_in_pieces(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(checkpoint, tmp_path / "whole.gguf", "q8_0", "tiny")
    monkeypatch.setattr("minilora.weights.gguf.CHUNK", 7 * 64)  # 7 rows of 64, no divisor of any count of rows
    write_gguf(checkpoint, tmp_path / "pieces.gguf", "q8_0", "tiny")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_values_that_float16_cannot_hold_are_named(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][100, 3] = -7e4
    save_file(tensors, path)
    with pytest.raises(
        UserError, match=r"1\.mlp\.up_proj\.weight: has values that float16 cannot hold; write --gguf bf"
    ):
        write_gguf(checkpoint, tmp_path / "model.gguf", "f16", "tiny")
    write_gguf(checkpoint, tmp_path / "model.gguf", "bf16", "tiny")


def test_a_missing_context_length_is_named(checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**content, "max_position_embeddings": None}), "utf-8")
    message = r"config\.json: has no max_position_embeddings, llama\.cpp needs the longest text in tokens"
    with pytest.raises(UserError, match=message):
        check_gguf(checkpoint)
    with pytest.raises(UserError, match=message):
        write_gguf(checkpoint, tmp_path / "model.gguf", "f16", "tiny")


def test_a_file_that_cannot_be_written_is_a_storage_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent/model\.gguf: cannot be written \(No such file or directory\)"):
        write_gguf(checkpoint, tmp_path / "absent" / "model.gguf", "f16", "tiny")


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_an_adapters_pairs_are_named_by_the_weight_that_they_change(tmp_path: Path, kind: str) -> None:
    pairs = {
        f"model.layers.1.{name}.weight": (torch.full((2, 6), 0.1), torch.full((4, 2), 0.3))
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    }
    write_gguf_adapter(pairs, tmp_path / "adapter.gguf", kind, 16)
    reader = read(tmp_path / "adapter.gguf")
    expected = {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "general.name": "adapter",
        "general.file_type": {"f32": 0, "f16": 1}[kind],
        "adapter.type": "lora",
        "adapter.lora.alpha": 16,
    }
    assert {key: value(reader, key) for key in expected} == expected
    found = read_tensors(reader)
    names = [f"blk.1.{name}.weight.lora_{letter}" for name in ("attn_q", "attn_output", "ffn_down") for letter in "ab"]
    assert list(found) == names
    for name, (held_as, values) in found.items():
        assert held_as == kind.upper()
        assert values.shape == ((2, 6) if name.endswith("a") else (4, 2))
        assert values == pytest.approx(0.1 if name.endswith("a") else 0.3, rel=1e-3)


def test_an_adapters_values_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    pairs = {"model.layers.0.self_attn.q_proj.weight": (torch.ones(2, 6), torch.full((4, 2), 1e6))}
    with pytest.raises(
        UserError, match=r"q_proj\.weight: has values that float16 cannot hold; write .* --gguf_adapter f32"
    ):
        write_gguf_adapter(pairs, tmp_path / "adapter.gguf", "f16", 16)

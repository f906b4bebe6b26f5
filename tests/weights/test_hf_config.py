"""config.json is read in both dialects; what the model does not compute is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from minilora.errors import UserError
from minilora.weights.hf_config import licence_metadata, name_end_of_turn, parse_config, read_config

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama', only 'qwen2' "),
        ({"use_sliding_window": True}, r"use_sliding_window is True.* False "),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'.* 'silu' "),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope scaling is 'yarn'.* 'default' "),
        ({"rope_scaling": "x"}, r"rope scaling is 'x', expected an object"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types is .*'sliding_attention'\].*'full_att",
        ),
        ({"layer_types": 5}, r"layer_types is 5.*'full_attention'"),
        ({"rope_theta": "1e6"}, r"rope_theta is '1e6', expected a number; download config\.json"),
        ({"rope_theta": 0}, r"rope_theta is 0.*more than 0"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps is '1e-6', expected a number"),
        ({"rms_norm_eps": None}, r"has no rms_norm_eps"),
        ({"hidden_size": "64"}, r"hidden_size is '64', expected a whole number"),
        ({"hidden_size": 1_000_001}, r"hidden_size is 1000001, expected 1000000 or less"),
        ({"vocab_size": 10**9}, r"vocab_size is 1000000000, expected 10000000 or less"),
        ({"intermediate_size": 10**9}, r"intermediate_size is 1000000000, expected 3000000 or less"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, expected 8000 or less"),
        ({"num_hidden_layers": True}, r"num_hidden_layers is True, expected a whole number"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0.*more than 0"),
        ({"num_key_value_heads": -1}, r"num_key_value_heads is -1.*more than 0"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads is 0.*more than 0"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings is 0.*more than 0"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', expected true or false"),
        ({"num_key_value_heads": 3}, r"4 query heads .* 3 key/value heads"),
        ({"hidden_size": 66}, r"hidden_size 66 .* 4 heads"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=rf"^here: {message}"):
        parse_config({**CONFIG, **changes}, "here")


def test_all_sizes_out_of_range_are_in_one_message() -> None:
    with pytest.raises(UserError, match=r"vocab_size is 0.*num_hidden_layers is 9000"):
        parse_config({**CONFIG, "vocab_size": 0, "num_hidden_layers": 9000})


def test_a_whole_number_may_be_written_with_a_point() -> None:
    layers = parse_config({**CONFIG, "num_hidden_layers": 2.0}).num_hidden_layers
    assert (layers, type(layers)) == (2, int)


def test_both_dialects_are_read() -> None:
    newer = {key: value for key, value in CONFIG.items() if key != "rope_theta"} | {
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "layer_types": ["full_attention", "full_attention"],
        "dtype": "bfloat16",
    }
    assert parse_config(newer) == parse_config(CONFIG)


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("null", "NoneType")])
def test_a_config_that_is_no_object_is_refused(content: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=rf"config\.json: holds a {kind}, expected an object"):
        read_config(tmp_path)


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000, "utf-8")
    with pytest.raises(UserError, match=r"config\.json: is not JSON \(.*recursion"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "'c'"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('{"a"', "Expecting"),
        (b"\xff", ".*utf-8"),
    ],
)
def test_json_is_read_without_pythons_extensions(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"config\.json: is not JSON \({message}.*\); .*download it"):
        read_config(tmp_path)


def test_the_file_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {**CONFIG, "architectures": ["Qwen2ForCausalLM"], "note": "好"}
    (tmp_path / "config.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    assert read_config(tmp_path) == parse_config(CONFIG)
    assert read_config(tmp_path).head_dim == 16


APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
RESEARCH = "Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date: September 19, 2024\n"
QWEN = "Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (APACHE, {"license": "apache-2.0"}),
        (RESEARCH, {"license": "other", "license_name": "qwen-research"}),
        (QWEN, {"license": "other", "license_name": "qwen"}),
        ("Mine alone.", {}),
    ],
)
def test_a_licence_is_known_by_its_text(tmp_path: Path, text: str, expected: dict[str, str]) -> None:
    assert licence_metadata(tmp_path) == {}
    (tmp_path / "LICENSE").write_text(text, "utf-8")
    assert licence_metadata(tmp_path) == expected


def write_files(folder: Path, **contents: Any) -> None:
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")


def read_files(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}


def test_a_base_models_files_name_the_end_of_a_turn_too(tmp_path: Path) -> None:
    token = {"__type": "AddedToken", "content": "<|endoftext|>"}
    write_files(
        tmp_path,
        config={**CONFIG, "eos_token_id": 7},
        generation_config={"eos_token_id": 7, "temperature": 0.5},
        tokenizer_config={"eos_token": token, "pad_token": "<|endoftext|>"},
        special_tokens_map={"eos_token": "<|endoftext|>"},
    )
    name_end_of_turn(tmp_path, 9)
    named = {
        "config": {**CONFIG, "eos_token_id": 9},
        "generation_config": {"eos_token_id": [9, 7], "temperature": 0.5},
        "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    }
    assert read_files(tmp_path) == named
    name_end_of_turn(tmp_path, 9)
    assert read_files(tmp_path) == named


def test_files_that_name_it_already_stay_as_they_are(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        config={**CONFIG, "eos_token_id": [7, 9]},
        generation_config={"eos_token_id": [7, 9]},
        tokenizer_config={"eos_token": {"content": "<|im_end|>", "lstrip": False}},
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    name_end_of_turn(tmp_path, 9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_generation_config_there_is_one_with_both_ends(tmp_path: Path) -> None:
    write_files(tmp_path, config={**CONFIG, "eos_token_id": 7})
    name_end_of_turn(tmp_path, 9)
    expected = {"config": {**CONFIG, "eos_token_id": 9}, "generation_config": {"eos_token_id": [9, 7]}}
    assert read_files(tmp_path) == expected

"""config.json of a Hugging Face checkpoint -> `Qwen2Config`, or a message that says why the model cannot be used.

Also the copy of it, of the tokenizer's files and of the licence beside weights that are written.

Both dialects are read: `rope_theta` at the top, and in `rope_parameters` as transformers 5 writes it. Only
`tie_word_embeddings` (false) and `max_position_embeddings` (unknown) have a default, because Hugging Face's own files
may omit them. What `qlora/model.py` does not compute is refused here.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.data.hub import LICENCE_FILES
from minilora.errors import UserError
from minilora.qlora.model import Qwen2Config
from minilora.qlora.prompt import IM_END
from minilora.system.files import json_bytes, read_json, storage_errors, write_file
from minilora.system.schema import read_fields

# A hundred times the largest Qwen2.5: a mistyped size is named before anything of that size is allocated.
MAXIMUM = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 3_000_000,
    "num_hidden_layers": 8_000,
}
LICENCES = {  # of Qwen2.5: most sizes, 3B, 72B; with what their LICENSE begins
    "apache license version 2.0": {"license": "apache-2.0"},
    "qwen research license": {"license": "other", "license_name": "qwen-research"},
    "qwen license": {"license": "other", "license_name": "qwen"},
}
ADVICE = "download config.json of the model again"
COMPANIONS = (  # what belongs to a checkpoint beside config.json and the weights
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def read_config(folder: Path) -> Qwen2Config:
    """Architecture of the checkpoint in `folder`; errors as in `parse_config`."""
    return parse_config(read_json(folder / "config.json"), str(folder / "config.json"))


def parse_config(content: Any, where: str = "config.json") -> Qwen2Config:
    """The architecture in a config.json, whose path is `where`. UserError for another one, or what the model lacks."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, expected an object; download it again")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope scaling is {rope!r}, expected an object; download it again")
    _refuse_features(content, rope, where)
    config = read_fields(Qwen2Config, {"rope_theta": rope.get("rope_theta"), **content}, where, ADVICE)
    _check_sizes(config, where)
    return config


def _refuse_features(content: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Raises UserError for another architecture, sliding windows, another activation or scaled rotary embeddings."""
    found = {
        "model_type": (content.get("model_type"), "qwen2"),
        "use_sliding_window": (content.get("use_sliding_window", False), False),
        "hidden_act": (content.get("hidden_act", "silu"), "silu"),
        "rope scaling": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (value, expected) in found.items():
        if value != expected:
            raise UserError(f"{where}: {name} is {value!r}, only {expected!r} is supported; use a dense Qwen2.5 model")
    layer_types = content.get("layer_types") or []
    if not isinstance(layer_types, list) or any(name != "full_attention" for name in layer_types):
        raise UserError(
            f"{where}: layer_types is {layer_types!r}, only a list of 'full_attention' is supported; use another model"
        )


def _check_sizes(config: Qwen2Config, where: str) -> None:
    """Raises UserError for sizes that are out of range or do not divide into heads."""
    problems = []
    for name, value in asdict(config).items():
        if isinstance(value, bool) or value is None:
            continue
        if value <= 0:
            problems.append(f"{name} is {value!r}, expected more than 0")
        elif value > MAXIMUM.get(name, value):
            problems.append(f"{name} is {value!r}, expected {MAXIMUM[name]} or less")
    if not problems:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if config.hidden_size % heads or config.head_dim % 2:
            problems.append(f"hidden_size {config.hidden_size} does not divide into {heads} heads of even size")
        if heads % kv_heads:
            problems.append(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    if problems:
        raise UserError(f"{where}: {', '.join(problems)}; {ADVICE}")


def copy_config(
    source: Path, folder: Path, dtype_name: str, quantization_config: Mapping[str, Any] | None = None
) -> None:
    """Copies config.json, with the dtype and the quantisation of the weights that are written, and what belongs to it.

    That are the COMPANIONS and the licence's files.
    """
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name
    write_file(folder / "config.json", json_bytes(config))
    with storage_errors(folder):
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    copy_licence(source, folder)


def copy_licence(source: Path, folder: Path) -> None:
    """Copies the files of a model's licence, if it has any."""
    with storage_errors(folder):
        for path in licence_files(source):
            shutil.copyfile(path, folder / path.name)


def licence_files(folder: Path) -> list[Path]:
    """LICENSE, NOTICE and their like in a model's folder."""
    return sorted(path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file())


def licence_metadata(folder: Path) -> dict[str, str]:
    """The hub's `license` of a model, with `license_name` where that is "other", by the text of its LICENSE.

    Empty where there is none, or an unknown one.
    """
    for path in licence_files(folder):
        begin = " ".join(path.read_text("utf-8", errors="replace")[:2000].split()).lower()
        for words, metadata in LICENCES.items():
            if words in begin:
                return metadata
    return {}


def name_end_of_turn(folder: Path, token_id: int) -> None:
    """Names `<|im_end|>` as an end token in the files of a written model, as Qwen2.5-Instruct does.

    A base model's files name only `<|endoftext|>`, so a model that learned to close its turn would talk on. What holds
    one end token gets this one, generation_config.json both. `token_id` is its id.
    """
    config, generation = folder / "config.json", folder / "generation_config.json"
    content = _read_object(config)
    sampling = _read_object(generation) if generation.is_file() else {}
    ends = _ids(sampling.get("eos_token_id", content.get("eos_token_id")))
    if token_id not in ends:
        write_file(generation, json_bytes({**sampling, "eos_token_id": [token_id, *ends]}))
    if token_id not in _ids(content.get("eos_token_id")):
        write_file(config, json_bytes({**content, "eos_token_id": token_id}))
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        content = _read_object(path) if path.is_file() else {}
        token = content.get("eos_token")
        if path.is_file() and (token["content"] if isinstance(token, dict) else token) != IM_END:
            write_file(path, json_bytes({**content, "eos_token": IM_END}))


def _ids(found: Any) -> list[int]:
    """`eos_token_id` of a configuration as a list."""
    return found if isinstance(found, list) else [] if found is None else [found]


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object; download it again")
    return content

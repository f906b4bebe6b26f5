"""The embedded model is what its README says, and a real Qwen2.5 in every respect but size."""

import json
import re
from pathlib import Path

import pytest
import torch

from minilora.config import load_config
from minilora.data.hub import fetch_model
from minilora.qlora.prompt import ChatTokenizer
from minilora.system.files import sha256
from minilora.weights.chat_template import default_system
from minilora.weights.load import load_model
from minilora.weights.safetensors_io import read_header

FOLDER = fetch_model("minilora/assets/tiny-qwen2.5")


def test_it_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (fetch_model("minilora/assets/tiny-qwen2.5") / "config.json").is_file()


def test_all_of_it_fits_in_5_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000


def test_it_has_the_architecture_of_a_qwen() -> None:
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert config["model_type"] == "qwen2"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    entries = read_header(FOLDER / "model.safetensors")
    assert {entry.dtype for entry in entries.values()} == {torch.bfloat16}
    assert "model.layers.0.self_attn.q_proj.bias" in entries
    assert "lm_head.weight" not in entries
    model = load_model(FOLDER, torch.float32, "none")
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(e.shape.numel() for e in entries.values())
    # bitsandbytes' AVX512 kernel wants whole blocks of 64 in a row.
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0


def test_its_tokenizer_round_trips_and_has_one_token_a_label() -> None:
    tokenizer = ChatTokenizer(FOLDER)
    text = "房间很大，服务也不错！very good 123 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("正面")) == len(tokenizer.encode("负面")) == 1
    assert tokenizer.decode([tokenizer.im_start, tokenizer.im_end]) == "<|im_start|><|im_end|>"


def test_its_readme_states_the_command_and_the_weights() -> None:
    text = (FOLDER / "README.md").read_text("utf-8")
    assert "python scripts/pretrain_tiny.py" in text
    assert re.search(r"[0-9a-f]{64}", text)[0] == sha256(FOLDER / "model.safetensors")  # type: ignore[index]


def test_its_template_puts_the_system_turn_it_was_trained_with_which_is_the_quickstarts() -> None:
    quickstart = Path(__file__).parents[1] / "scripts" / "configs" / "quickstart.yaml"
    assert default_system(FOLDER) == load_config(quickstart).prompt.system

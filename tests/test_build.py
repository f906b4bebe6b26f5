"""What a configuration names is built as it says: a label is its class, tokenizer and model belong together."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora.build import build_examples, build_prompt, choose_dtype, note_other_system, read_split
from minilora.config import Config, load_config
from minilora.data.records import Record
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer
from tests.conftest import copy_with_system


def test_an_example_answers_with_the_word_of_its_label(tiny_checkpoint: Callable[..., Path]) -> None:
    prompt = build_prompt(load_config(), ChatTokenizer(tiny_checkpoint()))
    for example in build_examples([Record("a.tsv:2", "好", "正面"), Record("a.tsv:3", "好", 1)], prompt).examples:
        assert example.label == 1
        assert prompt.tokenizer.decode(example.input_ids[example.answer_start :]) == "正面<|im_end|>"


@pytest.mark.parametrize(("sample", "labels"), [("stratified", [1, 1, 1, 0]), ("first", [1, 1, 1, 1])])
def test_a_limit_takes_of_a_sorted_file_the_share_of_each_label_or_else_the_first(
    sample: str, labels: list[int], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"评论{number}", "label": int(number < 30)}) for number in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    keys = [f"data.dir={tmp_path}", "data.max_train_examples=4", f"data.sample={sample}"]
    config = load_config(None, keys)
    split = read_split(config, build_prompt(config, ChatTokenizer(tiny_checkpoint())), "train")
    assert list(split.labels) == labels


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))
    ids = ChatTokenizer(folder).vocab_size
    content = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "vocab_size": ids}), "utf-8")
    build_prompt(load_config(), ChatTokenizer(folder))  # as many are enough
    (folder / "config.json").write_text(json.dumps({**content, "vocab_size": ids - 1}), "utf-8")
    with pytest.raises(UserError, match=rf"model: .*{ids} ids.* vocab_size {ids - 1}"):
        build_prompt(load_config(), ChatTokenizer(folder))


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "expected"),
    [
        ((8, 6), True, torch.bfloat16),  # RTX 30
        ((7, 5), False, torch.float16),  # T4, RTX 20
        ((7, 0), False, torch.float16),  # V100
        ((6, 1), False, torch.float32),  # GTX 10, whose float16 is slower than its float32
    ],
)
def test_auto_is_what_the_gpu_multiplies_fast(
    capability: tuple[int, int], has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(Config(), torch.device("cuda")) == expected


@pytest.mark.parametrize(("max_length", "is_said"), [(2048, False), (2049, True)])
def test_a_length_beyond_the_models_positions_is_said(
    max_length: int, is_said: bool, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"data.max_length={max_length}"])
    build_prompt(config, ChatTokenizer(tiny_checkpoint()))
    said = capsys.readouterr().err
    assert ("data.max_length: 2049" in said and "2048 (max_position_embeddings)" in said) == is_said


def test_the_models_own_system_turn_is_taken_where_it_is_asked_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_config(None, ["prompt.system=model"])
    folder = copy_with_system(tiny_checkpoint(), tmp_path / "math", "Please reason step by step.")
    prompt = build_prompt(config, ChatTokenizer(folder))
    assert prompt.tokenizer.decode(prompt.prefix).startswith(
        "<|im_start|>system\nPlease reason step by step.<|im_end|>"
    )
    with pytest.raises(UserError, match=r"prompt\.system: model, but .+ has no chat template .*; give the text"):
        build_prompt(config, ChatTokenizer(tiny_checkpoint()))


def test_a_system_turn_other_than_the_models_own_is_noted(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_with_system(tiny_checkpoint(), tmp_path / "math", "Please reason step by step.")
    for model, keys in ((tiny_checkpoint(), []), (folder, ["prompt.system=model"])):
        note_other_system(build_prompt(load_config(None, keys), ChatTokenizer(model)))
        assert not capsys.readouterr().err
    note_other_system(build_prompt(load_config(), ChatTokenizer(folder)))
    assert re.match(
        "note: .*'You are Qwen,.*'Please reason step by step.'; prompt.system=model takes that\n",
        capsys.readouterr().err,
    )

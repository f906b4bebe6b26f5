"""What a configuration names is built as it says: a label is its class, tokenizer and model belong together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minilora.build import build_examples, build_prompt, choose_dtype
from minilora.config import Config, load_config
from minilora.data.records import Record, as_label
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt


def prompt_with(tokenizer: ChatTokenizer, *labels: str) -> ClassificationPrompt:
    return ClassificationPrompt(tokenizer, "s", "评论：", labels, 128)


@pytest.mark.parametrize(
    ("labels", "found", "index"),
    [
        (("负面", "正面"), "正面", 1),
        (("负面", "正面"), 1, 1),
        (("负面", "正面"), "0", 0),
        (("1", "0"), "0", 1),
        (("1", "0"), 1, 0),
        (("1", "2", "3", "4", "5"), "5", 4),
        (("1", "2", "3", "4", "5"), 1, 0),
        (("01", "02"), "02", 1),
        (("-1", "1"), -1, 0),
    ],
)
def test_a_label_is_its_word_and_else_an_index(
    chat_tokenizer: ChatTokenizer, labels: tuple[str, ...], found: str | int, index: int
) -> None:
    prompt = prompt_with(chat_tokenizer, *labels)
    (example,) = build_examples([Record("a.tsv:2", "好", as_label(found))], prompt).examples
    assert example.label == index
    answer = example.input_ids[example.answer_start :]
    assert chat_tokenizer.decode(answer) == f"{labels[index]}<|im_end|>"


@pytest.mark.parametrize(
    ("labels", "found", "message"),
    [
        (("负面", "正面"), "postive", r"label 'postive' .*\['负面', '正面'\] nor an index 0 to 1;.*prompt\.labels"),
        (("负面", "正面"), 2, r"label 2 .*\['负面', '正面'\] nor an index 0 to 1;.*prompt\.labels"),
        (("1", "2", "3"), 0, r"label 0 .*\['1', '2', '3'\];.*prompt\.labels"),
    ],
)
def test_a_label_that_is_neither_word_nor_index_is_refused(
    chat_tokenizer: ChatTokenizer, labels: tuple[str, ...], found: str | int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.tsv:2: {message}"):
        build_examples([Record("a.tsv:2", "好", found)], prompt_with(chat_tokenizer, *labels))


def test_a_file_of_other_labels_is_answered_with_the_key_that_takes_them(chat_tokenizer: ChatTokenizer) -> None:
    records = [Record(f"a.csv:{line}", "好", label) for line, label in enumerate((5, 1, 10, "无", 5), start=2)]
    words = r"\[\"1\", \"5\", \"10\", \"无\"\]"
    with pytest.raises(UserError, match=rf"a\.csv:2: label 5 .*; all labels there: prompt\.labels='{words}'$"):
        build_examples(records, prompt_with(chat_tokenizer, "负面", "正面"))
    many = [Record("a.csv:2", "好", f"word {number}") for number in range(21)]
    with pytest.raises(UserError, match=r"prompt\.labels$"):
        build_examples(many, prompt_with(chat_tokenizer, "负面", "正面"))


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

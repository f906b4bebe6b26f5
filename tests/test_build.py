"""What a configuration names is built as it says: a label is its class, tokenizer and model belong together."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minilora import build
from minilora.build import (
    build_prompt,
    choose_device,
    choose_dtype,
    note_other_system,
    read_split,
    read_splits,
    says_indices,
)
from minilora.config import Config, load_config
from minilora.data.encode import Encoder
from minilora.data.examples import Examples, build_examples
from minilora.data.records import Record
from minilora.data.split_files import write_splits
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
    ("capability", "expected"),
    [
        ((8, 6), torch.bfloat16),  # RTX 30
        ((7, 5), torch.float16),  # T4, RTX 20
        ((7, 0), torch.float16),  # V100
        ((6, 1), torch.float32),  # GTX 10, whose float16 is slower than its float32
    ],
)
def test_auto_is_what_the_gpu_multiplies_fast(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is named, beside a GPU of another kind."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device.index else (9, 0))
    assert choose_dtype(Config(), torch.device("cuda:1")) == expected


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:2"])
def test_a_gpu_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(build, "_check_gpu", lambda device: None)
    config = load_config(None, [f"model.device={name}"])
    if name == "cuda:2":
        with pytest.raises(UserError, match=r"model\.device: 'cuda:2' .* the last GPU is cuda:1; use auto"):
            choose_device(config)
    else:
        assert str(choose_device(config)) == name.replace("auto", "cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_pytorch_has_no_kernels_for_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 with PyTorch for CUDA 13."""
    raised: list[Exception] = []

    def zeros(*_size: int, device: torch.device) -> torch.Tensor:
        raise raised[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch, "zeros", zeros)
    config = load_config(None, [f"model.device={name}"])
    raised.append(RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with"))
    with pytest.raises(
        UserError, match=r"model\.device: cuda .*\(CUDA error: no kernel .* device\).*=cpu.*sm_75, sm_80"
    ):
        choose_device(config)
    raised.append(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):  # which has a message of its own
        choose_device(config)


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


def read(data: Path, folder: Path, *keys: str) -> dict[str, Examples]:
    config = load_config(None, [f"data.dir={data}", *keys])
    return read_splits(config, build_prompt(config, ChatTokenizer(folder)))


def test_indices_are_said_where_preparation_has_not_said_them(processed_data: Path, tmp_path: Path) -> None:
    def is_said(*keys: str) -> bool:
        return says_indices(load_config(None, [f"data.dir={tmp_path}", *keys]))

    splits = {path.stem: [path.read_bytes()] for path in processed_data.glob("*.jsonl")}
    write_splits(splits, tmp_path, {})
    assert not is_said()
    assert is_said("prompt.labels=[差,好]")
    assert is_said("prompt.labels=[正面,负面]")
    (tmp_path / "validation.jsonl").unlink()
    assert not is_said()
    (tmp_path / "test.jsonl").write_text('{"text": "好", "label": 1}\n', "utf-8")
    assert is_said()  # another program has written it
    write_splits(splits, tmp_path, {})
    assert not is_said()
    (tmp_path / "data_report.json").unlink()
    assert is_said()


def test_records_and_examples_are_those_that_a_limit_takes(
    tiny_checkpoint: Callable[..., Path], processed_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(processed_data, tmp_path / "data"))
    whole, some = (
        read(data, tiny_checkpoint(), *keys)["train"]
        for keys in ([], ["data.max_train_examples=7", "data.sample=first"])
    )
    assert list(some.examples) == whole.examples[:7]
    assert list(some.records) == whole.records[:7]
    assert [record.where for record in some.records[:2]] == [f"{data / 'train.jsonl'}:{line}" for line in (1, 2)]
    assert whole.labelled
    assert whole.labels.tolist() == [record.label for record in whole.records]


@pytest.mark.parametrize(
    "key",
    [
        "prompt.system=s",
        "prompt.instruction=评论：",
        "prompt.labels=[差,好]",
        "data.max_length=100",
        "data.max_train_examples=47",
        "data.overlong=drop",
        "tokenizer",
        "data",
    ],
)
def test_tokens_are_made_once_for_data_tokenizer_and_prompt(
    key: str,
    tiny_checkpoint: Callable[..., Path],
    processed_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, folder = tmp_path / "data", tmp_path / "model"
    shutil.copytree(processed_data, data, ignore=shutil.ignore_patterns(".tokens"))
    shutil.copytree(tiny_checkpoint(), folder)
    made: list[str] = []

    def counting(self: Encoder, append: Callable[..., None]) -> dict[str, Any]:
        made.append(Path(self.path).name)
        return encode(self, append)

    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", counting)
    first = read(data, folder)
    assert made == ["train.jsonl", "validation.jsonl", "test.jsonl"]
    again = read(data, folder, "train.seed=7", "lora.r=2")
    assert list(again["train"].examples) == list(first["train"].examples)
    assert len(made) == 3
    if key == "tokenizer":
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    elif key == "data":
        (data / "train.jsonl").write_text('{"text": "好", "label": 1}\n', "utf-8")
    read(data, folder, *([key] if "=" in key else []))
    assert made[3:4] == ["train.jsonl"]


def test_overlong_conversations_of_all_splits_are_one_error(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for split, count in (("train", 30), ("validation", 2), ("test", 2)):
        lines = []
        for number in range(count):
            answer = "x1" * 90 if number % 2 else "答"
            turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    keys = ("data.max_length=64", "prompt.system=s", "prompt.instruction=i")
    with pytest.raises(UserError) as caught:
        read(tmp_path, tiny_checkpoint(), *keys)
    for found in (r"train\.jsonl: 15 of 30", r"validation\.jsonl: 1 of 2", r"test\.jsonl: 1 of 2"):
        assert re.search(found, str(caught.value))
    for overlong, num_kept in (("drop", 15), ("cut", 30)):
        for _ in range(2):  # as it is made, and from the store
            train = read(tmp_path, tiny_checkpoint(), *keys, f"data.overlong={overlong}")["train"]
            assert (len(train.examples), len(train.records), train.num_overlong) == (num_kept, num_kept, 15)
            assert train.describe().endswith(f"cut to 64 tokens, 15 overlong (data.overlong={overlong})")
            assert not train.labelled


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ('{"text": "好"}\n{"text": 3, "label": 1}\n', ["2: no label column", "3: text is 3"]),
        ('{"text": "好", "label": "中"}\n', ["2: label '中' is not one of"]),
    ],
)
def test_bad_records_of_all_splits_are_one_error(
    bad: str, expected: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "validation", "test"):
        content = '{"text": "好", "label": 1}\n' + bad * (split != "validation")
        (tmp_path / f"{split}.jsonl").write_text(content, "utf-8")
    with pytest.raises(UserError) as caught:
        read(tmp_path, tiny_checkpoint())
    for split in ("train", "test"):
        assert all(f"{split}.jsonl:{message}" in str(caught.value) for message in expected)
    assert "validation" not in str(caught.value)


def test_what_is_wrong_whatever_the_split_is_told_once(
    tiny_checkpoint: Callable[..., Path], processed_data: Path
) -> None:
    with pytest.raises(UserError, match=r"^data\.max_length: 16 tokens, but instruction and") as caught:
        read(processed_data, tiny_checkpoint(), "data.max_length=16")
    assert str(caught.value).count("data.max_length: 16 tokens") == 1

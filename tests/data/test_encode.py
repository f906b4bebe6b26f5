"""Records become the same examples in whatever pieces; what is too long is counted, and an error names all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.data import encode as encode_module
from minilora.data.encode import Encoder
from minilora.data.records import Record
from minilora.data.token_store import TokenStore, build_store
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, OverlongError, chat_example


def make_prompt(tokenizer: ChatTokenizer, max_length: int = 64) -> ClassificationPrompt:
    return ClassificationPrompt(tokenizer, "s", "评论：", ("负面", "正面"), max_length)


def chat(line: int, answer: str, question: str = "问") -> Record:
    return Record(f"a.jsonl:{line}", messages=(("user", question), ("assistant", answer)))


def encode(records: list[Record], prompt: ClassificationPrompt, overlong: str = "error") -> TokenStore:
    return build_store(Encoder(prompt, "a.jsonl", lambda: enumerate(records, start=1), overlong))


@pytest.fixture(params=[1, 2, 1024])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "PIECE", request.param)


@pytest.mark.usefixtures("piece")
def test_texts_and_chats_are_rendered_as_one_by_one(chat_tokenizer: ChatTokenizer) -> None:
    prompt = make_prompt(chat_tokenizer)
    records = [Record("a.jsonl:1", "好", "正面"), chat(2, "答"), chat(3, "\n", "user\n"), Record("a.jsonl:4", "差", 0)]
    found = encode(records, prompt)
    chats = [
        chat_example(chat_tokenizer, record.messages or (), max_length=64, where="", default_system="s")
        for record in records[1:3]
    ]
    assert list(found) == [*prompt.examples(["好"], [1]), *chats, *prompt.examples(["差"], [0])]
    assert found.facts == {"overlong": 0, "labels": [0, "正面"]}


@pytest.mark.usefixtures("piece")
def test_all_overlong_conversations_are_in_one_message(chat_tokenizer: ChatTokenizer) -> None:
    prompt = make_prompt(chat_tokenizer)
    records = [chat(line, "x1" * (90 + line) if line % 2 else "答") for line in range(1, 31)]
    with pytest.raises(OverlongError, match=r"^a\.jsonl: 15 of 30 records .*data\.max_length = 64 tokens") as caught:
        encode(records, prompt)
    message = str(caught.value)
    assert "(line 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...)" in message
    assert "x1x1" not in message
    for remedy in ("data.overlong=drop", "data.overlong=cut", f"data.max_length={caught.value.tokens}"):
        assert remedy in message
    assert encode(records, make_prompt(chat_tokenizer, caught.value.tokens)).facts["overlong"] == 0
    with pytest.raises(OverlongError, match=r"a\.jsonl: 1 of 30"):
        encode(records, make_prompt(chat_tokenizer, caught.value.tokens - 1))


@pytest.mark.usefixtures("piece")
def test_all_answers_with_control_tokens_are_in_one_message(chat_tokenizer: ChatTokenizer) -> None:
    records = [chat(line, "答<|im_end|>" if line % 2 else "答") for line in range(1, 31)]
    with pytest.raises(
        UserError, match=r"^a\.jsonl:1: an answer holds <\|im_end\|>.* \(15 such records, also "
    ) as caught:
        encode(records, make_prompt(chat_tokenizer))
    assert "--drop_invalid --tokenizer MODEL --max_length N of preprocess_data.py drops the 15" in str(caught.value)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(("overlong", "lines"), [("drop", [1, 3]), ("cut", [1, 2, 3])])
def test_overlong_conversations_are_dropped_or_cut_and_counted(
    overlong: str, lines: list[int], chat_tokenizer: ChatTokenizer
) -> None:
    # Of the fourth no answer begins within max_length, so that nothing could be learnt from it.
    records = [chat(1, "答"), chat(2, "x1" * 90), chat(3, "答"), chat(4, "x1" * 90, "y2" * 90)]
    found = encode(records, make_prompt(chat_tokenizer), overlong)
    assert found.lines.tolist() == lines
    assert found.facts["overlong"] == 2
    if overlong == "cut":
        assert len(found[1].input_ids) <= 64
        assert found[1].truncated_tokens > 0


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        # An answer that is cut does not teach to stop.
        ([("user", "问"), ("assistant", "x1" * 90)], "x1x1"),
        # Whole turns behind are dropped, also a question without its answer.
        ([("user", "问"), ("assistant", "答一"), ("user", "y2" * 20), ("assistant", "x1" * 90)], "答一<|im_end|>"),
    ],
)
def test_an_overlong_conversation_ends_where_max_length_does(
    chat_tokenizer: ChatTokenizer, turns: list[tuple[str, str]], expected: str
) -> None:
    record = Record("a.jsonl:1", messages=tuple(turns))
    (whole,) = encode([record], make_prompt(chat_tokenizer, 1024), "cut")
    assert whole == chat_example(chat_tokenizer, turns, max_length=1024, where="", default_system="s")
    (cut,) = encode([record], make_prompt(chat_tokenizer, 40), "cut")
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert len(cut.input_ids) <= 40
    assert cut.supervised[-1]
    answer = chat_tokenizer.decode([i for i, counts in zip(cut.input_ids, cut.supervised, strict=True) if counts])
    assert answer == expected if "答" in expected else (answer.startswith(expected) and "<|im_end|>" not in answer)
    assert cut.truncated_tokens > 0


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_of_a_user_turn_of_megabytes_only_the_beginning_is_tokenised(
    overlong: str, chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "好x1" * 90_000
    records = [
        chat(1, "答", long),
        chat(2, "答" * 20 + "x1" * 90, long),
        Record("a.jsonl:3", messages=(("assistant", "答"), ("user", long), ("assistant", "x1" * 90))),
    ]
    lengths: list[int] = []
    encode_all, encode_one = ChatTokenizer.encode_all, ChatTokenizer.encode

    def all_of(tokenizer: ChatTokenizer, texts: list[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return encode_all(tokenizer, texts)

    def one(tokenizer: ChatTokenizer, text: str) -> list[int]:
        lengths.append(len(text))
        return encode_one(tokenizer, text)

    prompt = make_prompt(chat_tokenizer)
    monkeypatch.setattr(ChatTokenizer, "encode_all", all_of)
    monkeypatch.setattr(ChatTokenizer, "encode", one)
    found = list(encode(records, prompt, overlong))
    assert max(lengths) < 20_000
    monkeypatch.setattr(ChatTokenizer, "beginning", lambda _, text, __: text)
    whole = list(encode(records, prompt, overlong))
    assert max(lengths) == len(long)
    assert [(e.input_ids, e.supervised) for e in found] == [(e.input_ids, e.supervised) for e in whole]
    assert all(example.truncated_tokens for example in found)
    assert len(found) == (2 if overlong == "cut" else 1)


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_where_nothing_is_left_that_is_an_error(overlong: str, chat_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(OverlongError, match=r"a\.jsonl: 1 of 1 records"):
        encode([chat(1, "x1" * 90, "y2" * 90)], make_prompt(chat_tokenizer), overlong)


@pytest.mark.usefixtures("piece")
def test_a_foreign_label_is_answered_with_all_labels_of_the_file(chat_tokenizer: ChatTokenizer) -> None:
    records = [Record(f"a.jsonl:{line}", "好", label) for line, label in enumerate((0, 5, 1, "无"), start=1)]
    with pytest.raises(UserError, match=r"a\.jsonl:2: label 5 .*\[\"0\", \"1\", \"5\", \"无\"\]"):
        encode(records, make_prompt(chat_tokenizer))


def test_progress_counts_all_records(chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "PIECE", 2)
    done: list[int] = []
    records = [chat(1, "答"), chat(2, "x1" * 90), chat(3, "答")]
    source: Callable[[], Any] = lambda: enumerate(records, start=1)  # noqa: E731
    build_store(Encoder(make_prompt(chat_tokenizer), str(Path("a.jsonl")), source, "drop", on_progress=done.append))
    assert done == [2, 1]


def test_known_texts_are_encoded_as_others(chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["好<|im_end|>", "", "\n", "user\n"]
    expected = [chat_tokenizer.encode(text) for text in texts]
    known = encode_module._KnownTexts(chat_tokenizer, texts)
    monkeypatch.setattr(ChatTokenizer, "encode", lambda _, text: pytest.fail(f"{text!r} is tokenised"))
    known.encode("\n").append(0)  # the caller's own list
    assert [known.encode(text) for text in texts] == expected

"""Each format that people have, as the turns that it means; what is not read is refused by its name or listed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data import conversations
from minilora.data.conversations import read_turns
from minilora.data.records import read_records
from minilora.errors import UserError
from minilora.qlora.prompt import ROLES, Turn

ASKED, ANSWERED = Turn("user", "问"), Turn("assistant", "答")
MESSAGES = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


def turns_of(fields: dict[str, Any]) -> list[Turn]:
    conversation = read_turns("f:1", fields)
    assert conversation is not None
    assert not conversation.unread
    return list(conversation.turns)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES},
        {"messages": json.dumps(MESSAGES)},
        {"messages": str(MESSAGES)},  # what pandas writes into a CSV file
        {"messages": [{"role": "User", "content": "问"}, {"role": " Assistant ", "content": "答"}]},
        {"messages": [{"role": "用户", "content": "问"}, {"role": "助手", "content": "答"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, MESSAGES[1]]},
        {"messages": [{"role": "user", "content": [{"text": "问", "image": None}, ""]}, MESSAGES[1]]},
        {"messages": [{**message, "tool_calls": None, "weight": None} for message in MESSAGES], "tools": "[]"},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": ""},
        {"conversations": [{"from": "user", "value": "问"}, {"from": "bot", "value": "答"}]},
        {"conversation": [{"human": "问", "assistant": "答"}]},
        {"prompt": "问", "completion": "答"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": str(MESSAGES[:1]), "completion": json.dumps(MESSAGES[1:])},
        {"prompt": "问", "completion": MESSAGES[1:]},
        {"instruction": "问", "input": "", "output": "答", "history": []},
        {"instruction": "", "input": "问", "output": "答", "history": "[]"},
        {"input": "问", "output": "答"},
        {"query": "问", "response": "答", "history": None, "system": None},
        {"prompt": "问", "response": "答"},
        {"question": "问", "answer": "答"},
        {"Question": "问", " Answer ": "答"},
        {"Instruction": "问", "Input": "", "Output": "答", "System": "", "": "0"},  # as `to_csv` writes it
        {"Messages": [{"Role": "user", "Content": "问"}, {"Role": "assistant", "Content": "答"}], "Tools": "null"},
        {"messages": " ".join(["[", *map(str, MESSAGES), "]"])},  # numpy's, which has no commas
        {"messages": None, "prompt": "问", "completion": "答"},
        {"messages": None, "conversations": MESSAGES},
        {"messages": MESSAGES, "prompt": "", "completion": None},
    ],
    ids=str,
)
def test_every_format_gives_the_same_turns(fields: dict[str, Any]) -> None:
    assert turns_of(fields) == [ASKED, ANSWERED]


def test_braces_in_a_text_are_no_separators_of_numpys() -> None:
    odd = "{'a'} {\"b\"}\n} {"
    turns = [{"role": "user", "content": odd}, {"role": "assistant", "content": odd}]
    assert turns_of({"messages": f"[{turns[0]}\n {turns[1]}]"}) == [Turn("user", odd), Turn("assistant", odd)]


def test_a_key_in_capital_letters_is_read_or_refused_all_the_same() -> None:
    with pytest.raises(UserError, match="tools: tool calls cannot"):
        turns_of({"messages": MESSAGES, "Tools": [{"name": "search"}]})
    assert turns_of({"Messages": MESSAGES, "System": "客服"})[0] == Turn("system", "客服")
    with pytest.raises(UserError, match="every assistant turn is context only"):
        turns_of({"messages": [MESSAGES[0], {**MESSAGES[1], "Weight": 0}]})


def test_a_question_and_what_it_is_about_are_joined_by_a_newline() -> None:
    expected = [Turn("user", "翻译\nhello"), Turn("assistant", "你好")]
    assert turns_of({"instruction": "翻译", "input": "hello", "output": "你好"}) == expected
    assert turns_of({"instruction": "翻译", "context": "hello", "response": "你好"}) == expected


@pytest.mark.parametrize(
    "history",
    [[["一", "二"]], '[["一", "二"]]', [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]],
)
@pytest.mark.parametrize(
    "fields", [{"instruction": "问", "output": "答"}, {"query": "问", "response": "答"}, {"messages": MESSAGES}]
)
def test_system_and_history_come_first_and_are_learnt_as_elsewhere(fields: dict[str, Any], history: Any) -> None:
    assert turns_of({"system": "你是客服", "history": history, **fields}) == [
        Turn("system", "你是客服"),
        Turn("user", "一"),
        Turn("assistant", "二"),
        ASKED,
        ANSWERED,
    ]


def test_a_system_turn_that_is_there_already_is_not_repeated() -> None:
    messages = [{"role": "system", "content": "甲"}, *MESSAGES]
    assert turns_of({"system": "甲", "messages": messages}) == turns_of({"messages": messages})
    with pytest.raises(UserError, match=r"f:1: system is '乙', but the turns begin with '甲'; keep one"):
        turns_of({"system": "乙", "messages": messages})


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize(("value", "train"), [(0, False), (False, False), ("0", False), (1, True), (True, True)])
def test_an_answer_of_weight_0_is_context(key: str, value: Any, train: bool) -> None:
    bad = {"role": "assistant", "content": "坏", key: value}
    assert turns_of({"messages": [MESSAGES[0], bad, *MESSAGES]}) == [
        ASKED,
        Turn("assistant", "坏", train),
        ASKED,
        ANSWERED,
    ]
    if train:
        assert turns_of({"messages": MESSAGES, key: value}) == [ASKED, ANSWERED]
        return
    with pytest.raises(UserError, match="f:1: every assistant turn is context only, so nothing to learn"):
        turns_of({"messages": MESSAGES, key: value})


@pytest.mark.parametrize("answer", ["", "  ", "\n", None, []])
def test_an_empty_answer_is_refused_unless_it_is_context(answer: Any) -> None:
    empty = {"role": "assistant", "content": answer}
    for fields in (
        {"messages": [MESSAGES[0], empty]},
        {"messages": [MESSAGES[0], empty, *MESSAGES]},
        {"prompt": "问", "completion": answer},
        {"instruction": "问", "output": answer},
        {"query": "问", "response": "答", "history": [["问", answer]]},
    ):
        with pytest.raises(UserError, match="f:1: an answer is empty, which teaches to say nothing"):
            turns_of(fields)
    assert len(turns_of({"messages": [MESSAGES[0], {**empty, "weight": 0}, *MESSAGES]})) == 4


def test_answers_in_a_prompt_of_turns_are_context() -> None:
    prompt = [*MESSAGES, {"role": "user", "content": "再问"}]
    assert turns_of({"prompt": prompt, "completion": "再答"}) == [
        ASKED,
        ANSWERED._replace(train=False),
        Turn("user", "再问"),
        Turn("assistant", "再答"),
    ]


def test_a_masked_turn_is_still_masked_in_the_processed_file(tmp_path: Path) -> None:
    messages = [MESSAGES[0], {"role": "assistant", "content": "坏", "weight": 0}, *MESSAGES]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}), "utf-8")
    (record,) = read_records(path)
    assert [message.get("train") for message in record.to_json()["messages"]] == [None, False, None, None]
    path.write_text(json.dumps(record.to_json()), "utf-8")
    assert read_records(path) == [record]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": MESSAGES, "tools": [{"name": "f"}]}, "tools: tool calls cannot be learnt here; remove the rec"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "3"}]}, "role 'tool': tool calls"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls: tool"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "functi"),
        ({"conversations": [{"from": "observation", "value": "3"}]}, "role 'observation': tool calls"),
        ({"messages": MESSAGES, "images": ["a.png"]}, "images: only text can be learnt"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content has the part .*image_url.*: only",
        ),
        (
            {"messages": [{**MESSAGES[1], "reasoning_content": "想"}]},
            "reasoning_content: reasoning apart from the answer",
        ),
        (
            {"prompt": "问", "chosen": "好", "rejected": "坏"},
            "chosen: preferences cannot be learnt here; keep the better",
        ),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "chosen: preferences"),
        ({"messages": MESSAGES, "rejected_response": "坏"}, "rejected_response: preferences"),
        (
            {
                "input": {"messages": MESSAGES[:1]},
                "preferred_output": MESSAGES[1:],
                "non_preferred_output": MESSAGES[1:],
            },
            "preferred_output: preferences",
        ),
        ({"prompt": "问", "completion": "答", "label": False}, "label is False: preferences"),
        ({"messages": [{**MESSAGES[1], "weight": 0.5}]}, "weight is 0.5, expected 0 or 1"),
        ({"prompt": "问", "completion": "答", "loss": 0.23}, "loss is 0.23, expected 0 or 1 .*rename the key"),
        ({"messages": [{"role": "user", "content": "问"}]}, "no assistant turn, so nothing to learn"),
        ({"messages": [{"role": "narrator", "content": "问"}]}, "role 'narrator' is not one of"),
        ({"messages": [{"content": "问"}]}, "message .* has no role and content as text; correct"),
        ({"messages": ["问"]}, "message '问' has no role and content as text; correct"),
        ({"messages": "[" * 100_000}, r"messages is '\[+\.\.\., expected a list"),
        ({"instruction": "问", "output": "答", "history": "以前"}, "history is '以前', expected a list"),
        ({"instruction": "问", "prompt": "问", "response": "答"}, "instruction and prompt are all there, expected one"),
        ({"instruction": "问", "input": ["x"], "output": "答"}, r"input is \['x'\], expected text"),
        ({"instruction": "1 + 1", "output": 2}, "output is 2, expected text; correct"),
        ({"question": {"text": "问"}, "answer": "答"}, r"question is \{.*\}, expected text; correct"),
        ({"system": 3, "messages": MESSAGES}, "system is 3, expected text"),
    ],
    ids=str,
)
def test_what_cannot_be_learnt_is_refused_by_its_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^f:1: {message}") as refused:
        read_turns("f:1", fields)
    assert len(str(refused.value)) < 300


def test_no_message_holds_a_whole_record() -> None:
    for fields in (
        {"messages": [{"role": "x" * 10_000, "content": "问"}]},
        {"messages": [{"role": "user", "content": [{"type": "y", "text": "问" * 10_000}]}]},
        {"system": "问" * 10_000, "messages": [{"role": "system", "content": "x"}, *MESSAGES]},
    ):
        with pytest.raises(UserError, match=re.escape("...")) as refused:
            read_turns("f:1", fields)
        assert len(str(refused.value)) < 400


def test_other_keys_with_a_value_are_named() -> None:
    messages = [{**MESSAGES[0], "name": "甲", "weight": 1}, {**MESSAGES[1], "id": 7, "refusal": None}]
    found = read_turns(
        "f:1", {"messages": messages, "source": "web", "note": "", "meta": {}, "text": "问答", "prompt": "问"}
    )
    assert found is not None
    assert found.unread == {"source", "text", "prompt", "user.name", "user.weight", "assistant.id"}
    found = read_turns("f:1", {"prompt": "问", "completion": "答", "answer": "42", "context": "文", "label": 3})
    assert found is not None
    assert found.turns == (ASKED, ANSWERED)
    assert found.unread == {"answer", "context", "label"}


@pytest.mark.parametrize(
    "extra",
    [
        {"instruction": "问", "output": "答"},
        {"query": "问", "response": "答"},
        {"conversation": "c-17"},
        {"input": "x"},
    ],
    ids=str,
)
def test_a_text_with_a_label_stays_one_whatever_else_it_has(extra: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "好", "label": 1, **extra}), "utf-8")
    (record,) = read_records(path)
    assert (record.text, record.label, record.messages) == ("好", 1, None)


def test_fields_of_a_labelled_text_are_no_conversation() -> None:
    for fields in ({"text": "好", "label": 1}, {"prompt": "问"}, {"output": "答"}, {"instruction": "问", "label": 1}):
        assert read_turns("f:1", fields) is None


def test_messages_in_a_csv_file_are_read(tmp_path: Path) -> None:
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "messages"], [1, json.dumps(MESSAGES)], [2, str(MESSAGES)]])
    records = read_records(path)
    assert [record.messages for record in records] == [(ASKED, ANSWERED)] * 2
    assert {key for record in records for key in record.unread} == {"id"}


KEYS = [key for value in vars(conversations).values() if isinstance(value, tuple | dict) for key in value]
NAMES = st.sampled_from([*filter(lambda key: isinstance(key, str) and key, KEYS), "history", "label", "type", "text"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(0, 1)
    | st.sampled_from(["user", "gpt", "答", "[", "[]", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
)


@settings(max_examples=400, deadline=None)
@given(fields=st.dictionaries(NAMES, VALUES | VALUES.map(repr), max_size=6))
def test_any_fields_are_a_conversation_or_not_or_refused_in_a_line(fields: dict[str, Any]) -> None:
    try:
        found = read_turns("f:1", fields)
    except UserError as error:
        refused = str(error)
    else:
        refused = "f:1: "
        assert found is None or all(isinstance(turn.content, str) and turn.role in ROLES for turn in found.turns)
    assert re.match("f:1: ", refused)
    assert len(refused) < 500

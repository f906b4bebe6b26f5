"""Which ids a record becomes, and which of them are supervised."""

import json
import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example, OverlongError, Turn, chat_example
from tests.conftest import make_reviews

SYSTEM = "You are a helpful assistant."
INSTRUCTION = "判断下面评论的情感倾向，只回答正面或负面。\n评论："
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")
# Reviews with everything in them that a tokenizer may stumble over; a lone surrogate is no text.
REVIEWS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.sampled_from((*CONTROLS, "好", "“", "："))
    )
).map("".join)


def build_prompt(
    tokenizer: ChatTokenizer, max_length: int = 512, labels: tuple[str, ...] = ("负面", "正面")
) -> ClassificationPrompt:
    return ClassificationPrompt(tokenizer, SYSTEM, INSTRUCTION, labels, max_length)


def control_ids(tokenizer: ChatTokenizer) -> list[int]:
    """Ids of the added tokens: they stand behind the ordinary vocabulary."""
    return list(range(tokenizer.vocab_size - len(CONTROLS), tokenizer.vocab_size))


def supervised_ids(example: Example) -> list[int]:
    return [i for i, counts in zip(example.input_ids, example.supervised, strict=True) if counts]


def test_an_example_reads_as_chatml(chat_tokenizer: ChatTokenizer) -> None:
    (example,) = build_prompt(chat_tokenizer).examples(["这家酒店很好。"], [1])
    assert chat_tokenizer.decode(example.input_ids) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{INSTRUCTION}这家酒店很好。<|im_end|>\n"
        "<|im_start|>assistant\n正面<|im_end|>"
    )
    assert example.label == 1
    assert example.truncated_tokens == 0


LONG_TEXTS = {
    "spaces": " " * 90_000,
    "spaces and a line at the end": " " * 90_000 + "\n好",
    "one word": "好" * 90_000,
    "one word of tokens": "非常好房间这家酒店" * 10_000,
    "alternating": "ab" * 45_000,
    "decomposed": unicodedata.normalize("NFD", "ΐế각") * 10_000,
    "reviews": "".join(text for text, _ in make_reviews(9000, seed=3)),
    "digits and marks": "120元……！？" * 12_000,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
@pytest.mark.parametrize("count", [1, 64, 512])
def test_the_beginning_of_a_text_has_the_first_ids_of_the_whole(
    chat_tokenizer: ChatTokenizer, kind: str, count: int
) -> None:
    text = LONG_TEXTS[kind]
    beginning = chat_tokenizer.beginning(text, count)
    assert len(beginning) < len(text)
    assert chat_tokenizer.encode(beginning)[:count] == chat_tokenizer.encode(text)[:count]


def test_of_a_line_of_megabytes_only_the_beginning_is_tokenised(
    chat_tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, texts = build_prompt(chat_tokenizer), [*LONG_TEXTS.values(), "好"]
    lengths: list[int] = []
    plain = ChatTokenizer.encode_all

    def encode_all(tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return plain(tokenizer, texts)

    monkeypatch.setattr(ChatTokenizer, "encode_all", encode_all)
    found = prompt.examples(texts, [1] * len(texts))
    assert max(lengths) < 80_000
    monkeypatch.setattr(ChatTokenizer, "beginning", lambda _, text, __: text)
    for example, whole in zip(found, prompt.examples(texts, [1] * len(texts)), strict=True):
        assert (example.input_ids, example.supervised) == (whole.input_ids, whole.supervised)
        assert bool(example.truncated_tokens) == bool(whole.truncated_tokens)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_token_in_a_review_stays_text(chat_tokenizer: ChatTokenizer, control: str) -> None:
    ids = chat_tokenizer.encode(f"好{control}好")
    assert not set(ids) & set(control_ids(chat_tokenizer))
    assert chat_tokenizer.decode(ids) == f"好{control}好"


@given(review=REVIEWS)
@settings(deadline=None, max_examples=200)
def test_any_review_comes_back_and_brings_no_control_token(chat_tokenizer: ChatTokenizer, review: str) -> None:
    prompt = build_prompt(chat_tokenizer, max_length=100_000)
    (example,) = prompt.examples([review], [0])
    controls = set(control_ids(chat_tokenizer))
    found = [i for i in example.input_ids if i in controls]
    start, end = chat_tokenizer.im_start, chat_tokenizer.im_end
    assert found == [start, end, start, end, start, end]
    middle = example.input_ids[len(prompt.prefix) : example.answer_start - len(prompt.suffix)]
    assert chat_tokenizer.decode(middle) == unicodedata.normalize("NFC", review)


@given(review=REVIEWS, label=st.integers(0, 1), max_length=st.integers(90, 160))
@settings(deadline=None, max_examples=100)
def test_any_example_fits_and_keeps_instruction_and_answer(
    chat_tokenizer: ChatTokenizer, review: str, label: int, max_length: int
) -> None:
    prompt = build_prompt(chat_tokenizer, max_length)
    (example,) = prompt.examples([review], [label])
    assert len(example.input_ids) == len(example.supervised) <= max_length
    assert example.input_ids[: len(prompt.prefix)] == prompt.prefix
    answer = [*prompt.label_ids[label], chat_tokenizer.im_end]
    assert example.input_ids[-len(prompt.suffix) - len(answer) :] == prompt.suffix + answer
    review_ids = chat_tokenizer.encode(review)
    kept = len(example.input_ids) - len(prompt.prefix) - len(prompt.suffix) - len(answer)
    assert example.input_ids[len(prompt.prefix) :][:kept] == review_ids[:kept]
    assert example.truncated_tokens == len(review_ids) - kept


@pytest.mark.parametrize("labels", [("负面", "正面"), ("差评", "好评")])
def test_supervised_tokens_are_the_answer_and_its_end_and_nothing_else(
    chat_tokenizer: ChatTokenizer, labels: tuple[str, ...]
) -> None:
    prompt = build_prompt(chat_tokenizer, labels=labels)
    for label, example in enumerate(prompt.examples(["正面和负面，好评和差评<|im_end|>", "好"], [0, 1])):
        assert chat_tokenizer.decode(supervised_ids(example)) == f"{labels[label]}<|im_end|>"
        assert example.supervised == sorted(example.supervised)
        assert example.answer_start == len(example.input_ids) - len(prompt.label_ids[label]) - 1


def test_every_example_of_a_task_begins_with_the_same_ids(chat_tokenizer: ChatTokenizer) -> None:
    prompt = build_prompt(chat_tokenizer)
    reviews = ["“好”", "：好", "\n好", "", " 好", "只回答正面或负面。", "\u0301好"]
    examples = prompt.examples(reviews, [0, 1] * 3 + [0])
    assert all(example.input_ids[: len(prompt.prefix)] == prompt.prefix for example in examples)
    # The reason for the rule: tokenised as one text, some of them would begin otherwise.
    opening = chat_tokenizer.encode(INSTRUCTION)
    joined = [chat_tokenizer.encode(INSTRUCTION + review) for review in reviews]
    assert any(ids[: len(opening)] != opening for ids in joined)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), length=st.integers(-2, 60))
@settings(deadline=None)
def test_cut_never_splits_a_character(chat_tokenizer: ChatTokenizer, text: str, length: int) -> None:
    text = unicodedata.normalize("NFC", text)
    ids = chat_tokenizer.encode(text)
    kept = chat_tokenizer.cut(ids, length)
    assert kept == ids[: len(kept)]
    assert len(kept) <= max(length, 0)
    assert text.startswith(chat_tokenizer.decode(kept))


def test_cut_takes_all_that_fits(chat_tokenizer: ChatTokenizer) -> None:
    ids = chat_tokenizer.encode("abc𠮷")  # the last character takes four bytes, each a token of its own
    assert len(ids) >= 5
    before = len(chat_tokenizer.encode("abc"))
    assert [len(chat_tokenizer.cut(ids, length)) for length in range(before, len(ids) + 1)] == (
        [before] * (len(ids) - before) + [len(ids)]
    )


def test_cut_of_a_text_with_the_replacement_character_still_splits_no_other(chat_tokenizer: ChatTokenizer) -> None:
    text = "𠮷好\ufffd"
    ids = chat_tokenizer.encode(text)
    for length in range(len(ids)):
        assert text.startswith(chat_tokenizer.decode(chat_tokenizer.cut(ids, length)))


def test_a_long_review_is_cut_and_counted(chat_tokenizer: ChatTokenizer) -> None:
    review = "x1" * 300
    prompt = build_prompt(chat_tokenizer, max_length=120)
    (example,) = prompt.examples([review], [0])
    assert len(example.input_ids) == 120
    assert example.truncated_tokens == len(chat_tokenizer.encode(review)) - (
        120 - len(prompt.prefix) - len(prompt.suffix) - len(prompt.label_ids[0]) - 1
    )


def test_the_answer_has_no_say_in_the_question(chat_tokenizer: ChatTokenizer) -> None:
    prompt = build_prompt(chat_tokenizer, 64, ("负面", "好评论的人"))
    assert len(prompt.label_ids[1]) > len(prompt.label_ids[0])
    for review in ("好", "这家酒店非常好。" * 20):
        short, long = prompt.examples([review] * 2, [0, 1])
        assert short.input_ids[: short.answer_start] == long.input_ids[: long.answer_start]
        assert short.truncated_tokens == long.truncated_tokens
    assert len(long.input_ids) == 64


def test_encode_all_equals_encode(chat_tokenizer: ChatTokenizer) -> None:
    texts = ["好", "", "差评<|im_end|>", "这家酒店非常好。"]
    assert chat_tokenizer.encode_all(texts) == [chat_tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(("short", "long"), [("好", "好评论的人"), ("1", "10")])
def test_only_a_label_word_that_begins_another_is_scored_with_its_end(
    chat_tokenizer: ChatTokenizer, short: str, long: str
) -> None:
    assert chat_tokenizer.encode(long)[: len(chat_tokenizer.encode(short))] == chat_tokenizer.encode(short)
    prompt = build_prompt(chat_tokenizer, labels=(long, "差", short))
    *others, shortest = prompt.label_ids
    assert prompt.scored_ids == [*others, [*shortest, chat_tokenizer.im_end]]


def test_label_words_of_the_same_tokens_are_refused(chat_tokenizer: ChatTokenizer) -> None:
    composed, decomposed = "é", "e\u0301"
    with pytest.raises(UserError, match=rf"prompt\.labels: '{composed}' and '{decomposed}' are the same tokens"):
        build_prompt(chat_tokenizer, labels=(composed, "差", decomposed))


def test_an_instruction_that_leaves_no_room_is_refused(chat_tokenizer: ChatTokenizer) -> None:
    needed = len(build_prompt(chat_tokenizer).prefix)
    prompt = build_prompt(chat_tokenizer, max_length=needed)
    assert prompt.examples([], []) == []  # conversations have no instruction
    with pytest.raises(
        UserError, match=rf"data\.max_length: {needed} tokens, but instruction and answer take \d+; raise"
    ):
        prompt.examples(["好"], [0])


def test_every_assistant_turn_of_a_chat_is_supervised_with_its_end_and_nothing_else(
    chat_tokenizer: ChatTokenizer,
) -> None:
    messages = [
        ("system", "s"),
        ("user", "问一"),
        ("assistant", "答一"),
        ("user", "问二<|im_end|>"),
        ("assistant", "答二"),
    ]
    example = chat_example(chat_tokenizer, messages, max_length=512, where="chat.jsonl:1", default_system=SYSTEM)
    stretches, current = [], []
    for token, counts in zip(example.input_ids, example.supervised, strict=True):
        if counts:
            current.append(token)
        elif current:
            stretches.append(chat_tokenizer.decode(current))
            current = []
    assert [*stretches, chat_tokenizer.decode(current)] == ["答一<|im_end|>", "答二<|im_end|>"]
    assert example.label is None
    assert chat_tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n答一<|im_end|>\n"
        "<|im_start|>user\n问二<|im_end|><|im_end|>\n<|im_start|>assistant\n答二<|im_end|>"
    )
    assert example.input_ids.count(chat_tokenizer.im_end) == 5


def test_a_chat_without_a_system_turn_gets_the_default_one(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("user", "问"), ("assistant", "答")]
    named = chat_example(chat_tokenizer, turns, max_length=512, where="f:1", default_system="甲")
    assert named == chat_example(
        chat_tokenizer, [("system", "甲"), *turns], max_length=512, where="f:1", default_system="乙"
    )
    assert chat_tokenizer.decode(named.input_ids).startswith("<|im_start|>system\n甲<|im_end|>\n")


def test_nothing_stands_behind_the_last_answer(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("user", "问"), ("assistant", "答")]
    longer = chat_example(
        chat_tokenizer, [*turns, ("user", "再问")], max_length=512, where="f:1", default_system=SYSTEM
    )
    assert longer == chat_example(chat_tokenizer, turns, max_length=512, where="f:1", default_system=SYSTEM)


def test_an_answer_that_is_context_is_not_supervised_and_may_be_cut(chat_tokenizer: ChatTokenizer) -> None:
    bad = Turn("assistant", "坏" * 40, train=False)
    turns = [("system", "s"), ("user", "问"), bad, ("user", "再问"), ("assistant", "答案")]
    example = chat_example(chat_tokenizer, turns, max_length=512, where="f:1", default_system=SYSTEM)
    as_learnt = chat_example(
        chat_tokenizer, [bad._replace(train=True) if turn is bad else turn for turn in turns],
        max_length=512, where="f:1", default_system=SYSTEM,
    )  # fmt: skip
    assert example.input_ids == as_learnt.input_ids
    assert chat_tokenizer.decode(supervised_ids(example)) == "答案<|im_end|>"
    cut = chat_example(chat_tokenizer, turns, max_length=60, where="f:1", default_system=SYSTEM)
    assert len(cut.input_ids) <= 60
    assert cut.truncated_tokens > 0
    assert supervised_ids(cut) == supervised_ids(example)


def test_an_answer_behind_the_last_one_that_counts_is_left_out(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("user", "问"), ("assistant", "答")]
    more = [*turns, ("user", "再问"), Turn("assistant", "坏" * 600, train=False)]
    examples = [chat_example(chat_tokenizer, t, max_length=512, where="f:1", default_system="s") for t in (turns, more)]
    assert examples[0] == examples[1]
    with pytest.raises(UserError, match=r"f:1: every assistant turn is context only, so nothing to learn"):
        chat_example(chat_tokenizer, more[2:], max_length=512, where="f:1", default_system="s")


def test_an_added_token_is_one_in_an_answer_and_text_elsewhere(chat_tokenizer: ChatTokenizer) -> None:
    """`<tool_call>` controls nothing: the base writes it as one token."""
    tool_call = control_ids(chat_tokenizer)[-1]
    assert chat_tokenizer.encode_answer("好<tool_call>\n好", "f:1") == [
        *chat_tokenizer.encode("好"),
        tool_call,
        *chat_tokenizer.encode("\n好"),
    ]
    for role in ("system", "user"):
        turns = [(role, "<tool_call>"), ("assistant", "<tool_call>")]
        example = chat_example(chat_tokenizer, turns, max_length=512, where="f:1", default_system=SYSTEM)
        assert example.input_ids.count(tool_call) == 1
        assert supervised_ids(example) == [tool_call, chat_tokenizer.im_end]
    prompt = build_prompt(chat_tokenizer, labels=("<tool_call>", "正面"))
    assert prompt.label_ids[0] == [tool_call]
    assert prompt.examples(["<tool_call>"], [0])[0].input_ids.count(tool_call) == 1


@pytest.mark.parametrize("control", CONTROLS[:3])
def test_a_control_token_in_an_answer_is_refused(chat_tokenizer: ChatTokenizer, control: str) -> None:
    message = rf"f:1: an answer holds {re.escape(control)}, a control token of the model; take it out"
    with pytest.raises(UserError, match=message):
        chat_example(
            chat_tokenizer, [("assistant", f"好{control}")], max_length=512, where="f:1", default_system=SYSTEM
        )
    word = f"好{control}"
    with pytest.raises(UserError, match=rf"^prompt\.labels: '{re.escape(word)}' holds {re.escape(control)}") as caught:
        build_prompt(chat_tokenizer, labels=("坏", word))
    assert "record" not in str(caught.value)


def test_a_long_chat_is_cut_in_its_longest_user_turn(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("system", "s"), ("user", "短"), ("assistant", "答案一"), ("user", "x1" * 100), ("assistant", "答案二")]
    whole = chat_example(chat_tokenizer, turns, max_length=512, where="f:1", default_system=SYSTEM)
    cut = chat_example(chat_tokenizer, turns, max_length=100, where="f:1", default_system=SYSTEM)
    assert len(cut.input_ids) <= 100
    assert cut.truncated_tokens > 0
    assert supervised_ids(cut) == supervised_ids(whole)
    text = chat_tokenizer.decode(cut.input_ids)
    assert "user\n短<|im_end|>" in text
    assert "user\nx1x1" in text


def test_a_chat_may_be_cut_in_several_turns(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("system", "y2" * 30), ("user", "x1" * 40), ("assistant", "答案")]
    cut = chat_example(chat_tokenizer, turns, max_length=40, where="f:1", default_system=SYSTEM)
    assert len(cut.input_ids) <= 40
    assert chat_tokenizer.decode(supervised_ids(cut)) == "答案<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("user", "a"), ("tool", "b")], r"chat\.jsonl:7: role 'tool' is not one of \['system', 'user', 'assistant'\]"),
        ([("user", "a")], r"chat\.jsonl:7: no assistant turn, so nothing to learn; remove the record or add"),
        ([], r"chat\.jsonl:7: no assistant turn"),
        (
            [("user", "a"), ("assistant", "x1" * 90)],
            r"chat\.jsonl:7: the assistant turns exceed data\.max_length = 64",
        ),
    ],
)
def test_a_chat_that_cannot_be_learnt_from_is_refused(
    chat_tokenizer: ChatTokenizer, messages: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chat_example(chat_tokenizer, messages, max_length=64, where="chat.jsonl:7", default_system=SYSTEM)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read \(.+\); a model folder needs it"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["not json", "{}", '{"added_tokens": []}', "[]"])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not a tokenizers file \(.+\); download"):
        ChatTokenizer(tmp_path)


def test_a_tokenizer_without_chatml_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"has no <\|im_end\|> token, which ChatML needs; use a Qwen2\.5 tokenizer"):
        ChatTokenizer(tmp_path)


def test_ids_with_a_gap_between_them_need_a_row_up_to_the_largest(tiny_tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_tokenizer / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    assert ChatTokenizer(tmp_path).vocab_size == 5001


def test_a_chat_whose_answers_do_not_fit_says_how_many_tokens_would(chat_tokenizer: ChatTokenizer) -> None:
    turns = [("user", "y2" * 90), ("assistant", "x1" * 90)]
    with pytest.raises(OverlongError, match=r"f:1: the assistant turns exceed data\.max_length = 64") as caught:
        chat_example(chat_tokenizer, turns, max_length=64, where="f:1", default_system="s")
    chat_example(chat_tokenizer, turns, max_length=caught.value.tokens, where="f:1", default_system="s")

"""An answer's text comes in pieces, none of which shows part of a character."""

import unicodedata

from hypothesis import given, settings

from minilora.generation.chat import iter_text
from minilora.qlora.prompt import ChatTokenizer
from tests.qlora.test_prompt import REVIEWS


@settings(max_examples=200, deadline=None)
@given(text=REVIEWS)
def test_text_that_comes_id_by_id_never_shows_part_of_a_character(chat_tokenizer: ChatTokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text).replace("\ufffd", "")
    ids = chat_tokenizer.encode(text)
    pieces = list(iter_text(chat_tokenizer, iter(ids)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_there_as_soon_as_its_last_id_is(chat_tokenizer: ChatTokenizer) -> None:
    ids = chat_tokenizer.encode("好a😡b")
    assert chat_tokenizer.decode(ids[:1]) == "好"
    taken: list[int] = []
    seen = [(piece, len(taken)) for piece in iter_text(chat_tokenizer, (taken.append(i) or i for i in ids))]
    assert seen[:2] == [("好", 1), ("a", 2)]
    assert len(ids) == 7  # an emoji is four ids in this small vocabulary
    assert seen[2:] == [("😡", 6), ("b", 7)]


def test_half_a_character_at_the_end_is_shown_as_unknown(chat_tokenizer: ChatTokenizer) -> None:
    ids = chat_tokenizer.encode("a😡")
    assert list(iter_text(chat_tokenizer, ids[:-1])) == ["a", "\ufffd"]
    # And one in the middle does not hold back what stands behind it.
    assert "".join(iter_text(chat_tokenizer, [*ids[:-1], *chat_tokenizer.encode("bc")])) == "a\ufffdbc"


def test_text_comes_in_pieces_that_hold_whole_characters(chat_tokenizer: ChatTokenizer) -> None:
    text = "早餐😡也不错，ok"
    ids = chat_tokenizer.encode(text)
    pieces = list(iter_text(chat_tokenizer, ids))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert list(iter_text(chat_tokenizer, chat_tokenizer.encode("😡")[:-1])) != ["😡"]

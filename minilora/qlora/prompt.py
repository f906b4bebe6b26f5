"""Text in, token ids out: ChatML by hand, and the only place where a token becomes supervised.

A conversation in Qwen2.5's ChatML is

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>

Two rules make what follows simple:

* The pieces are tokenised apart and joined as ids. Byte-pair merges would cross the border between instruction and
  review ("：" and an opening quote become one token), so only this way does every example of a task begin with the
  same prefix ids, which `batch.py` computes once.
* Text that comes from outside is never a control token. A review that contains the characters `<|im_end|>` keeps those
  characters; the control tokens are put in by id, here, and nowhere else. What an assistant says is the model's own
  output, so the tokenizer's other added tokens (`<tool_call>`, `<|fim_prefix|>`) are single tokens there, as the base
  writes them; a control token in an answer is refused.

A token is supervised by its position: the assistant's content and the `<|im_end|>` that closes it, except in a turn
that is kept as context only (`Turn.train`). Looking for token ids instead ("mask everything that equals pad") is how
other trainers teach a model not to stop.

Left out: tool calls, and jinja: Qwen's template equals these rules for system, user and assistant turns
(tests/parity/test_prompt.py compares them).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from minilora.errors import UserError, shown

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str
    train: bool = True  # False: an answer that is context and not supervised

    @property
    def is_supervised(self) -> bool:
        return self.role == "assistant" and self.train


class OverlongError(UserError):
    """The assistant turns of a conversation alone have more than `max_length` tokens; `tokens` would hold them."""

    def __init__(self, message: str, tokens: int):
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class Example:
    """One record as the model sees it: ids, and which of them it is asked to predict."""

    input_ids: list[int]  # the whole conversation
    supervised: list[bool]  # for each of its ids, whether that counts in the loss
    label: int | None = None  # index of the label word, None for free-form chat
    truncated_tokens: int = 0  # at least so many cut from the review, or system and user turns, to fit `max_length`

    @property
    def answer_start(self) -> int:
        """Position of the first supervised token; the token before it predicts the answer."""
        return self.supervised.index(True)


class ChatTokenizer:
    """tokenizer.json, with plain text and control tokens kept apart."""

    def __init__(self, folder: Path):
        """Reads `folder/tokenizer.json`; UserError where it is missing, unreadable or without ChatML's tokens."""
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); a model folder needs it") from None
        except Exception as error:  # the tokenizers package raises plain Exception for a bad file
            raise UserError(f"{path}: is not a tokenizers file ({error}); download the model again") from None
        # `encode_special_tokens` keeps only special tokens from being recognised in text, and Qwen's file marks
        # `<tool_call>`, `<|fim_prefix|>` and others as ordinary: so every added one is made special.
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token.content: (index, token.special) for index, token in added.items()}
        self._tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self._added])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        for token in (IM_START, IM_END):
            if token not in ids:
                raise UserError(f"{path}: has no {token} token, which ChatML needs; use a Qwen2.5 tokenizer")
        self.im_start, self.im_end = ids[IM_START], ids[IM_END]
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(longest_first)})")
        self.vocab_size = 1 + max(ids.values())
        self._longest_token = max(map(len, ids))  # in bytes, which are characters at least

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a control token, and none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_answer(self, text: str, name: str) -> list[int]:
        """Ids of what the assistant says: added tokens that control nothing are the base's own single tokens.

        UserError with the text's `name` for a control token, which would end the turn in the middle or begin another.
        """
        ids: list[int] = []
        for piece in self._added_pattern.split(text):
            if piece not in self._added:
                ids += self.encode(piece)
                continue
            token, is_control = self._added[piece]
            if is_control:
                raise UserError(
                    f"{name} holds {piece}, a control token of the model; take it out (a turn is closed without it)"
                )
            ids.append(token)
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [list(e.ids) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def beginning(self, text: str, num_tokens: int) -> str:
        """So much of a text that its first `num_tokens` ids are those of the whole, which may be megabytes of one line.

        A token has no more characters than the longest one, and NFC makes one character of 4 at most. No text has both,
        so enough stays between these ids and the cut, near which byte pairs merge differently.
        """
        return text[: 4 * self._longest_token * (num_tokens + 8)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def open_turn(self, role: str, content: str = "") -> list[int]:
        """`<|im_start|>{role}\\n{content}`: a turn that is still open."""
        return [self.im_start, *self.encode(f"{role}\n{content}")]

    def close_turn(self) -> list[int]:
        """`<|im_end|>\\n`: the end of a turn that another one follows."""
        return [self.im_end, *self.encode("\n")]

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids, a few less where that would split a character: the model never saw half of one."""
        if len(ids) <= length:
            return ids
        for end in range(length, 0, -1):
            before, after = ids[max(end - 4, 0) : end], ids[end : end + 4]  # at worst each of its 4 bytes is a token
            if self.decode(before + after) == self.decode(before) + self.decode(after):
                return ids[:end]
        return []


@dataclass
class ClassificationPrompt:
    """How a review becomes a question whose answer is one label word.

    The ids of an example are prefix + review + suffix + label word + `<|im_end|>`. `scored_ids` decide between words: a
    word's own, and the closing token where they begin another word, which could never be the more probable one else.
    """

    tokenizer: ChatTokenizer
    system: str  # text of the system turn
    instruction: str  # opens the user turn; the review follows it directly
    labels: tuple[str, ...]  # the label words; a label's index is its class
    max_length: int  # longest example in tokens, the answer included

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        self.prefix = tokenizer.open_turn("system", self.system) + tokenizer.close_turn()
        self.prefix += tokenizer.open_turn("user", self.instruction)
        self.suffix = tokenizer.close_turn() + tokenizer.open_turn("assistant")
        self.label_ids = [tokenizer.encode_answer(word, f"prompt.labels: {word!r}") for word in self.labels]
        self.scored_ids = []
        for word, ids in zip(self.labels, self.label_ids, strict=True):
            if (first := self.labels[self.label_ids.index(ids)]) != word:
                raise UserError(f"prompt.labels: {first!r} and {word!r} are the same tokens; remove one of them")
            begins_another = sum(other[: len(ids)] == ids for other in self.label_ids) > 1
            self.scored_ids.append([*ids, tokenizer.im_end] if begins_another else ids)

    def examples(self, texts: Sequence[str], labels: Sequence[int]) -> list[Example]:
        """One Example per review, cut where it is too long for the longest word; UserError where none has room."""
        fixed = len(self.prefix) + len(self.suffix) + max(map(len, self.label_ids)) + 1
        if texts and fixed >= self.max_length:
            raise UserError(
                f"data.max_length: {self.max_length} tokens, but instruction and answer take {fixed}; "
                "raise data.max_length or shorten prompt.instruction"
            )
        examples = []
        texts = [self.tokenizer.beginning(text, self.max_length) for text in texts]
        for review, label in zip(self.tokenizer.encode_all(texts), labels, strict=True):
            answer = [*self.label_ids[label], self.tokenizer.im_end]
            kept = self.tokenizer.cut(review, self.max_length - fixed)
            question = self.prefix + kept + self.suffix
            supervised = [False] * len(question) + [True] * len(answer)
            examples.append(Example(question + answer, supervised, label, len(review) - len(kept)))
        return examples


def check_turns(turns: Sequence[Turn], where: str) -> None:
    """UserError for an unknown role or nothing to learn."""
    for turn in turns:
        if turn.role not in ROLES:
            raise UserError(
                f"{where}: role {shown(turn.role)} is not one of {list(ROLES)}; remove the turn or the record"
            )
    if not any(turn.is_supervised for turn in turns):
        found = "no assistant turn" if all(turn.train for turn in turns) else "every assistant turn is context only"
        raise UserError(f"{where}: {found}, so nothing to learn; remove the record or add an answer")


def chat_example(
    tokenizer: ChatTokenizer,
    messages: Sequence[tuple[str, str] | Turn],
    *,
    max_length: int,
    where: str,
    default_system: str,
) -> Example:
    """A conversation, in which the assistant's turns are supervised unless `Turn.train` says otherwise.

    Without a system turn at the start, `default_system` is put there. Beyond `max_length` tokens the longest turn that
    is context is cut. Where the supervised turns alone do not fit, that is an OverlongError with `where`; raises also
    what `check_turns` does.
    """
    turns = [Turn(*message) for message in messages]
    if not turns or turns[0].role != "system":
        turns.insert(0, Turn("system", default_system))
    check_turns(turns, where)
    while not turns[-1].is_supervised:
        turns.pop()  # nothing after the last answer is of use

    contents = [
        tokenizer.encode(tokenizer.beginning(turn.content, max_length))
        if turn.role != "assistant"
        else tokenizer.encode_answer(turn.content, f"{where}: an answer")
        for turn in turns
    ]
    openings, closing = [tokenizer.open_turn(turn.role) for turn in turns], tokenizer.close_turn()
    fixed = sum(map(len, openings)) + len(closing) * len(turns)
    uncut = sum(map(len, contents))
    while (excess := fixed + sum(map(len, contents)) - max_length) > 0:
        cuttable = [i for i, turn in enumerate(turns) if not turn.is_supervised and contents[i]]
        if not cuttable:
            raise OverlongError(
                f"{where}: the assistant turns exceed data.max_length = {max_length} tokens by {excess}; "
                "raise data.max_length or remove the record",
                max_length + excess,
            )
        longest = max(cuttable, key=lambda i: len(contents[i]))
        contents[longest] = tokenizer.cut(contents[longest], len(contents[longest]) - excess)

    input_ids: list[int] = []
    supervised: list[bool] = []
    for turn, opening, content in zip(turns, openings, contents, strict=True):
        input_ids += opening + content + closing
        supervised += [False] * len(opening) + [turn.is_supervised] * (len(content) + 1) + [False] * (len(closing) - 1)
    length = len(input_ids) - supervised[::-1].index(True)  # nothing after the last answer is of use
    return Example(input_ids[:length], supervised[:length], truncated_tokens=uncut - sum(map(len, contents)))

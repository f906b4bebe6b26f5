"""Text in, token ids out: ChatML by hand, and the only place where a token becomes supervised.

A conversation in Qwen2.5's ChatML is

    <|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n{answer}<|im_end|>

Two rules make what follows simple:

* The pieces are tokenised apart and joined as ids. Byte-pair merges would cross the border between instruction and
  review ("：" and an opening quote become one token), so only this way does every example of a task begin with the
  same prefix ids, which `batch.py` computes once.
* Text that comes from outside is never a control token. A review that contains the characters `<|im_end|>` keeps those
  characters; the control tokens are put in by id, here, and nowhere else.

A token is supervised by its position: the assistant's content and the `<|im_end|>` that closes it. Looking for token
ids instead ("mask everything that equals pad") is how other trainers teach a model not to stop.

Left out: tool calls, and jinja: Qwen's template equals these rules for system, user and assistant turns
(tests/parity/test_prompt.py compares them).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from minilora.errors import UserError

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One record as the model sees it: ids, and which of them it is asked to predict.

    Attributes:
        input_ids: the whole conversation, n ids.
        supervised: n flags; `supervised[i]` says that `input_ids[i]` counts in the loss.
        label: index of the label word, None for free-form chat.
        truncated_tokens: ids cut from the review (or from user turns) to fit `max_length`.
    """

    input_ids: list[int]
    supervised: list[bool]
    label: int | None = None
    truncated_tokens: int = 0

    @property
    def answer_start(self) -> int:
        """Position of the first supervised token; the token before it predicts the answer."""
        return self.supervised.index(True)


class ChatTokenizer:
    """tokenizer.json, with plain text and control tokens kept apart."""

    def __init__(self, folder: Path):
        """Reads `folder/tokenizer.json`.

        Every added token is marked special, because `encode_special_tokens` keeps only the special ones from being
        recognised in text, and Qwen's file marks `<tool_call>`, `<|fim_prefix|>` and others as ordinary.

        Raises:
            UserError: the file is missing or unreadable, or knows no ChatML tokens.
        """
        self.folder = folder
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); a model folder needs it") from None
        except Exception as error:  # the tokenizers package raises plain Exception for a bad file
            raise UserError(f"{path}: is not a tokenizers file ({error}); download the model again") from None
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._tokenizer.add_special_tokens([AddedToken(t.content, special=True, normalized=False) for t in added])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.im_start = self._control_id(IM_START, path)
        self.im_end = self._control_id(IM_END, path)

    def _control_id(self, token: str, path: Path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{path}: has no {token} token, which ChatML needs; use a Qwen2.5 tokenizer")
        return int(token_id)

    @property
    def vocab_size(self) -> int:
        """Number of ids in use, the control tokens included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it becomes a control token, and none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [list(e.ids) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def iter_text(self, ids: Iterable[int]) -> Iterator[str]:
        """Text of ids that come one by one, in pieces that never hold part of a character.

        An incomplete character waits for the rest of it; what never becomes one is shown as U+FFFD at the end.
        """
        waiting: list[int] = []
        for token in ids:
            waiting.append(token)
            text = self.decode(waiting)
            if not text.endswith("\ufffd"):
                waiting = []
                yield text
        if waiting:
            yield self.decode(waiting)

    def open_turn(self, role: str, content: str = "") -> list[int]:
        """`<|im_start|>{role}\\n{content}`: a turn that is still open."""
        return [self.im_start, *self.encode(f"{role}\n{content}")]

    def close_turn(self) -> list[int]:
        """`<|im_end|>\\n`: the end of a turn that another one follows."""
        return [self.im_end, *self.encode("\n")]

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids, a few less where that would split a character.

        Byte-level tokens can hold part of a UTF-8 character; the model never saw half of one.
        """
        if len(ids) <= length:
            return ids
        end = max(length, 0)
        while end and self._splits_character(ids[max(end - 4, 0) : end], ids[end : end + 4]):
            end -= 1
        return ids[:end]

    def _splits_character(self, before: list[int], after: list[int]) -> bool:
        """Whether the border between two runs of ids lies within a character, which is four tokens at most."""
        return self.decode(before + after) != self.decode(before) + self.decode(after)


@dataclass(frozen=True)
class ClassificationPrompt:
    """How a review becomes a question whose answer is one label word.

    The ids of an example are prefix + review + suffix + label word + `<|im_end|>`.

    Attributes:
        tokenizer: the model's tokenizer.
        system: text of the system turn.
        instruction: opens the user turn; the review follows it directly.
        labels: the label words; a label's index is its class. None begins another: a word is scored without the
            closing token, so that the one that goes on could never win.
        max_length: longest example in tokens, the answer included.
    """

    tokenizer: ChatTokenizer
    system: str
    instruction: str
    labels: tuple[str, ...]
    max_length: int
    prefix: list[int] = field(init=False)
    suffix: list[int] = field(init=False)
    label_ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        prefix = tokenizer.open_turn("system", self.system) + tokenizer.close_turn()
        prefix += tokenizer.open_turn("user", self.instruction)
        object.__setattr__(self, "prefix", prefix)
        object.__setattr__(self, "suffix", tokenizer.close_turn() + tokenizer.open_turn("assistant"))
        object.__setattr__(self, "label_ids", [tokenizer.encode(label) for label in self.labels])
        for (word, ids), (longer, longer_ids) in permutations(zip(self.labels, self.label_ids, strict=True), 2):
            if longer_ids[: len(ids)] == ids:
                raise UserError(
                    f"prompt.labels: the tokens of {longer!r} begin with those of {word!r}, so {word!r} would always "
                    "be the more probable answer; choose words of which none begins another"
                )

    def examples(self, texts: Sequence[str], labels: Sequence[int]) -> list[Example]:
        """One Example per review, the review cut where it is too long, never instruction or answer.

        Raises:
            UserError: they leave no room for a review.
        """
        fixed = len(self.prefix) + len(self.suffix) + max(map(len, self.label_ids)) + 1
        if texts and fixed >= self.max_length:
            raise UserError(
                f"data.max_length: {self.max_length} tokens, but instruction and answer take {fixed}; "
                "raise data.max_length or shorten prompt.instruction"
            )
        examples = []
        for review, label in zip(self.tokenizer.encode_all(texts), labels, strict=True):
            answer = [*self.label_ids[label], self.tokenizer.im_end]
            room = self.max_length - len(self.prefix) - len(self.suffix) - len(answer)
            kept = self.tokenizer.cut(review, room)
            question = self.prefix + kept + self.suffix
            examples.append(
                Example(
                    input_ids=question + answer,
                    supervised=[False] * len(question) + [True] * len(answer),
                    label=label,
                    truncated_tokens=len(review) - len(kept),
                )
            )
        return examples

    def with_answer(self, example: Example, label: int) -> Example:
        """The same question with another label word as its answer and no closing token, for scoring."""
        question = example.input_ids[: example.answer_start]
        answer = self.label_ids[label]
        return Example(question + answer, [False] * len(question) + [True] * len(answer), label)


def check_turns(messages: Sequence[tuple[str, str]], where: str) -> None:
    """Refuses a conversation that no example can be made of; data preparation asks too, before it writes a file.

    Raises:
        UserError: an unknown role, or no assistant turn.
    """
    for role, _ in messages:
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r} is not one of {list(ROLES)}; remove the turn or the record")
    if not any(role == "assistant" for role, _ in messages):
        raise UserError(f"{where}: no assistant turn, so nothing to learn; remove the record or add an answer")


def chat_example(
    tokenizer: ChatTokenizer, messages: Sequence[tuple[str, str]], *, max_length: int, where: str, default_system: str
) -> Example:
    """A conversation with every assistant turn supervised.

    Too long a conversation is cut in its longest user or system turn; an assistant turn never is.

    Args:
        tokenizer: the model's tokenizer.
        messages: (role, content) pairs; without a system turn at the start, `default_system` is put there.
        max_length: longest example in tokens.
        where: file and line of the record, for messages.
        default_system: content of that turn.

    Raises:
        UserError: an unknown role, no assistant turn, or one that does not fit.
    """
    if not messages or messages[0][0] != "system":
        messages = [("system", default_system), *messages]
    check_turns(messages, where)

    contents = [tokenizer.encode(content) for _, content in messages]
    fixed = sum(len(tokenizer.open_turn(role)) + len(tokenizer.close_turn()) for role, _ in messages)
    excess = fixed + sum(map(len, contents)) - max_length
    truncated = 0
    while excess > 0:
        cuttable = [i for i, (role, _) in enumerate(messages) if role != "assistant" and contents[i]]
        if not cuttable:
            raise UserError(
                f"{where}: the assistant turns exceed data.max_length = {max_length} tokens by {excess}; "
                "raise data.max_length or remove the record"
            )
        longest = max(cuttable, key=lambda i: len(contents[i]))
        kept = tokenizer.cut(contents[longest], len(contents[longest]) - excess)
        truncated += len(contents[longest]) - len(kept)
        excess -= len(contents[longest]) - len(kept)
        contents[longest] = kept

    input_ids: list[int] = []
    supervised: list[bool] = []
    for (role, _), content in zip(messages, contents, strict=True):
        is_answer = role == "assistant"
        end, *newline = tokenizer.close_turn()
        parts = ((tokenizer.open_turn(role), False), (content, is_answer), ([end], is_answer), (newline, False))
        for ids, counts in parts:
            input_ids += ids
            supervised += [counts] * len(ids)
    length = len(supervised) - supervised[::-1].index(True)  # nothing after the last answer is of use
    return Example(input_ids[:length], supervised[:length], truncated_tokens=truncated)

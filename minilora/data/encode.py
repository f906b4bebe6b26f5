"""Records in, examples out: piece by piece, so that all cores tokenise and only one piece is Python objects."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from minilora.data.invalid import InvalidRecords
from minilora.data.labels import class_indices, in_order
from minilora.data.records import Record
from minilora.data.token_store import Piece
from minilora.errors import UserError
from minilora.qlora.prompt import ChatTokenizer, ClassificationPrompt, Example, OverlongError, Turn, chat_example

PIECE = 1024  # records
SHOWN_LINES = 10


@dataclass(frozen=True)
class Encoder:
    """What makes a store of a file's records (`token_store.Encode`).

    Raises:
        UserError: a label that is neither a label word nor its index; conversations that cannot be learnt, all of them.
        OverlongError: conversations whose assistant turns alone exceed the prompt's `max_length`, if that is an error.
    """

    prompt: ClassificationPrompt  # its system turn is the default one of a conversation
    path: str  # for messages
    read: Callable[[], Iterable[tuple[int, Record]]]  # all records, with their lines
    overlong: str = "error"  # as `data.overlong`
    is_trained: bool = False  # an adapter answers with the prompt's words, so they cannot be others
    on_progress: Callable[[int], object] = lambda _: None  # called with the number of records finished

    def __call__(self, append: Callable[[Piece], None]) -> dict[str, Any]:
        num_read = num_kept = most = 0
        overlong: list[int] = []  # their lines
        invalid = InvalidRecords(gives_up=True, option="--drop_invalid --tokenizer MODEL --max_length N")
        labels: set[str | int] = set()
        records = iter(self.read())
        while piece := list(islice(records, PIECE)):
            kept = []
            for (line, record), (example, error) in zip(piece, self._encode([r for _, r in piece]), strict=True):
                if isinstance(error, OverlongError):
                    overlong.append(line)
                    most = max(most, error.tokens)
                elif error is not None:
                    invalid.add(record.where, error)
                if example is not None:
                    invalid.are_all = False
                    kept.append((line, example))
            append(kept)
            labels.update(record.label for _, record in piece if record.label is not None)
            num_read, num_kept = num_read + len(piece), num_kept + len(kept)
            self.on_progress(len(piece))
        invalid.check()
        if overlong and (self.overlong == "error" or not num_kept):
            lines = ", ".join(map(str, overlong[:SHOWN_LINES])) + (", ..." if len(overlong) > SHOWN_LINES else "")
            raise OverlongError(
                f"{self.path}: {len(overlong)} of {num_read} records have assistant turns that alone exceed "
                f"data.max_length = {self.prompt.max_length} tokens (line {lines}); data.overlong=drop leaves them "
                f"out, data.overlong=cut ends them there, data.max_length={most} takes the longest",
                most,
            )
        return {"overlong": len(overlong), "labels": in_order(labels)}

    def _encode(self, records: Sequence[Record]) -> Iterator[tuple[Example | None, UserError | None]]:
        """For each record its example, unless it has none, and the error that it is too long or cannot be learnt."""
        texts = [record for record in records if record.messages is None]
        labelled = iter(self.prompt.examples([record.content for record in texts], self._classes(texts)))
        tokenizer = _KnownTexts(self.prompt.tokenizer, self._texts_of_turns(records))
        for record in records:
            yield (next(labelled), None) if record.messages is None else self._encode_chat(tokenizer, record)

    def _texts_of_turns(self, records: Iterable[Record]) -> Iterator[str]:
        """What `chat_example` encodes of them."""
        for role, content, *_ in (turn for record in records for turn in record.messages or ()):
            is_whole = role == "assistant"
            yield content if is_whole else self.prompt.tokenizer.beginning(content, self.prompt.max_length)
            yield from (f"{role}\n", "\n")

    def _encode_chat(self, tokenizer: ChatTokenizer, record: Record) -> tuple[Example | None, UserError | None]:
        turns, length = record.messages or (), self.prompt.max_length
        encode = partial(chat_example, tokenizer, where=record.where, default_system=self.prompt.system)
        try:
            return encode(turns, max_length=length), None
        except OverlongError as error:
            if self.overlong != "cut":
                return None, error
            begin = [Turn(role, tokenizer.beginning(content, length), *train) for role, content, *train in turns]
            whole = encode(begin, max_length=sys.maxsize)
            return _ended(whole, tokenizer.cut(whole.input_ids, length)), error
        except UserError as error:
            return None, error

    def _classes(self, records: Iterable[Record]) -> list[int]:
        def classes(records: Iterable[Record]) -> list[int]:
            found = ((r.where, r.label) for r in records if r.label is not None)
            return class_indices(found, self.prompt.labels, self.is_trained)

        try:
            return classes(records)
        except UserError:
            classes(record for _, record in self.read())  # the error names all labels of the file
            raise


def _ended(whole: Example, kept: list[int]) -> Example | None:
    """The conversation that ends with the ids `kept` of it, None if no answer begins before that.

    An answer that is cut has no closing token and does not teach to stop.
    """
    supervised = whole.supervised[: len(kept)]
    if True not in supervised:
        return None
    length = len(kept) - supervised[::-1].index(True)  # nothing after the last answer is of use
    return Example(kept[:length], supervised[:length], truncated_tokens=len(whole.input_ids) - len(kept))


class _KnownTexts(ChatTokenizer):
    """A tokenizer to which `encode` of some texts is a look-up: all cores have tokenised them."""

    def __init__(self, tokenizer: ChatTokenizer, texts: Iterable[str]):
        vars(self).update(vars(tokenizer))
        distinct = list({*texts})
        self._known = dict(zip(distinct, tokenizer.encode_all(distinct), strict=True))

    def encode(self, text: str) -> list[int]:
        return list(self._known[text]) if text in self._known else super().encode(text)

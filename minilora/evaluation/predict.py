"""Reviews in, labels and their probabilities out, in the reviews' order, while the rest of them is still to come.

    rows -> windows -> batches of similar length -> label probabilities -> each window in its own order

A window is what is in memory at once, and what a result waits for. The first ones are small, so that something is seen
soon; later ones are large enough to give batches of similar length. What all prompts begin with is computed once for
all windows.

The probabilities are the model's own softmax over the label words. Nothing has calibrated them: of the answers that it
is 90 % sure of, more or fewer than 90 % may be right (scripts/evaluate.py measures that).
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from minilora.data.records import Record
from minilora.errors import UserError
from minilora.evaluation.score import Prefix, label_probabilities
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.memory import is_out_of_memory

FIRST_WINDOW = 16  # reviews; each window has twice as many as the one before
LAST_WINDOW = 256
WINDOW_CHARACTERS = 1 << 18  # a window of long reviews is full earlier
MAX_WAIT_S = 0.5  # how long a line from a pipe waits for others, or twice as long where they come slowly


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one review.

    Attributes:
        index: place of the review in the input, from 0; empty ones count too.
        text: the review.
        probabilities: by label word, in the order of the prompt's labels; their sum is 1.
    """

    index: int
    text: str
    probabilities: dict[str, float]

    @property
    def label(self) -> str:
        """The most probable label word."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """That of `label`."""
        return self.probabilities[self.label]


class Predictor:
    """Predicts window after window, and counts. Several ranks get the same windows, share the work, and all know all.

    Attributes:
        prompt: how a review becomes a question.
        max_batch_tokens: of a forward pass, see `label_probabilities`.
        num_rows: rows seen.
        num_cut: those that were too long and were cut to data.max_length.
        num_empty: rows of white space alone, which get none.
        first_empty: where the first of these stands.
    """

    def __init__(
        self, model: Qwen2ForCausalLM, prompt: ClassificationPrompt, max_batch_tokens: int, ranks: Ranks = SINGLE_RANK
    ):
        """Computes what all prompts begin with.

        Args:
            model: put into evaluation mode.
            prompt: how a review becomes a question.
            max_batch_tokens: of a forward pass, see `label_probabilities`.
            ranks: that share the work.
        """
        self._model = model.eval()
        self._ranks = ranks
        self.prompt = prompt
        self.max_batch_tokens = max_batch_tokens
        self._prefix = Prefix.of(model, prompt.prefix)
        self.num_rows = self.num_cut = self.num_empty = 0
        self.first_empty: str | None = None

    def predict(
        self,
        rows: Sequence[Record],
        on_progress: Callable[[int], object] | None = None,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[Prediction]:
        """One prediction for each row that is not empty, in their order; `interruptible` is entered around the work.

        Raises:
            UserError: a probability is no number, memory runs out, or the prompt leaves no room for a review.
        """
        places = [place for place, row in enumerate(rows) if row.content.strip()]
        predictions = []
        if places:
            texts = [rows[place].content for place in places]
            examples = self.prompt.examples(texts, [0] * len(texts))  # with any answer; the labels take its place
            found = self._score(examples, rows[0].where, on_progress, interruptible)
            for place, text, values in zip(places, texts, found.tolist(), strict=True):
                probabilities = dict(zip(self.prompt.labels, values, strict=True))
                predictions.append(Prediction(self.num_rows + place, text, probabilities))
            self.num_cut += sum(example.truncated_tokens > 0 for example in examples)
        empty = [row.where for row in rows if not row.content.strip()]
        self.first_empty = self.first_empty or next(iter(empty), None)
        self.num_empty += len(empty)
        self.num_rows += len(rows)
        return predictions

    def _score(
        self,
        examples: Sequence[Example],
        where: str,
        on_progress: Callable[[int], object] | None,
        interruptible: Callable[[], AbstractContextManager[None]],
    ) -> np.ndarray:
        try:
            found = label_probabilities(
                self._model,
                self._prefix,
                examples,
                self.prompt,
                self.max_batch_tokens,
                on_progress,
                self._ranks,
                interruptible,
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{where}: memory ran out in the window that begins there; lower --max-batch-tokens (it is "
                f"{self.max_batch_tokens}) or data.max_length (it is {self.prompt.max_length})"
            ) from error
        if not np.isfinite(found).all():
            raise UserError(
                f"{where}: a probability in the window that begins there is no number; use "
                "model.compute_dtype=float32, or an adapter from before its run went astray"
            )
        return found


def iter_windows(rows: Iterable[Record | None], max_wait_s: float = math.inf) -> Iterator[list[Record]]:
    """Rows by the window; what was read before an error is a window before the error is raised.

    Args:
        rows: in their order; None says that the next one lets itself be waited for.
        max_wait_s: age of a window's first row, with which it goes on with the next row that comes.
    """
    size = FIRST_WINDOW
    window: list[Record] = []
    started = 0.0
    num_characters = 0
    try:
        for row in rows:
            if row is not None:
                started = started if window else time.monotonic()
                window.append(row)
                num_characters += len(row.content)
            is_full = len(window) >= size or num_characters >= WINDOW_CHARACTERS
            if window and (is_full or row is None or time.monotonic() - started > max_wait_s):
                yield window
                window, num_characters = [], 0
                size = min(2 * size, LAST_WINDOW) if is_full else size
    except UserError:
        if window:
            yield window
        raise
    if window:
        yield window


def with_pauses(rows: Iterable[Record], pause_s: float = MAX_WAIT_S) -> Iterator[Record | None]:
    """Rows that come when they come, as a pipe's do, and None for every `pause_s` seconds in which none has come.

    Another thread reads them, one window ahead at most.
    """
    arrivals: queue.Queue[Record | Exception | None] = queue.Queue(LAST_WINDOW)

    def read() -> None:
        try:
            for row in rows:
                arrivals.put(row)
            arrivals.put(None)
        except Exception as error:  # the one who waits for the rows has to know
            arrivals.put(error)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            arrived = arrivals.get(timeout=pause_s)
        except queue.Empty:
            yield None
            continue
        if arrived is None:
            return
        if isinstance(arrived, Exception):
            raise arrived
        yield arrived

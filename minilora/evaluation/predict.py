"""A stream of records in, labels and their probabilities out, in the records' order.

    records -> windows -> batches of similar length -> label probabilities -> each window in its own order

A window is what is in memory at once, and what a result waits for. The first ones are small, for an early result; later
ones are large enough to give batches of similar length. The prompts' shared prefix is computed once for all windows.

The probabilities are the model's own softmax over the label words, at a temperature where one was fitted. Without one,
of the predictions with confidence 0.9 more or fewer than 90 % may be right (scripts/evaluate.py measures that).
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.data.records import Record
from minilora.errors import UserError
from minilora.evaluation.calibration import at_temperature
from minilora.evaluation.score import Prefix, ScoringOptions, label_probabilities
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.qlora.prompt import ClassificationPrompt, Example
from minilora.system.distributed import SINGLE_RANK, Ranks
from minilora.system.memory import is_out_of_memory

FIRST_WINDOW = 16  # records; each window has twice as many as the one before
LAST_WINDOW = 256
WINDOW_CHARACTERS = 1 << 18  # a window of long reviews is full earlier
MAX_WAIT_S = 0.5  # how long a record from a pipe waits for others; up to twice as long where they come slowly


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one review."""

    index: int  # of the review in the input, from 0; empty ones count too
    text: str
    probabilities: dict[str, float]  # by label word, in the order of the prompt's labels; their sum is 1
    other: Mapping[str, Any] | None = None  # what the record has beside the text, by column
    min_probability: float | None = None  # that the label must have to be given

    @property
    def label(self) -> str:
        """The most probable label word; empty where it is less probable than asked for."""
        return max(self.probabilities, key=self.probabilities.__getitem__) if self.is_answered else ""

    @property
    def probability(self) -> float:
        """The probability of the most probable label word."""
        return max(self.probabilities.values())

    @property
    def is_answered(self) -> bool:
        return self.min_probability is None or self.probability >= self.min_probability


@dataclass(frozen=True)
class PredictOptions:
    """How probabilities become labels, and how the work is divided."""

    max_batch_tokens: int  # of a forward pass
    temperature: float | None = None  # None for the model's own probabilities
    min_probability: float | None = None  # of a label that is given; None gives all of them


class Predictor:
    """Predicts window after window, and counts records: seen, cut to data.max_length, empty ones, and unanswered.

    A record that holds only white space is empty and gets no prediction. The ranks get the same windows, share the
    work, and all get the result.
    """

    def __init__(
        self, model: Qwen2ForCausalLM, prompt: ClassificationPrompt, options: PredictOptions, ranks: Ranks = SINGLE_RANK
    ):
        """Puts the model into evaluation mode and computes the prompts' shared prefix."""
        self._model = model.eval()
        self._ranks = ranks
        self._prefix = Prefix.of(model, prompt.prefix)
        self.prompt = prompt
        self.options = options
        self.num_records = self.num_cut = self.num_empty = self.num_unanswered = 0
        self.first_empty: str | None = None  # file and line

    def predict(
        self,
        records: Sequence[Record],
        on_progress: Callable[[int], object] | None = None,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> list[Prediction]:
        """One prediction for each record that is not empty, in their order; `interruptible` is entered around the work.

        Raises:
            UserError: a probability is non-finite, memory runs out, or the prompt leaves no room for a review.
        """
        filled = [index for index, record in enumerate(records) if record.content.strip()]
        predictions = []
        if filled:
            texts = [records[index].content for index in filled]
            examples = self.prompt.examples(texts, [0] * len(texts))  # any answer will do
            options = ScoringOptions(
                max_tokens=self.options.max_batch_tokens,
                on_progress=on_progress,
                ranks=self._ranks,
                interruptible=interruptible,
            )
            found = self._score(examples, options, records[0].where)
            for index, text, values in zip(filled, texts, found.tolist(), strict=True):
                probabilities = dict(zip(self.prompt.labels, values, strict=True))
                place, other = self.num_records + index, records[index].other
                least = self.options.min_probability
                predictions.append(Prediction(place, text, probabilities, other, min_probability=least))
            self.num_unanswered += sum(not prediction.is_answered for prediction in predictions)
            self.num_cut += sum(example.truncated_tokens > 0 for example in examples)
        empty = [record.where for record in records if not record.content.strip()]
        self.first_empty = self.first_empty or next(iter(empty), None)
        self.num_empty += len(empty)
        self.num_records += len(records)
        return predictions

    def _score(self, examples: Sequence[Example], options: ScoringOptions, where: str) -> np.ndarray:
        try:
            found = label_probabilities(self._model, self._prefix, examples, prompt=self.prompt, options=options)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{where}: out of memory in the window that begins here; lower --max_batch_tokens (it is "
                f"{options.max_tokens}) or data.max_length (it is {self.prompt.max_length})"
            ) from error
        if not np.isfinite(found).all():
            raise UserError(
                f"{where}: a probability in the window that begins here is non-finite (NaN or inf); use "
                "model.compute_dtype=float32, or a checkpoint from before the run diverged"
            )
        return found if self.options.temperature is None else at_temperature(found, self.options.temperature)


def iter_windows(records: Iterable[Record | None], max_wait_s: float = math.inf) -> Iterator[list[Record]]:
    """Records by the window; those that were read before an error are a window before the error is raised.

    Args:
        records: in their order; None means that the next one is not there yet, and ends the window.
        max_wait_s: age of a window's first record, beyond which the next record ends the window.
    """
    size = FIRST_WINDOW
    window: list[Record] = []
    started = 0.0
    try:
        for record in records:
            if record is not None:
                started = started if window else time.monotonic()
                window.append(record)
            is_full = len(window) >= size or sum(len(record.content) for record in window) >= WINDOW_CHARACTERS
            if window and (is_full or record is None or time.monotonic() - started > max_wait_s):
                yield window
                window = []
                size = min(2 * size, LAST_WINDOW) if is_full else size
    except UserError:
        if window:
            yield window
        raise
    if window:
        yield window


def with_pauses(records: Iterable[Record], pause_s: float = MAX_WAIT_S) -> Iterator[Record | None]:
    """Records as they arrive, from a pipe for example, and None after every `pause_s` seconds without one.

    Another thread reads them, at most one window ahead.
    """
    arrivals: queue.Queue[Record | Exception | None] = queue.Queue(LAST_WINDOW)

    def read() -> None:
        try:
            for record in records:
                arrivals.put(record)
            arrivals.put(None)
        except Exception as error:  # raised in the thread that consumes the records
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

"""A data file as the model sees it: records and their examples side by side, and what is worth saying of its labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minilora.data.encode import Encoder
from minilora.data.labels import index_note, missing_classes
from minilora.data.records import Record
from minilora.data.token_store import TokenStore, build_store
from minilora.errors import UserError, capped
from minilora.qlora.prompt import ClassificationPrompt
from minilora.system.console import info, warn


@dataclass(frozen=True)
class Examples:
    """A data file as the model sees it: an example for each record, both made when they are asked for."""

    records: Sequence[Record]
    examples: TokenStore
    max_length: int  # as data.max_length
    overlong: str  # as data.overlong

    @property
    def labelled(self) -> bool:
        """All of them have a label, so accuracy and F1 are defined."""
        return bool((self.labels >= 0).all())

    @property
    def labels(self) -> np.ndarray:
        """(N,) the class of each, -1 for a conversation."""
        return self.examples.labels

    @property
    def num_truncated(self) -> int:
        """Examples whose text was truncated to data.max_length."""
        return int(np.count_nonzero(self.examples.truncated))

    @property
    def num_overlong(self) -> int:
        """Records whose assistant turns alone exceed data.max_length: dropped or cut, as data.overlong says."""
        return int(self.examples.facts["overlong"])

    def describe(self) -> str:
        """What of it was cut and dropped, in words."""
        overlong = f", {self.num_overlong} overlong (data.overlong={self.overlong})" if self.num_overlong else ""
        return f"{self.num_truncated:,} cut to {self.max_length} tokens{overlong}"


def build_examples(
    records: Sequence[Record], prompt: ClassificationPrompt, is_trained: bool = False, overlong: str = "error"
) -> Examples:
    """One example per record of a file, unless it is dropped: a labelled text, or a conversation. See `Encoder`."""
    path = records[0].where.rpartition(":")[0] if records else ""
    store = build_store(Encoder(prompt, path, lambda: enumerate(records, start=1), overlong, is_trained=is_trained))
    return Examples([records[number - 1] for number in store.lines], store, prompt.max_length, overlong)


def class_weights(chosen: str | Mapping[str, float], trained: Examples, words: Sequence[str]) -> dict[str, float]:
    """What `train.class_weights` gives each label word in the loss of these examples; nothing for "none".

    "balanced" is N / (K n): N examples, n of them of the class, K classes that have any. So their mean over the
    examples is 1, and a class without examples has no weight. Source: King and Zeng 2001, as in scikit-learn.

    UserError: some are conversations, which are of no class.
    """
    if chosen == "none":
        return {}
    if not trained.labelled:
        found = f"{np.count_nonzero(trained.labels < 0):,} of {len(trained.labels):,} training records"
        raise UserError(f"train.class_weights: {found} are conversations, which have no label; use none")
    if isinstance(chosen, Mapping):
        return {word: chosen[word] for word in words}
    counts = np.bincount(trained.labels, minlength=len(words)).tolist()
    num_present = np.count_nonzero(counts)
    return {word: sum(counts) / (num_present * n) for word, n in zip(words, counts, strict=True) if n}


def tell_of_class_weights(weights: Mapping[str, float], trained: Examples, words: Sequence[str], in_step: int) -> None:
    """Says them; warns of those that weigh more than a whole step of `in_step` examples.

    Most steps have no such example. As a step is divided by its own weights, these train as if there were none.
    """
    if not weights:
        return
    info(f"train.class_weights: {format_class_weights(weights)}")
    counts = dict(zip(words, np.bincount(trained.labels, minlength=len(words)).tolist(), strict=True))
    mean = sum(weight * counts[word] for word, weight in weights.items()) / sum(counts.values())
    rare = capped(", ".join(word for word, weight in weights.items() if counts[word] and weight > in_step * mean))
    if rare:
        warn(
            f"note: train.class_weights: most steps of {in_step:,} examples have none of {rare}, and weights act "
            "within a step; they do more in longer ones (train.gradient_accumulation_steps)"
        )


def format_class_weights(weights: Mapping[str, float]) -> str:
    """For a line on the screen and a model card."""
    return ", ".join(f"{word} {weight:.4g}" for word, weight in weights.items())


def lacking_classes(files: Mapping[str, Examples], words: Sequence[str]) -> list[str]:
    """A sentence for each labelled file that has no example of some class, with its name."""
    texts = {name: missing_classes(file.labels, words) for name, file in files.items() if file.labelled}
    return [f"{name}: {text}" for name, text in texts.items() if text is not None]


def tell_of_labels(files: Mapping[str, Examples], words: Sequence[str], says_indices: bool = True) -> None:
    """Says which labels of some files were read as indices, unless that is known, and warns of `lacking_classes`."""
    note = index_note({label for file in files.values() for label in file.examples.facts["labels"]}, words)
    if note is not None and says_indices:
        info(note)
    for text in lacking_classes(files, words):
        warn(f"warning: {text}")

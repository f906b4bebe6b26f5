"""Which records are dropped, and to which split the others go: arrays of numbers in, arrays of indices out.

A record is a key (a hash of its normalised text) and a label's number, so that ten million of them fit: texts stay on
the disk (`spill.py`). Indices are those of the order of reading.
"""

import functools
import hashlib
import random
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

CAUSES = ("empty", "contradictory", "duplicate")
KEPT = len(CAUSES)
CHAT = -1  # the number of a conversation's label, which has none
EMPTY_KEY = bytes(16)
# Most reviews hold nothing else. Their punctuation is dropped before NFKC as it is behind it, and nothing composes.
PLAIN = re.compile("[\\x00-\\x7f\u4e00-\u9fff，。！？、；：“”‘’（）《》【】…—\u3000]*")


def normalized(text: str) -> str:
    """The text by which duplicates are equal: NFKC, without white space, control characters and punctuation.

    Symbols are kept: 很好👍 and 很好👎 are two reviews.
    """
    if not PLAIN.fullmatch(text):
        text = unicodedata.normalize("NFKC", text)
    return _ignored().sub("", text)


@functools.cache
def _ignored() -> re.Pattern[str]:
    """Runs of characters of Unicode's categories P, Z and C.

    Those above U+FFFF are looked up only at such a character: regular expressions have no table for them.
    """
    majors = "".join(map(itemgetter(0), map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))))
    low, high = (
        "".join(
            f"\\U{run.start():08x}-\\U{run.end() - 1:08x}" for run in re.compile("[PZC]+").finditer(majors, *limits)
        )
        for limits in ((0, 0x10000), (0x10000, len(majors)))
    )
    return re.compile(f"[{low}]+|(?=[\U00010000-\U0010ffff])[{high}]+")


def text_key(text: str) -> bytes:
    """16 bytes that are equal for duplicates; EMPTY_KEY where nothing is left of the text."""
    content = normalized(text)
    return hashlib.blake2b(content.encode(), digest_size=16).digest() if content else EMPTY_KEY


@dataclass
class Table:
    """What cleaning and splitting compare: of each record, in the order of reading, a few numbers."""

    first: Indices  # the first record with the same key
    empty: Mask
    label: npt.NDArray[np.int32]  # index into `labels`, or CHAT
    labels: Sequence[Any]  # str or int
    causes: npt.NDArray[np.uint8]  # index into CAUSES of why a record is dropped, or KEPT

    def leaks(self, indices: Indices, other: Indices) -> Mask:
        """Which of the records have a text that is in `other` too; empty texts are never equal."""
        is_there = np.zeros(len(self.first), bool)
        is_there[self.first[other]] = True
        return is_there[self.first[indices]] & ~self.empty[indices]

    def without(self, indices: Indices, gone: Indices) -> Indices:
        is_gone = np.zeros(len(self.first), bool)
        is_gone[gone] = True
        return indices[~is_gone[indices]]

    def count_labels(self, indices: Indices | slice = slice(None)) -> Counter[str]:
        """Records by the text of their label, "chat" for conversations."""
        counts = Counter[str]()
        for number, count in zip(*np.unique(self.label[indices], return_counts=True), strict=True):
            counts["chat" if number == CHAT else str(self.labels[number])] += int(count)
        return counts


@dataclass(frozen=True)
class Group:
    """The records of one label, None for conversations."""

    label: Any
    indices: Indices


def first_of_equal(half: Callable[[str], npt.NDArray[np.int64]]) -> Indices:
    """For each key, whose halves are "high" and "low", the index of the first one that equals it.

    The halves are asked for anew rather than kept: they are the most of what memory holds of a record.
    """
    order = np.lexsort((half("low"), half("high")))  # stable
    is_new = np.ones(len(order), bool)
    is_new[1:] = _differs(half("high")[order])
    is_new[1:] |= _differs(half("low")[order])
    order = order.astype(np.uint32)
    group = np.cumsum(is_new, dtype=np.uint32)
    group -= 1
    first = np.empty(len(order), np.uint32)
    first[order] = order[is_new][group]
    return first


def _differs(values: npt.NDArray[np.int64]) -> Mask:
    return values[1:] != values[:-1]


def find_causes(table: Table, parts: Iterable[Indices]) -> None:
    """Sets the table's causes.

    Of duplicates within a part the first is kept. Of a text with two labels, wherever they are, none is: nobody knows
    which label is right.
    """
    labelled = np.flatnonzero(table.label != CHAT).astype(np.uint32)
    one_label = np.full(len(table.first), CHAT, np.int32)
    one_label[table.first[labelled]] = table.label[labelled]
    is_contradictory = np.zeros(len(table.first), bool)
    is_contradictory[table.first[labelled[one_label[table.first[labelled]] != table.label[labelled]]]] = True

    causes = table.causes
    first_in_part = np.empty(len(table.first), np.uint32)
    for part in parts:
        first_in_part[table.first[part][::-1]] = part[::-1]  # of several the last assignment counts
        causes[part[first_in_part[table.first[part]] != part]] = CAUSES.index("duplicate")
    causes[is_contradictory[table.first]] = CAUSES.index("contradictory")
    causes[table.empty] = CAUSES.index("empty")


def group_by_label(table: Table, indices: Indices) -> list[Group]:
    """The records of each label, sorted by the label's text."""
    label = table.label[indices]
    numbers, counts = np.unique(label, return_counts=True)
    parts = np.split(indices[np.argsort(label, kind="stable")], np.cumsum(counts)[:-1])
    groups = [
        Group(None if number == CHAT else table.labels[number], part)
        for number, part in zip(numbers, parts, strict=False)  # no label has one part, an empty one
    ]
    # Two labels may have one text (an integer, and a word of digits): the one that is read first comes first.
    return sorted(groups, key=lambda group: (str(group.label), group.indices[0]))


def split_groups(groups: Iterable[Group], seed: int, held_out: Sequence[str]) -> dict[str, Indices]:
    """Train and the splits of `held_out`, each label in the same proportion; a function of records and seed.

    Each split of `held_out` gets a tenth, train the rest: with two of them 8:1:1.
    """
    splits: dict[str, list[Indices]] = {name: [] for name in ("train", *held_out)}
    for group in groups:
        indices = _shuffled(group.indices, f"{seed}-{group.label}")
        tenth = max(1, round(len(indices) / 10))
        for number, name in enumerate(held_out):
            splits[name].append(indices[number * tenth : (number + 1) * tenth])
        splits["train"].append(indices[len(held_out) * tenth :])
    return {name: _shuffled(concatenated(parts), f"{seed}-{name}") for name, parts in splits.items()}


def concatenated(parts: Iterable[Indices]) -> Indices:
    return np.concatenate([np.empty(0, np.uint32), *parts])


def _shuffled(indices: Indices, seed: str) -> Indices:
    """Python's shuffle, equal on every platform and version, of 4 bytes an index."""
    order = array("I", indices.tobytes())
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, np.uint32)

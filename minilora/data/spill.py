"""Records on the disk between reading and writing, so that memory holds numbers of a fixed size and no text.

Two temporary files without a name: the records' JSON lines, and of each record an entry. The system removes them
however the program ends.
"""

import json
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from minilora.data.clean import CHAT, KEPT, Indices, Table, first_of_equal, text_key
from minilora.data.records import Record
from minilora.errors import UserError
from minilora.system.files import storage_errors, write_all

# `offset` is that of the JSON line in the other file; behind it stands the record's place, for messages.
ENTRY = np.dtype(
    [
        *(("high", "<i8"), ("low", "<i8"), ("label", "<i4"), ("characters", "<i4")),
        *(("offset", "<i8"), ("line_bytes", "<i4"), ("where_bytes", "<i4")),
    ]
)
PACK_ENTRY = struct.Struct("<16siiqii").pack
WRITE_BYTES = 1 << 20
READ_ENTRIES = 1 << 15
READ_BYTES = 1 << 23  # of lines, about, that are read in the order of the file

encode_json = json.JSONEncoder(ensure_ascii=False).encode


class Spill:
    """The records read so far, by index. A context: at its end nothing of them is left."""

    def __init__(self, directory: Path):
        """Opens the files in `directory`, or above it where it does not exist; UserError where that cannot be."""
        self._directory = directory
        folder = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        try:
            self._lines = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self._entries = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be written to ({error.strerror}); choose another folder for the data"
            ) from None
        self._waiting_lines, self._waiting_entries = bytearray(), bytearray()
        self._end = 0
        self._count = 0
        self._labels: dict[Any, int] = {}
        self.unread = Counter[str]()  # records by key that nothing reads

    def __enter__(self) -> "Spill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._entries.close()

    def __len__(self) -> int:
        return self._count

    def append(self, record: Record) -> None:
        """StorageError on a full disk."""
        line, where = f"{encode_json(record.to_json())}\n".encode(), record.where.encode(errors="replace")
        label = CHAT if record.messages is not None else self._labels.setdefault(record.label, len(self._labels))
        content = record.content
        self._waiting_lines += line
        self._waiting_lines += where
        self._waiting_entries += PACK_ENTRY(text_key(content), label, len(content), self._end, len(line), len(where))
        self._end += len(line) + len(where)
        self._count += 1
        self.unread.update(record.unread)
        if len(self._waiting_lines) > WRITE_BYTES:
            self._flush()

    def table(self) -> Table:
        """Keys and labels; nothing is dropped yet."""
        empty = self.column("high") == 0
        empty &= self.column("low") == 0
        causes = np.full(self._count, KEPT, np.uint8)
        return Table(first_of_equal(self.column), empty, self.column("label"), list(self._labels), causes=causes)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One field of ENTRY, of all records."""
        self._flush()
        column = np.empty(self._count, ENTRY[name])
        for start in range(0, self._count, READ_ENTRIES):
            block = self._read_entries(start, READ_ENTRIES)
            column[start : start + len(block)] = block[name]
        return column

    def where(self, index: int) -> str:
        """File and line of a record."""
        self._flush()
        entry = self._read_entries(index, 1)[0]
        return _read(self._lines, int(entry["offset"] + entry["line_bytes"]), int(entry["where_bytes"])).decode()

    def _read_entries(self, start: int, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(_read(self._entries, start * ENTRY.itemsize, count * ENTRY.itemsize), ENTRY)

    def iter_lines(self, indices: Indices) -> Iterator[bytes]:
        """The JSON lines of the records, in blocks; each block is read in the order of the file."""
        offsets, sizes = self.column("offset")[indices], self.column("line_bytes")[indices]
        step = max(1, READ_BYTES * self._count // max(self._end, 1))
        for start in range(0, len(indices), step):
            block = slice(start, start + step)
            order = np.argsort(offsets[block])
            lines = [b""] * len(order)
            places = (values[block][order].tolist() for values in (offsets, sizes))
            for position, offset, size in zip(order.tolist(), *places, strict=True):
                lines[position] = _read(self._lines, offset, size)
            yield b"".join(lines)

    def _flush(self) -> None:
        for file, waiting in ((self._lines, self._waiting_lines), (self._entries, self._waiting_entries)):
            with storage_errors(self._directory, len(waiting)):
                file.seek(0, 2)
                write_all(file.fileno(), waiting)
            waiting.clear()


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)

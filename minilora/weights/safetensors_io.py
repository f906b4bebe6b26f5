"""safetensors files, one tensor at a time: 8 bytes of length, a JSON header with names and offsets, then the data.

Why not the safetensors library: it maps the file, and every page that was touched counts as used memory until the file
is closed. Here a tensor is read into a buffer of its own. Loading Qwen2.5-0.5B in NF4 peaks at 0.74 GB, with the
library's `safe_open` at 1.45 GB (resident, Linux). Reading by offset needs the header, so it is parsed here, strictly.

The header is refused unless all of it makes sense: tensors that follow each other from the first byte of the data to
the last without a gap or an overlap, as long as shape and dtype say, under unique names. The library checks the same
(the two agree on each of 7,552 single-bit changes of a header) and accepts what no writer produces: a duplicate name,
of which it takes the last, extra fields, empty names. Leading white space and a header length that is no multiple of
eight are legal. A long header in a short file is refused: parsed, it takes up to 45 times its size in memory, so that a
file costs at most twice its own size, or 64 MB. A shard index's `total_size` is ignored, because tools disagree about
what it counts and the headers say all of it.

Source: https://huggingface.co/docs/safetensors, section Format, and safetensors/src/tensor.rs (0.8.0). Left out:
pickled checkpoints, because they can run code.
"""

import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minilora.errors import UserError
from minilora.system.files import StorageError, parse_json, read_json, storage_errors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the library's limit
SHORT_HEADER_BYTES = 1 << 20  # more than any model's: a tensor takes 130, Qwen2.5-72B in 4 bits has 4,000
FILE_BYTES_PER_HEADER_BYTE = 32  # of longer headers
LFS_POINTER = b"version https://git-lfs"  # begins the file that a clone without Git LFS has in place of a large one
LFS_POINTER_BYTES = 1024  # it is shorter
MAX_SIZE = 2**60  # beyond any file; in bits it still fits into 64


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is stored: file, first byte, length in bytes; its dtype and shape."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names and entries of the tensors of one safetensors file.

    Raises:
        UserError: the file is truncated or otherwise not a valid safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == LFS_POINTER[:8] and size < LFS_POINTER_BYTES:
                raise ValueError("but a pointer of Git LFS, which `git lfs pull` in its repository replaces")
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            longest = min(max(SHORT_HEADER_BYTES, size // FILE_BYTES_PER_HEADER_BYTE), MAX_HEADER_BYTES, size - 8)
            if not 2 <= length <= longest:  # before it is read
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length).decode("utf-8"))
        return _check_header(path, header, 8 + length, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a complete safetensors file ({error}); download or copy it again") from None


def _check_header(path: Path, header: Any, start: int, size: int) -> dict[str, TensorEntry]:
    """The entries of a parsed header, whose data is at bytes `start` to `size`; ValueError if it is invalid."""
    if not isinstance(header, dict):
        raise ValueError(f"header: holds a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("header: __metadata__ is not an object of strings")
    for text in (*header, *metadata, *metadata.values()):
        text.encode()  # a lone surrogate, which JSON can write and UTF-8 cannot, is a ValueError
    entries = {name: _check_entry(path, name, value, start) for name, value in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise ValueError(
                f"tensor {name} begins at byte {entry.offset - start} of the data, the one before ends at {end - start}"
            )
        end += entry.num_bytes
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return entries


def _check_entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    """One entry of a header; ValueError unless it is valid and complete."""
    if not name or any(character < " " for character in name):
        raise ValueError(f"tensor name {name!r} is empty or has control characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has shape {shape!r} and data_offsets {offsets!r}, expected two lists")
    if not all(type(size) is int and 0 <= size < MAX_SIZE for size in (*shape, *offsets)):  # True is an int too
        raise ValueError(f"tensor {name} has sizes out of range: shape {shape}, data_offsets {offsets}")
    elements = 1
    for size in shape:
        elements *= size
        if elements >= MAX_SIZE:  # even if a later size is 0
            raise ValueError(f"tensor {name} has the shape {shape}, which no file can hold")
    num_bytes = elements * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"tensor {name} occupies bytes {offsets[0]} to {offsets[1]}, its shape {tuple(shape)} takes {num_bytes}"
        )
    return TensorEntry(
        path=path, offset=start + offsets[0], num_bytes=num_bytes, dtype=DTYPES[dtype], shape=torch.Size(shape)
    )


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor, in memory of its own. UserError where the file ends before the tensor, or cannot be read."""
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            view = memoryview(buffer.numpy().data)
            while view:
                count = file.readinto(view)
                if not count:
                    raise UserError(f"{entry.path}: ends within a tensor; download or copy it again")
                view = view[count:]
    except OSError as error:
        raise UserError(f"{entry.path}: cannot be read ({error.strerror}); check the disk") from None
    if entry.dtype == torch.bool and buffer.numel() and buffer.max() > 1:
        raise UserError(f"{entry.path}: holds a bool that is neither 0 nor 1; download or copy it again")
    return buffer.view(entry.dtype).view(entry.shape)


def read_checkpoint_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder by name. UserError for no weights, missing shards, an index that disagrees."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return read_header(single)
    if not index_path.is_file():
        raise UserError(
            f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; "
            "give a folder with a Hugging Face checkpoint (.bin files are not read: they can run code)"
        )
    content = read_json(index_path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index_path}: has no weight_map with a file for each tensor; download it again")
    entries: dict[str, TensorEntry] = {}
    found: set[tuple[str, str]] = set()
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(
                f"{index_path}: names {shard!r}, which is not a file of this folder; download or copy the checkpoint "
                "again"
            )
        in_shard = read_header(folder / shard)
        entries |= in_shard
        found |= {(name, shard) for name in in_shard}
    differing = sorted({name for name, _ in found ^ set(weight_map.items())})
    if differing:
        raise UserError(
            f"{index_path}: disagrees with its shards about {', '.join(differing[:5])}; "
            "the files are from different models, download them again"
        )
    return entries


def find_mismatches(
    expected: Mapping[str, torch.Size], found: Mapping[str, TensorEntry] | Mapping[str, torch.Tensor]
) -> list[str]:
    """Why the tensors of a file cannot be parameters of these shapes: they must correspond, and be floating-point."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = [f"{name}: missing from the file, expected {tuple(expected[name])}" for name in missing]
    problems += [f"{name}: unknown to the model" for name in unknown]
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name]:
            problems.append(f"{name}: file has {tuple(found[name].shape)}, expected {tuple(expected[name])}")
        elif not found[name].dtype.is_floating_point:
            problems.append(f"{name}: file has {found[name].dtype}, expected a floating-point type")
    return problems


def show_problems(problems: Sequence[str]) -> str:
    """A line each, of many the first and last five: with a wrong prefix all are missing, and then all are unknown."""
    lines = list(problems)
    if len(lines) > 10:
        lines[5:-5] = [f"... {len(lines) - 10} more ..."]
    return "".join(f"\n  {line}" for line in lines)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes one file of a checkpoint, beside its config.json. StorageError for a full or failing disk."""
    try:
        with storage_errors(path, sum(tensor.nbytes for tensor in tensors.values())):
            save_file(dict(tensors), path, metadata={"format": "pt"})
            shutil.copymode(path.with_name("config.json"), path)  # the library makes it readable for the owner only
    except SafetensorError as error:  # the library's wrapper of an OSError
        raise StorageError(
            f"{path}: cannot be written ({error}); make room or mend the disk, and run the same command again"
        ) from None

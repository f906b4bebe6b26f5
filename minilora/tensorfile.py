"""safetensors files, one tensor at a time: 8 bytes of length, a JSON header with names and places, then the data.

A tensor is read into memory of its own. Mapping the file, as is usual, counts every page that was touched as used
memory until the file is closed.

Source: https://huggingface.co/docs/safetensors, section Format. Left out: pickled checkpoints, on purpose.
"""

import json
import struct
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch

from minilora.errors import UserError

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
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands: file, first byte, length in bytes, dtype and shape."""

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); write or download it again") from None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Names and places of the tensors of one safetensors file: 8 bytes of length, JSON, then the data.

    Raises:
        UserError: the file is cut off or is not a safetensors file.
    """
    broken = f"{path}: is not a complete safetensors file"
    again = "download or copy it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (0,)
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(f"{broken} (header of {length} bytes in a file of {size}); {again}")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{broken} (header: {error}); {again}") from None
    if not isinstance(header, dict):
        raise UserError(f"{broken} (header: holds a {type(header).__name__}); {again}")
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = map(index, value["data_offsets"])
            dtype, shape = DTYPES[value["dtype"]], torch.Size(value["shape"])
            num_bytes = shape.numel() * dtype.itemsize
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: tensor {name} has an entry that cannot be read ({error}); {again}") from None
        if not 0 <= begin <= end <= size - 8 - length or end - begin != num_bytes:
            raise UserError(
                f"{path}: tensor {name} stands at bytes {begin} to {end} of {size - 8 - length}, "
                f"its shape {tuple(shape)} takes {num_bytes}; the file is cut off, {again}"
            )
        entries[name] = TensorEntry(path, 8 + length + begin, end - begin, dtype, shape)
    return entries


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """One tensor, in memory of its own.

    Raises:
        UserError: the file ends before the tensor does.
    """
    buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        view = memoryview(buffer.numpy().data)
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(f"{entry.path}: ends within a tensor; download or copy it again")
            view = view[count:]
    return buffer.view(entry.dtype).view(entry.shape)


def read_checkpoint_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, one file or shards with an index.

    Raises:
        UserError: no weights, a missing shard, or an index that disagrees with the shards.
    """
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
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index_path}: names {shard!r}, which is not a file of this folder; download it again")
        entries |= read_header(folder / shard)
    differing = sorted(set(entries) ^ set(weight_map))
    if differing:
        raise UserError(
            f"{index_path}: disagrees with its shards about {', '.join(differing[:5])}; "
            "the files are from different models, download them again"
        )
    return entries

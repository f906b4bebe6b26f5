"""safetensors files, one tensor at a time: 8 bytes of length, a JSON header with names and offsets, then the data.

The library writes them and checks their headers: the tensors must fill the data without a gap or an overlap, as long
as shape and dtype say. It does not read the tensors, because it maps the file, and every page that was touched counts
as used memory until the file is closed. Here a tensor is read into a buffer of its own: loading Qwen2.5-0.5B in NF4
peaks at 0.74 GB, with the library's `safe_open` at 1.45 GB (resident, Linux).

Stricter than the library: a name that occurs twice is refused, and a long header in a short file, so that a header
costs at most twice its file in memory, or 64 MB. A shard index's `total_size` is ignored, because tools disagree about
what it counts and the headers say all of it.

Source: https://huggingface.co/docs/safetensors, section Format. Left out: pickled checkpoints, because they can run
code.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
}
MAX_HEADER_BYTES = 100_000_000  # the library's limit
SHORT_HEADER_BYTES = 1 << 20  # more than any model's: a tensor takes 130, Qwen2.5-72B in 4 bits has 4,000
FILE_BYTES_PER_HEADER_BYTE = 32  # of longer headers


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
    """The tensors of one safetensors file by name. UserError for a file that is truncated or otherwise invalid."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            longest = min(max(SHORT_HEADER_BYTES, size // FILE_BYTES_PER_HEADER_BYTE), MAX_HEADER_BYTES, size - 8)
            if not 2 <= length <= longest:  # before it is read
                raise ValueError(f"header of {length} bytes in a file of {size}")
            with safe_open(path, framework="np"):  # which checks the header
                header = parse_json(file.read(length).decode("utf-8"))
        header.pop("__metadata__", None)
        return {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{path}: is not a complete safetensors file ({error}); download or copy it again") from None


def _entry(path: Path, name: str, value: dict[str, Any], start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    if value["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {value['dtype']}, expected one of {', '.join(DTYPES)}")
    return TensorEntry(path, start + begin, end - begin, dtype=DTYPES[value["dtype"]], shape=torch.Size(value["shape"]))


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
